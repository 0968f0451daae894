"""What profiles become, rule by rule, and that nobody gets more than the profile says."""

import contextlib
from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from policy.importers import apparmor
from policy.importers.apparmor import import_apparmor
from policy.importers.report import Imported, ImportFileError, Source
from policy.match import Judge
from policy.rules import Identity
from policy.text import format_rule

SNAP = "io.snapcraft.snapd"
ME = Identity(type=SNAP, app="foo", component="app")


def imported(rules: str, *, known: Sequence[str] = (), preamble: str = "") -> Imported:
    text = f"{preamble}\nprofile snap.foo.app {{\n{rules}\n}}\n"
    return import_apparmor(Source("f", text), known_labels=known)


def said(rules: str, *, known: Sequence[str] = (), preamble: str = "") -> list[str]:
    got = imported(rules, known=known, preamble=preamble).access.rules
    return [f"{'deny ' if rule.deny else ''}{format_rule(rule)}" for rule in got]


def reasons(rules: str, preamble: str = "") -> list[str]:
    return [each.reason for each in imported(rules, preamble=preamble).unsaid]


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        pytest.param("dbus send,", ["send:"], id="access"),
        pytest.param("dbus (send, receive) bus=session,", ["send+receive:,bus=session"], id="list"),
        pytest.param("dbus (send receive),", ["send+receive:"], id="list-without-commas"),
        pytest.param("dbus rw,", ["send+receive:"], id="modes"),
        pytest.param("dbus (read, w),", ["send+receive:"], id="words"),
        pytest.param("dbus path=/a,", ["send+receive:@/a"], id="message-access-implied"),
        pytest.param("dbus name=org.a,", ["own:org.a"], id="bind-implied"),
        pytest.param("dbus peer=(name=org.a),", ["send+receive:org.a"], id="peer-implies-message"),
        pytest.param("dbus bind bus=system name=org.a,", ["own:org.a,bus=system"], id="bind"),
        pytest.param("dbus bind,", ["own:"], id="bind-anything"),
        pytest.param("dbus,", ["send+receive+own:"], id="everything"),
        pytest.param("all,", ["send+receive+own:"], id="all"),
        pytest.param("deny dbus send path=/a,", ["deny send:@/a"], id="deny"),
        pytest.param("audit deny dbus send,", ["deny send:"], id="audit-deny"),
        pytest.param("audit allow dbus send,", ["send:"], id="audit-allow"),
        pytest.param("audit { deny dbus send, /x r, }", ["deny send:"], id="audit-block"),
        pytest.param("deny dbus eavesdrop,", [], id="deny-eavesdrop"),
        pytest.param(
            'dbus send bus="session"\n path="/a"\n # why\n interface=org.a.I\n\tmember={Get,Set}\r\n'
            " peer=(name=org.a, label=unconfined),",
            ["send:org.a@/a:org.a.I.{Get,Set},peer=host,bus=session"],
            id="several-lines",
        ),
        pytest.param("dbus send bus = session path = /a,", ["send:@/a,bus=session"], id="blanks"),
        pytest.param("dbus send bus=(session) path=( /a ),", ["send:@/a,bus=session"], id="lists"),
        pytest.param(
            'dbus send bus="{session,system}",', ["send:,bus=session", "send:,bus=system"], id="bus"
        ),
        pytest.param("dbus send bus=*,", ["send:"], id="any-bus"),
        pytest.param("dbus send path=//a///b{,/**},", ["send:@/a/b{,/**}"], id="slashes"),
        pytest.param("dbus send interface=*,", ["send:"], id="any-interface"),
        pytest.param(r'dbus send member="\x47et",', ["send::Get"], id="escape"),
        pytest.param(
            'dbus send peer=(name="org.free*"),',
            ["send:org.free*", "send:org.freedesktop.DBus"],
            id="pattern-covers-the-bus-for-broadcasts",
        ),
        pytest.param('dbus bind name="org.free*",', ["own:org.free*"], id="not-for-own"),
        pytest.param("dbus send,\n dbus send,", ["send:"], id="repeated"),
        pytest.param("dbus send path=/a,x,", [], id="comma-in-a-word"),
        pytest.param(
            "^hat { dbus, }\nprofile child { dbus, }\nhat h2 { dbus, }", [], id="children"
        ),
        pytest.param("profile child { audit { dbus send, } }", [], id="block-in-a-child"),
        pytest.param("priority=3 dbus send,", ["send:"], id="priority"),
        pytest.param("prompt dbus send,", [], id="prompt"),
    ],
)
def test_rule_becomes(text: str, rules: list[str]) -> None:
    assert said(text) == rules


