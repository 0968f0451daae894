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
        ("if $X { }", "f:3: 'if': conditional rules"),
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
        ("if x {}", "f:1: 'if': conditional policy"),
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
        ("abi <x>", "f:1: ',' missing at the end of a rule"),
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
        "@{X}=/usr\n@{X}/bin/y { }",
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
