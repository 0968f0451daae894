"""Options mean what facts about xdg-dbus-proxy say; what is exported and imported again means the same."""

import contextlib

import pytest
from hypothesis import given, strategies as st

from policy.exporters.xdg_dbus_proxy import Exported, export_options
from policy.importers.report import ImportFileError
from policy.importers.xdg_dbus_proxy import import_command_line, import_options
from policy.match import BUS_NAME, Judge
from policy.rules import Access, AccessList, Identity, Peer, Rule
from policy.text import format_rule, parse_rule

ME = Identity(type="org.flatpak", app="me")
OTHER = Identity(type="org.flatpak", app="other")
PROXY = "unix:path=/run/bus"


def judge(*options: str) -> Judge:
    return Judge(import_options(["--filter", *options]).access, bus="session", me=ME)


def sends(rule: str, path: str, interface: str | None, member: str) -> bool:
    one = judge(f"--call=org.a={rule}")
    return one.send(("org.a",), path, interface, member, None).allowed


@pytest.mark.parametrize(
    ("rule", "path", "interface", "member", "allowed"),
    [
        ("*", "/a", "x.Y", "M", True),
        ("*", "/a", None, "M", True),
        ("", "/a", None, "M", True),
        ("x.Y.*", "/a", "x.Y", "M", True),
        ("x.Y.*", "/a", "x.Y.Z", "M", False),
        ("x.Y.*", "/a", None, "M", False),
        ("x.Y.M", "/a", "x.Y", "M", True),
        ("x.Y.M", "/a", "x.Y", "N", False),
        ("x.Y", "/a", "x.Y", "M", False),
        ("w.x.Y", "/a", "w.x", "Y", True),
        ("*@/a", "/a", "x.Y", "M", True),
        ("@/a", "/a", "x.Y", "M", True),
        ("@/a", "/a/b", "x.Y", "M", False),
        ("*@/a/*", "/a", "x.Y", "M", True),
        ("*@/a/*", "/a/b/c", "x.Y", "M", True),
        ("*@/a/*", "/ab", "x.Y", "M", False),
        ("*@/*", "/", "x.Y", "M", True),
        ("*@/*", "/b/c", "x.Y", "M", True),
        ("*@", "/b/c", "x.Y", "M", True),
        ("@", "/b/c", "x.Y", "M", True),
        ("*.Foo", "/a", "x.Y", "M", True),
        ("x.*.M", "/a", "x.Y", "M", False),
        ("x.Y.M*", "/a", "x.Y", "Mx", False),
        ("x.Y.M@/a@/b", "/a", "x.Y", "M", False),
        ("x.Y.M@/a/*", "/a/b", "x.Y", "M", True),
        ("x", "/a", "x", "M", False),
        (".*", "/a", "x.Y", "M", False),
        ("@/a/", "/a", "x.Y", "M", False),
        ("@//*", "/a", "x.Y", "M", False),
    ],
)
def test_row_of_the_rule_grammar(
    rule: str, path: str, interface: str | None, member: str, allowed: bool
) -> None:
    assert sends(rule, path, interface, member) is allowed


def test_see_is_no_more_than_sight() -> None:
    one = judge("--see=org.a")
    assert one.see(("org.a",), None).allowed
    assert not one.send(("org.a",), "/", "x.Y", "M", None).allowed
    assert not one.start(("org.a",), None).allowed
    assert not one.own("org.a").allowed


def test_talk_sends_hears_and_starts() -> None:
    one = judge("--talk=org.a")
    assert one.see(("org.a",), None).allowed
    assert one.send(("org.a",), "/", None, "M", None).allowed
    assert one.start(("org.a",), None).allowed
    assert one.receive(("org.a",), "/", "x.Y", "S", None, broadcast=True).allowed
    assert not one.receive(("org.b",), "/", "x.Y", "S", None, broadcast=True).allowed
    assert one.receive(("org.b",), "/", "x.Y", "S", None, broadcast=False).allowed
    assert not one.own("org.a").allowed
    assert not one.send(("org.b",), "/", None, "M", None).allowed


def test_own_talks_as_well() -> None:
    one = judge("--own=org.a.*")
    assert one.own("org.a").allowed
    assert one.own("org.a.b.c").allowed
    assert not one.own("org.ab").allowed
    assert one.send(("org.a.b",), "/", None, "M", None).allowed


def test_call_makes_visible_and_broadcast_hears_only_what_it_says() -> None:
    one = judge("--call=org.a=x.Y.M", "--broadcast=org.b=@/b/*")
    assert one.see(("org.a",), None).allowed
    assert one.start(("org.a",), None).allowed
    assert not one.receive(("org.a",), "/", "x.Y", "S", None, broadcast=True).allowed
    assert one.see(("org.b",), None).allowed
    assert one.receive(("org.b",), "/b", "x.Y", "S", None, broadcast=True).allowed
    assert not one.receive(("org.b",), "/c", "x.Y", "S", None, broadcast=True).allowed
    assert not one.send(("org.b",), "/b", "x.Y", "S", None).allowed