@pytest.mark.parametrize(
    ("label", "peers"),
    [
        ("unconfined", ["host"]),
        ("snap.bar.ui", [f"app:{SNAP}/bar%23ui".replace("%23", "#")]),
        ("snap.bar_two.ui", [f"app:{SNAP}/bar_two#ui"]),
        ("snap.bar.hook.install", [f"app:{SNAP}/bar#hook.install"]),
        ('"snap.bar.{a,b}"', [f"app:{SNAP}/bar#a", f"app:{SNAP}/bar#b"]),
        ('"{snap.bar.a,unconfined}"', [f"app:{SNAP}/bar#a", "host"]),
        ('"{unconfined,/usr/sbin/x}"', ["host"]),
        ("snap.bar.*", [f"app:{SNAP}/bar"]),
        ("snap.bar.**", [f"app:{SNAP}/bar"]),
        ("*", [""]),
        ("snap.b[a]r.x", [f"app:{SNAP}/bar#x"]),
        ("snap.bar.x*", [f"app:{SNAP}/bar#x1", f"app:{SNAP}/bar#x2"]),
        ("snap.*.x?", [f"app:{SNAP}/bar#x1", f"app:{SNAP}/bar#x2"]),
        ("**.y", [f"app:{SNAP}/baz#y"]),
    ],
)
def test_label_becomes(label: str, peers: list[str]) -> None:
    known = ["snap.bar.x1", "snap.bar.x2", "snap.baz.y", "/usr/bin/x1", "snap.a/b.x"]
    rules = said(f"dbus send peer=(label={label}),", known=known, preamble="@{SNAP}=foo")
    assert rules == [f"send:,peer={peer}" if peer else "send:" for peer in peers]


@pytest.mark.parametrize(
    ("label", "peer"),
    [
        ("snap.foo.*", "same-app"),
        ("snap.@{SNAP}.*", "same-app"),
        ("@{profile_name}", f"app:{SNAP}/foo#app"),
        ("snap.foo.other", f"app:{SNAP}/foo#other"),
    ],
)
def test_what_goes_to_the_own_snap_is_no_broadcast(label: str, peer: str) -> None:
    def rules(rule: str) -> list[str]:
        return said(f"{rule} peer=({label}),", preamble="@{SNAP}=foo")

    label = f"label={label}"
    assert rules("dbus send path=/a") == [f"send:*@/a,peer={peer}"]
    assert rules("dbus (send, receive)") == [f"send+receive:*,peer={peer}"]
    assert rules("dbus receive") == [f"receive:,peer={peer}"]
    assert rules("deny dbus send") == [f"deny send:,peer={peer}"]
    label += " name=org.a"
    assert rules("dbus send") == [f"send:org.a,peer={peer}"]


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("dbus send peer=(label=/usr/sbin/cupsd),", "neither unconfined nor of a snap"),
        ("dbus send peer=(label=snap.bar.a*),", "not known"),
        ("dbus send peer=(label=snap.*),", "not known"),
        ("dbus send peer=(label=###SLOT_SECURITY_TAGS###),", "no text is given"),
        ('dbus send peer=(label="' + "{a,b}" * 20 + '"),', "too many alternatives"),
        ("dbus send bus=s*,", "is a pattern"),
        ("dbus send peer=(name=unconfined),", "can match nothing"),
        ("dbus send path=/a/,", "can match nothing"),
        ('dbus send interface="{,org.a}",', "having no interface"),
        ("dbus,", "eavesdropping"),
        ("dbus eavesdrop,", "eavesdropping"),
        ("prompt dbus send,", "asked"),
        ("priority=-1 dbus send,", "priority"),
        ("dbus send path=/@{LONG},", "too long"),
    ],
)
def test_what_cannot_be_said_is_listed(rule: str, reason: str) -> None:
    (only,) = reasons(rule, preamble="@{LONG}=" + "x" * 5000)
    assert reason in only


