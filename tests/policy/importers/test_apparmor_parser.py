"""What AppArmor's own parser would refuse is refused, with the place; what is read is bounded."""

import contextlib
import time

import pytest

from policy.importers import apparmor_parser
from policy.importers.apparmor_parser import Parsed, parse_profiles
from policy.importers.report import ImportFileError, Source


def parse(text: str, files: dict[str, str] | None = None) -> Parsed:
    known = {name: [Source(name, content)] for name, content in (files or {}).items()}
    return parse_profiles(Source("f", text), known.get)


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ("dbus send", "f:4: expected a condition or ',' in a dbus rule, not '}'"),
        ("dbus send bus=session\ndbus send,", "f:4: expected a condition or ','"),
        ("dbus shout,", "f:3: unknown access 'shout'"),
        ("dbus (send, shout),", "f:3: unknown access 'shout'"),
        ("dbus (send,", "f:3: '(' without ')'"),
        ("dbus send colour=red,", "f:3: unknown condition 'colour'"),
        ("dbus send label=x,", "f:3: unknown condition 'label' of"),
        ("dbus send peer=(path=/x),", "f:3: unknown condition 'path' in peer"),
        ("dbus send path=/a path=/b,", "f:3: condition 'path' a second time"),
        ("dbus bind name=org.a peer=(name=org.b),", "f:3: condition 'name' a second time"),
        ("dbus name=org.a path=/a,", "f:3: name= says what may be owned"),
        ("dbus bind path=/a,", "f:3: bind is about a name"),
        ("dbus send name=org.a,", "f:3: send and receive are about messages"),
        ("dbus eavesdrop path=/a,", "f:3: eavesdrop has no condition but bus="),
        ("dbus send peer=org.a,", "f:3: '(' missing after peer="),
        ("dbus send peer=(label=a) path=/a,", "f:3: ',' missing after peer"),
        ("dbus send peer=(label=),", "f:3: a value is missing"),
        ("dbus send peer=(name=org.{a,b}),", "f:3: peer=( without name="),
        ("dbus send path=,", "f:3: a value is missing"),
        ("dbus send path=(/a /b),", "f:3: a condition of a dbus rule has a single value"),
        ("dbus send path=/{a,", "f:3: '{' without '}'"),
        ('dbus send path="/a,', "f:3: a value is missing after '=': '\"'"),
        ("capability", "f:4: unexpected '}' in a rule"),
        ("capability chown", "f:4: unexpected '}' in a rule"),
        ("/a r\n/b r,\n{", "f:5: unexpected '{'"),
        ("nonsense,", "f:3: unknown rule 'nonsense'"),
        ("priority 3 dbus,", "f:3: '=' missing after priority"),
        ("audit,", "f:3: unexpected ','"),
        ('/a "r,', "f:3: '\"' without another"),
        ("/a/{b r,", "f:3: '{' without '}'"),
        ("/a/[b r,", "f:3: '[' without ']'"),
        ("signal (send peer=a,", "f:3: '(' without ')'"),
        ("/@{NO}/a r,", "f:3: variable @{NO} is not set"),
        ("@{X}=a", "f:3: a variable is set in a profile"),
        ("if $X { }", "f:3: boolean $X is not set"),
        ("else { }", "f:3: unknown rule 'else'"),
        ("owner dbus,", "f:3: 'owner' before a rule that is not about files"),
        ("other dbus,", "f:3: 'other' before a rule that is not about files"),
        ("owner capability,", "f:3: 'owner' before a rule that is not about files"),
        ("deny { dbus, }", "f:3: 'deny' before a block"),
        ("deny audit dbus,", "f:3: 'audit' stands too late"),
        ("allow deny dbus,", "f:3: 'deny' stands too late"),
        ("deny deny dbus,", "f:3: 'deny' stands too late"),
        ("deny abi <abi/3.0>,", "f:3: unknown rule 'abi'"),
        ("abi ,", "f:3: abi without"),
        ("abi <abi/3.0", "f:3: '<' without '>'"),
        ("hat h { }\nprofile h { }", "f:4: a second profile 'h'"),
        ("if defined dbus { }", "f:3: unexpected 'dbus' in a condition"),
        ("if not { }", "f:3: a condition without a variable"),
        ("if @{X} { }", "f:3: boolean $X is not set"),
        ("if defined $x dbus,", "f:3: '{' missing after a condition"),
        ("profile { }", "f:3: a profile without a name"),
        ("hat x,", "f:3: '{' expected after the name of a profile: ','"),
        ("hat x flags=1 {", "f:3: '{' expected after the name"),
        ("dbus send, }", "f:4: '}' without '{'"),
        ("hat x {", "f:2: '{' without '}'"),
        ("include <missing>", "f:3: cannot include <missing>"),
        ('include "missing"', "f:3: cannot include missing"),
        ("#include missing", "f:3: cannot include missing"),
        ("dbus send,\0", "f:3: a NUL"),
    ],
)
def test_bad_rule_is_refused(rules: str, problem: str) -> None:
    with pytest.raises(ImportFileError) as caught:
        parse(f"\nprofile p {{\n{rules}\n}}\n")
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("dbus send,", "f:1: 'dbus' outside of a profile"),
        ("if x {}", "f:1: 'if' outside of a profile"),
        ("@{profile_name}=x", "f:1: variable @{profile_name} is set already"),
        ("$X = maybe", "f:1: $X is neither true nor false"),
        ("$X = true\n$X = true", "f:2: boolean $X is set already"),
        ("profile p { }\n@{X}=a", "f:2: variables, alias and abi belong before the first profile"),
        (
            "profile p { }\nabi <abi/3.0>,",
            "f:2: variables, alias and abi belong before the first profile",
        ),
        ("@{X}=/usr\n@{X}/bin/y { }", "f:2: '=' missing after a variable"),
        ("profile p flags=() { }", "f:1: no flags"),
        ("profile p flags=(frob) { }", "f:1: unknown flag of a profile: 'frob'"),
        ("profile p flags=(kill,complain) { }", "f:1: flags of a profile that exclude each other"),
        ("profile p flags=(kill) (audit) { }", "f:1: flags of a profile a second time"),
        ("@{X}=", "f:1: no value for @{X}"),
        ("@{X}=a\n@{X}=b", "f:2: variable @{X} is set already"),
        ("@{profile_name}=b", "f:1: variable @{profile_name} is set already"),
        ("@{X}+=b", "f:1: variable @{X} is not set: '+=' adds"),
        ("@{X}=a,", "f:1: a blank is missing before ','"),
        ("@{X}= !", "f:1: unexpected '!' in the values"),
        ('@{X}="a"b', "f:1: a blank is missing before 'b'"),
        ("}", "f:1: '}' without '{'"),
        ("profile p {", "f:1: '{' without '}'"),
        ("profile p", "f:1: '{' expected after the name of a profile: the end of the file"),
        ('profile p "', "f:1: '{' expected"),
        ("abi <x>", "f:1: ',' missing after abi"),
    ],
)
def test_bad_file_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ImportFileError) as caught:
        parse(text)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    "text",
    [
        "abi <abi/4.0>,\nalias /a -> /b,\n$X = true\n${Y}=false\nprofile p { }",
        "/usr/bin/x { }",
        '"/usr/bin/a b" flags=(complain) { }',
        ":ns:p { }",
        "@{X}=/usr\nprofile @{X}/bin/y { }",
        "@{exec_path} = /usr/bin/x\nprofile p @{exec_path} { }",
        "@{attach_path} = /usr/bin/x\nprofile p @{attach_path} { }",
        "@{A} = @{NOBODY_SETS_IT}\nprofile p { }",
        "profile p flags=(attach_disconnected,error=EACCES) { abi <abi/3.0>, ^h { abi < abi/3.0 > , } }",
        "@{X}=a \\\n  b # comment\nprofile p /usr/bin/@{X} xattrs=(a=b c=(d)) (attach_disconnected) { }",
        "profile p {\n include if exists <missing>\n #include if exists <missing>\n}",
        "profile p { # comment } {\n #includes nothing\n /x#y r,\n}",
        "profile p { /a\\ b r, /c,d r, owner { /a r, } all, file, }",
        "profile p { /@{exec_path} r, }",
        'profile p { mount fstype=(a, "b)") options=rw -> /x{,/**}, dbus (send,), }',
    ],
)
def test_good_file_is_read(text: str) -> None:
    assert len(parse(text).profiles) == 1