def test_every_broadcast_goes_out_but_other_calls_to_the_bus_do_not() -> None:
    one = judge("--talk=org.freedesktop.DBus")
    assert one.broadcast("/", "x.Y", "S").allowed
    assert not one.send((BUS_NAME,), "/", "org.freedesktop.DBus", "ReloadConfig", None).allowed
    assert one.receive((BUS_NAME,), "/", BUS_NAME, "NameOwnerChanged", None, broadcast=True).allowed


def test_without_filter_everything_goes() -> None:
    access = import_options(["--talk=org.a", "--log"]).access
    one = Judge(access, bus="session", me=ME)
    assert one.send(("org.b",), "/", None, "M", OTHER).allowed
    assert one.own("org.b").allowed
    assert one.see(("org.b",), None).allowed


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--sloppy-names", "unique names"),
        ("--call=org.a=x.Y", "can match no message"),
        ("--call=org.*.b=*", "can match nothing"),
        ("--call=org..b=*", "left out"),
        ("--broadcast=org.a=*", "starting the service"),
    ],
)
def test_what_cannot_be_said_is_listed(option: str, reason: str) -> None:
    (only,) = import_options(["--filter", option]).unsaid
    assert reason in only.reason
    assert (only.line, only.text) == (2, option)


def test_a_rule_that_matches_nothing_still_shows_the_name() -> None:
    assert judge("--call=org.a=x.Y").see(("org.a",), None).allowed


@pytest.mark.parametrize("option", ["--call=org.*=*", "--call=:1.5=*", "--call=org.a-b=*"])
def test_names_of_filters_are_not_checked_as_others_are(option: str) -> None:
    imported = import_options(["--filter", option])
    assert not imported.unsaid
    assert len(imported.access.rules) == 3


@pytest.mark.parametrize(
    "option",
    [
        "--talk=*",
        "--talk=org.*",
        "--see=:1.5",
        "--own=",
        "--talk",
        "--call=org.a",
        "--broadcast=none",
        "--nonsense",
        "--args=3",
        "--fd=x",
        "org.a",
    ],
)
def test_bad_option_is_an_error(option: str) -> None:
    with pytest.raises(ImportFileError, match=r"^xdg-dbus-proxy:2: "):
        import_options(["--filter", option])


def test_a_command_line_has_several_buses() -> None:
    line = [
        "--fd=3",
        PROXY,
        "/s",
        "--filter",
        "--talk=org.a",
        "unix:path=/run/sys",
        "/t",
        "--filter",
    ]
    buses = {PROXY: "session", "unix:path=/run/sys": "system"}
    rules = import_command_line([*line, "--see=org.b"], bus_of=buses.__getitem__).access.rules
    plain = [(rule.bus, format_rule(rule)) for rule in rules if rule.name != BUS_NAME]
    assert plain == [
        ("session", "send+receive:org.a,bus=session"),
        ("system", "see:org.b,bus=system"),
    ]
    with pytest.raises(ImportFileError, match="no path"):
        import_command_line([PROXY, "--filter"], bus_of=buses.__getitem__)
    with pytest.raises(ImportFileError, match="stands after an address"):
        import_command_line(["--filter"], bus_of=buses.__getitem__)


def exported(*texts: str) -> Exported:
    rules = import_options(["--filter"]).access.rules
    rules += tuple(parse_rule(text.removeprefix("!"), deny=text[0] == "!") for text in texts)
    return export_options(AccessList(rules=rules), bus="session")


@pytest.mark.parametrize(
    ("rules", "options"),
    [
        (["see:org.a"], ["--see=org.a"]),
        (["send+receive:org.a"], ["--talk=org.a"]),
        (["send+receive+own:org.a.*"], ["--own=org.a.*"]),
        (["own:org.a.b", "send+receive:org.a.*"], ["--own=org.a.b", "--talk=org.a.*"]),
        (["send:org.a"], ["--call=org.a=*"]),
        (["send:org.*"], ["--call=org.*=*"]),
        (["send:org.a:x.Y.M"], ["--call=org.a=x.Y.M"]),
        (["send:org.a@/a:x.Y.*"], ["--call=org.a=x.Y.*@/a"]),
        (["send:org.a@/a{,/**}"], ["--call=org.a=@/a/*"]),
        (["send:org.a@{/,/**}"], ["--call=org.a=@/*"]),
        (["send:org.a:x.Y.{M,N}"], ["--call=org.a=x.Y.M", "--call=org.a=x.Y.N"]),
        (
            ["send+receive:org.a@/a"],
            ["--call=org.a=@/a", "--broadcast=org.a=@/a"],
        ),
        (["see:org.a,bus=session", "see:org.b,bus=system"], ["--see=org.a"]),
    ],
)
def test_rule_is_exported(rules: list[str], options: list[str]) -> None:
    got = exported(*rules)
    assert not got.refused
    assert [option for option in got.options if option != "--filter"] == options


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("!send:org.a", "a denial"),
        ("send:org.a,peer=host", "a peer"),
        ("send:,peer=same-app", "a peer"),
        ("send::x.Y.M", "no bus name"),
        ("send:org.a*", "a glob for a name"),
        ("own:org.a", "talking"),
        ("receive:org.a", "starting"),
        ("send+receive+own:org.*", "one element"),
        ("see:org.*", "one element"),
        ("send:org.a:M", "without an interface"),
        ("send:org.a@/a*", "a glob for its path"),
        ("send:org.a@/a/**", "without /a itself"),
        ("send:org.a:x.Y*.M", "a glob for its interface"),
        ("send:org.a:x.Y.M*", "a glob for its member"),
    ],
)
def test_what_the_options_cannot_say_is_refused(rule: str, reason: str) -> None:
    got = exported(rule)
    (refused,) = got.refused
    assert reason in refused.reason
    assert refused.rule is not None
    assert got.options == ("--filter",)