@pytest.mark.parametrize(
    ("rule", "denied"),
    [
        ("deny dbus send path=/a peer=(label=/usr/sbin/cupsd),", "deny send:@/a"),
        ("deny dbus send peer=(label=snap.bar.x*),", "deny send:"),
        ("deny dbus send peer=(label=###X###),", "deny send:"),
        ("deny dbus send path=/a bus=s*,", "deny send:@/a"),
        ("deny dbus bind name=:1.*,", "deny own:"),
        ('deny dbus send path=/a interface="{,org.a}",', "deny send:@/a"),
    ],
)
def test_a_denial_becomes_wider_rather_than_narrower(rule: str, denied: str) -> None:
    assert said(rule, known=["snap.bar.x1"]) == [denied]
    (only,) = reasons(rule)
    assert "denied whatever" in only


def test_the_host_needs_a_rule() -> None:
    assert imported("").access.receive_from_host is False


def test_rules_know_where_they_come_from() -> None:
    files = {"<abstractions/x>": [Source("/x/one", "\ndbus send path=/one,"), Source("/x/two", "")]}
    text = "profile a {\n #include <abstractions/x>\n\n dbus\n send path=/here, }"
    got = import_apparmor(Source("f", text), resolve=files.get)
    assert [rule.origin for rule in got.access.rules] == ["/x/one:2", "f:4"]
    assert str(import_apparmor(Source("f", text)).unsaid[0]).startswith(
        "f:2: include <abstractions/x>:"
    )


def test_placeholders_of_templates_can_be_given() -> None:
    text = "profile snap.foo.app {\n###SNIPPETS###\n dbus send peer=(label=###SLOT_SECURITY_TAGS###),\n}"
    given = {"###SLOT_SECURITY_TAGS###": '"snap.bar.{a,b}"'}
    got = import_apparmor(Source("f", text), placeholders=given)
    assert [rule.peer.component for rule in got.access.rules if rule.peer] == ["a", "b"]


def test_variables_are_replaced() -> None:
    preamble = '@{A}=a b\n@{A}+="c" # more\n@{B}=/@{A}{,/**}\n@{B2} ?= x\n@{B2} ?= y\n@C := z'
    assert said("dbus send path=@{B},", preamble=preamble) == ["send:@{/a{,/**},/b{,/**},/c{,/**}}"]
    assert said("dbus send path=/@{B2},", preamble=preamble) == ["send:@/x"]


@pytest.mark.parametrize(
    ("preamble", "problem"),
    [
        ("", "f:3: variable @{X} is not set"),
        ("@{X}=/@{Y}\n@{Y}=@{X}", "f:4: variable @{X} contains itself"),
        ("@{X}=@{X}", "f:3: variable @{X} contains itself"),
        ("@{X}={a", "f:1: '{' without '}'"),
        (
            "@{X}=@{A0}\n@{A60}=a\n" + "".join(f"@{{A{n}}}=@{{A{n + 1}}}\n" for n in range(60)),
            "f:65: more than 50 variables in each other",
        ),
    ],
)
def test_bad_variable_is_an_error(preamble: str, problem: str) -> None:
    with pytest.raises(ImportFileError) as caught:
        imported("dbus send path=/@{X},", preamble=preamble)
    assert str(caught.value) == problem