def test_includes_are_followed() -> None:
    files = {
        "<a>": "@{X}=1\n",
        "<b>": "include <c>\ndbus send path=/@{X},\n",
        "<c>": "dbus bind,\n",
    }
    parsed = parse("include <a>\nprofile p { include <b> }\nprofile q { }", files)
    assert [profile.name for profile in parsed.profiles] == ["p", "q"]
    assert [rule.file for rule in parsed.profiles[0].rules] == ["<c>", "<b>"]
    assert parsed.variables == {"X": ["1"]}


@pytest.mark.parametrize(
    ("files", "cycle"),
    [
        ({"<a>": "\ninclude <a>"}, "<a>:2: a cycle of includes: <a> -> <a>"),
        ({"<a>": "include <b>", "<b>": "include <a>"}, "a cycle of includes: <a> -> <b> -> <a>"),
    ],
)
def test_cycle_of_includes_is_refused(files: dict[str, str], cycle: str) -> None:
    with pytest.raises(ImportFileError, match=cycle):
        parse("profile p {\n include <a>\n}", files)


def test_a_block_ends_in_the_file_it_began_in() -> None:
    with pytest.raises(ImportFileError, match="<a>:1: '}' without"):
        parse("profile p { include <a>", {"<a>": "}"})


def test_what_is_read_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    doubling = {f"<{level}>": f"include <{level + 1}>\n" * 2 for level in range(30)}
    doubling["<30>"] = "x r,\n"
    monkeypatch.setattr(apparmor_parser, "MAX_INCLUDES", 100)
    with pytest.raises(ImportFileError, match="more than 100 includes"):
        parse("profile p { include <0> }", doubling)
    monkeypatch.setattr(apparmor_parser, "MAX_DEPTH", 5)
    with pytest.raises(ImportFileError, match="blocks in each other"):
        parse("profile p {" + "owner {" * 10)
    monkeypatch.setattr(apparmor_parser, "MAX_DBUS_RULES", 2)
    with pytest.raises(ImportFileError, match="f:1: more than 2 dbus rules"):
        parse("profile p { dbus, dbus, dbus, }")
    monkeypatch.setattr(apparmor_parser, "MAX_READ", 10)
    with pytest.raises(ImportFileError, match="more than 10 characters"):
        parse("profile p { }")


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    [
        "/etc/a/file r,\n",
        "owner /usr/lib{,32}/python3.[0-9]/**.{egg,py} r,\n",
        "dbus send bus=session path=/a{,/**} peer=(name=org.a, label=unconfined),\n",
        "# comment\n",
        "{",
        "(",
        '"',
        "\\",
        "a",
        "@{X}",
        "dbus send path=/[a*",
    ],
)
def test_time_is_linear(unit: str) -> None:
    def taken(size: int) -> float:
        text = "@{X}=a\nprofile p {\n" + unit * (size // len(unit)) + "\n}"
        start = time.process_time()
        with contextlib.suppress(ImportFileError):
            parse(text)
        return time.process_time() - start

    # What is quadratic would take 16 times as long.
    assert taken(400_000) <= 10 * taken(100_000) + 0.2


def test_bug_2_an_abi_may_stand_in_a_profile() -> None:
    text = "profile demo /usr/bin/demo {\n  abi <abi/3.0>,\n  dbus send bus=session,\n}\n"
    (profile,) = parse(text).profiles
    assert len(profile.rules) == 1


def test_bug_3_a_file_may_set_what_newer_versions_set_themselves() -> None:
    text = (
        "@{exec_path} = /usr/bin/demo\nprofile demo @{exec_path} { dbus send path=@{exec_path}, }\n"
    )
    parsed = parse(text)
    assert parsed.variables["exec_path"] == ["/usr/bin/demo"]
    with pytest.raises(ImportFileError, match="a rule that is not about files"):
        parse("profile demo { owner dbus send, }")


@pytest.mark.parametrize(
    ("condition", "members"),
    [
        ("if $yes { A } else { B }", "A"),
        ("if not $yes { A } else { B }", "B"),
        ("if $no { A } else if $yes { B } else { C }", "B"),
        ("if $no { A } else if not not $no { B } else { C }", "C"),
        ("if $yes { A } else if $yes { B } else { C }", "A"),
        ("if $no { A }", ""),
        ("if defined @{SET} { A } else { B }", "A"),
        ("if not defined @{UNSET} { A }", "A"),
        ("if defined $yes { if $no { A } else { B } }", "B"),
        ("if ${yes}{ A }if $no{ B }", "A"),
        ("if $no { hat h { A } } else { hat h { B } C }", "C"),
    ],
)
def test_of_a_condition_one_branch_counts(condition: str, members: str) -> None:
    for letter in "ABC":
        condition = condition.replace(f" {letter} ", f" dbus send member={letter}, ")
    start = '$yes = "TRUE"\n${no}=false\n@{SET} = x\n'
    (profile,) = parse(f"{start}profile p {{ {condition} }}").profiles
    assert "".join(rule.conditions["member"] for rule in profile.rules) == members


def test_what_no_condition_lets_count_is_read_but_its_variables_are_not_wanted() -> None:
    parse("$no = false\nprofile p { if $no { dbus bus=@{NOBODY}, } }", {})
    with pytest.raises(ImportFileError, match="unknown rule 'xyzzy'"):
        parse("$no = false\nprofile p { if $no { xyzzy, } }", {})