def test_what_is_below_a_name_cannot_be_heard_without_starting_it() -> None:
    got = exported("send:org.a", "receive:org.a.*")
    assert got.options == ("--filter", "--talk=org.a")
    (refused,) = got.refused
    assert "starting" in refused.reason


def test_what_the_proxy_always_does_must_be_in_the_list() -> None:
    got = export_options(AccessList(receive_from_host=False), bus="session")
    assert [each.rule for each in got.refused] == [None, None]
    everything = import_options([]).access
    assert export_options(everything, bus="session") == Exported(options=())


NAMES = st.sampled_from(["org.a", "org.a.b", "org.a.*", "org.b", "org.b.*", "org.c.d"])
FILTERS = st.sampled_from(
    ["*", "", "x.Y.*", "x.Y.M", "x.Y", "@/a", "*@/a/*", "@/*", "x.Y.M@/a/*", "*.M", "x.*.M", "@/b/"]
)
OPTIONS = st.one_of(
    st.builds("--{}={}".format, st.sampled_from(["see", "talk", "own"]), NAMES),
    st.builds("--{}={}={}".format, st.sampled_from(["call", "broadcast"]), NAMES, FILTERS),
    st.sampled_from(["--log", "--sloppy-names"]),
)
RULES = st.builds(
    Rule,
    access=st.sets(st.sampled_from(list(Access)), min_size=1).map(frozenset),
    name=st.one_of(st.none(), NAMES, st.just("org.*")),
    path=st.sampled_from([None, None, "/a", "/a{,/**}", "/a/*", "{/a,/b}"]),
    interface=st.sampled_from([None, "x.Y", "x.*", "{x.Y,x.Z}"]),
    member=st.sampled_from([None, None, "M", "{M,N}"]),
    bus=st.sampled_from([None, "session", "system"]),
    peer=st.sampled_from([None, None, None, Peer(kind="host")]),
    deny=st.sampled_from([False, False, False, True]),
)
QUESTIONS = st.tuples(
    st.sampled_from(["org.a", "org.a.b", "org.a.b.c", "org.b", "org.b.x", "org.c.d", BUS_NAME]),
    st.sampled_from(["/", "/a", "/a/b", "/ab", "/b"]),
    st.sampled_from([None, "x.Y", "x.Z", "x.Y.Z"]),
    st.sampled_from(["M", "N"]),
    st.sampled_from([None, OTHER]),
)
Question = tuple[str, str, str | None, str, Identity | None]


def answers(access: AccessList, question: Question) -> list[bool]:
    one = Judge(access, bus="session", me=ME)
    name, path, interface, member, peer = question
    verdicts = [
        one.send((name,), path, interface, member, peer),
        one.broadcast(path, interface, member),
        one.receive((name,), path, interface, member, peer, broadcast=False),
        one.receive((name,), path, interface, member, peer, broadcast=True),
        one.own(name),
        one.see((name,), peer),
        one.start((name,), peer),
    ]
    return [verdict.allowed for verdict in verdicts]


@given(st.lists(OPTIONS, max_size=5), QUESTIONS)
def test_options_that_are_exported_again_mean_the_same(
    options: list[str], question: Question
) -> None:
    access = import_options(["--filter", *options], bus="session").access
    got = export_options(access, bus="session")
    again = import_options(got.options, bus="session").access
    before, after = answers(access, question), answers(again, question)
    if got.refused:
        assert all(was or not now for was, now in zip(before, after, strict=True))
    else:
        assert before == after


@given(st.lists(RULES, max_size=4).map(tuple), QUESTIONS)
def test_rules_that_are_exported_mean_the_same(rules: tuple[Rule, ...], question: Question) -> None:
    access = AccessList(rules=import_options(["--filter"], bus="session").access.rules + rules)
    got = export_options(access, bus="session")
    if not got.refused:
        again = import_options(got.options, bus="session")
        assert not again.unsaid
        assert answers(access, question) == answers(again.access, question)


@given(st.lists(st.one_of(OPTIONS, st.text(), st.text().map("--call=".__add__))))
def test_any_options_give_rules_or_the_error(options: list[str]) -> None:
    with contextlib.suppress(ImportFileError):
        Judge(import_options(options).access, bus="session", me=ME)