def test_one_profile_is_chosen() -> None:
    source = Source("f", "profile a { dbus send, }\nprofile b flags=(complain) { dbus receive, }")
    with pytest.raises(ImportFileError, match=r"f:2: choose a profile of these: a, b"):
        import_apparmor(source)
    with pytest.raises(ImportFileError, match="no profile 'c'"):
        import_apparmor(source, profile="c")
    with pytest.raises(ImportFileError, match="no profile in"):
        import_apparmor(Source("f", "# nothing"))
    got = import_apparmor(source, profile="b")
    assert [format_rule(rule) for rule in got.access.rules] == ["receive:"]
    assert "would not enforce" in got.unsaid[0].reason


def test_label_of_a_profile_that_is_no_snap_is_the_same_app() -> None:
    text = "@{N}=/usr/bin/x\nprofile @{N} {\n dbus send peer=(label=@{profile_name}), }"
    got = import_apparmor(Source("f", text))
    assert [format_rule(rule) for rule in got.access.rules] == ["send:*,peer=same-app"]


def test_a_profile_that_is_named_by_itself_is_refused() -> None:
    text = "profile @{profile_name} { dbus send peer=(label=@{profile_name}), }"
    with pytest.raises(ImportFileError, match="contains itself"):
        import_apparmor(Source("f", text))


def test_what_an_import_makes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apparmor, "MAX_UNSAID", 3)
    monkeypatch.setattr(apparmor, "MAX_RULES", 10)
    many = "\n".join(f"dbus send path=/{number}/," for number in range(9))
    got = imported(many).unsaid
    assert len(got) == 4
    assert "the report ends here" in got[-1].reason
    with pytest.raises(ImportFileError, match="more than 10 rules"):
        imported('dbus bind name="org.a{0,1,2,3,4,5}{6,7}",')
    monkeypatch.setattr(apparmor, "MAX_WRITTEN", 10)
    with pytest.raises(ImportFileError, match="f:3: its alternatives"):
        imported("dbus send path=/{a,b}{a,b},")


GENERATED = """
# This file is generated
#include <tunables/global>

@{SNAP_INSTANCE_NAME}="foo"
@{SNAP_REVISION}="x1"
@{INSTALL_DIR}="/{,var/lib/snapd/}snap"

profile "snap.foo.app" (attach_disconnected,mediate_deleted) {
  #include <abstractions/base>
  /etc/ld.so.preload r,
  owner @{PROC}/@{pid}/maps k,
  /usr/lib{,32,64}/python3.[0-9]/**.{pyc,so}           mr,
  owner @{HOME}/snap/@{SNAP_INSTANCE_NAME}/**          mrkix,
  deny /{,var/}run/utmp r,  # a comment, with a comma
  capability ipc_lock,
  unix (bind, listen) addr="@snap.@{SNAP_INSTANCE_NAME}.**",
  unix peer=(label=snap.@{SNAP_INSTANCE_NAME}.*),
  mount options=(rw, rbind) /a/{b,c}/ -> /tmp/d/,
  change_profile unsafe /** -> [^u/]**,
  set rlimit nproc <= 100,
  signal (receive, send) peer=snap.@{SNAP_INSTANCE_NAME}.*,
  ptrace (read, trace) peer=@{profile_name},
  network inet stream,
  rw /mode/first,
  "/a path/with blanks" r,
  /bin/x Px -> foo//{a,b},
  dbus (receive, send) peer=(label=snap.@{SNAP_INSTANCE_NAME}.*),
  dbus (send)
      bus=session
      path=/org/freedesktop/portal/{desktop,documents}{,/**}
      interface=org.freedesktop.portal.*
      peer=(name=org.freedesktop.portal.{Desktop}, label=unconfined),
}
"""
TUNABLES = (
    "@{PROC}=/proc/\n@{HOMEDIRS}=/home/\n@{HOME}=@{HOMEDIRS}/*/ /root/\n@{pid}={[1-9],[1-9][0-9]}\n"
)


def test_a_whole_profile_of_snapd() -> None:
    files = {
        "<tunables/global>": [Source("tunables", TUNABLES)],
        "<abstractions/base>": [Source("base", "abi <abi/3.0>,\n/dev/null rw,\n")],
    }
    with pytest.raises(ImportFileError, match=r"f:\d+: braces without ','"):
        import_apparmor(Source("f", GENERATED), resolve=files.get)
    text = GENERATED.replace("{Desktop}", "Desktop")
    got = import_apparmor(Source("f", text), resolve=files.get)
    assert got.unsaid == ()
    judge = Judge(got.access, bus="session", me=ME)
    portal = ("org.freedesktop.portal.Desktop",)
    path, interface = "/org/freedesktop/portal/desktop/x", "org.freedesktop.portal.FileChooser"
    assert judge.send(portal, path, interface, "Open", None).allowed
    assert not judge.send(portal, path, "org.freedesktop.DBus.Peer", "Ping", None).allowed
    assert not judge.send(("org.b",), path, interface, "Open", None).allowed
    assert not judge.send(portal, path, interface, "Open", Identity(type=SNAP, app="b")).allowed
    assert not judge.receive((":1.2",), path, interface, "Open", None, broadcast=False).allowed
    other = Identity(type=SNAP, app="foo", component="other")
    assert judge.receive((":1.2",), "/", None, "Open", other, broadcast=False).allowed


@pytest.mark.slow
def test_ten_megabytes_are_read() -> None:
    start, end = GENERATED.replace("{Desktop}", "Desktop").rsplit("}", 1)
    line = "  owner /usr/lib{,32}/x/** rk,\n" + "  /etc/some/file/with/a/name r,\n" * 100
    dbus = "  dbus send bus=system path=/a{number}{{,/**}} peer=(label=unconfined),\n"
    parts = [line + dbus.format(number=number) for number in range(10 * 2**20 // len(line))]
    got = import_apparmor(Source("f", f"{start}{''.join(parts)}}}{end}"))
    assert len(got.access.rules) == len(parts) + 2


def test_variables_may_not_grow_without_bound() -> None:
    doubled = "".join(f"@{{A{n + 1}}}=@{{A{n}}}@{{A{n}}}\n" for n in range(40))
    (only,) = reasons("dbus send path=/@{A40},", preamble=f"@{{A0}}=aa\n{doubled}")
    assert "too long" in only
    many = "@{A}=" + "a" * 100 + "\n@{B}=" + " ".join(f"@{{A}}{n}" for n in range(100))
    (only,) = reasons("dbus send path=/@{B},", preamble=many)
    assert "too long" in only
    assert said("dbus send path=/@{A}@{A},", preamble="@{A}=ab") == ["send:@/abab"]


WORDS = st.sampled_from(
    [
        *("dbus", "send", "receive", "bind", "eavesdrop", "session", "/a", "/a/**", "org.a"),
        *("bus=", "path=", "interface=", "member=", "name=", "peer=(", "label=", "priority", "=1"),
        *(")", "(", ",", "{", "}", '"', "#", "\\", "^", "=", "!", "\n", "\0", "org.a.*"),
        *('"{a,b}"', "{a,b}", "[a-c]", "[a", "@{X}", "@{X}=a", "@{X}+=b", "@{profile_name}", "$B"),
        *(
            "profile",
            "hat",
            "deny",
            "audit",
            "allow",
            "owner",
            "all",
            "if",
            "/x",
            "r",
            "capability",
        ),
        *("#include", "include", "<a>", "unconfined", "snap.a.b", "snap.a.*", "###A###"),
    ]
)


@given(st.lists(WORDS).map(" ".join), st.booleans())
def test_any_words_give_rules_or_the_error(words: str, inside: bool) -> None:
    text = f"profile p {{\n{words}\n}}" if inside else words
    files = {"<a>": [Source("a", "dbus send,\n")]}
    with contextlib.suppress(ImportFileError):
        got = import_apparmor(Source("f", text), resolve=files.get, known_labels=["snap.a.c"])
        Judge(got.access, bus="session", me=ME)  # all of its patterns are good


@given(st.text())
def test_any_text_gives_rules_or_the_error(text: str) -> None:
    for whole in (text, f"profile p {{ dbus {text}\n}}"):
        with contextlib.suppress(ImportFileError):
            import_apparmor(Source("f", whole))
