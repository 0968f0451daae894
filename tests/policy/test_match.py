"""Every row of the rule table, one at a time. The laws are in test_match_laws."""

import pytest

from policy import tables
from policy.globs import PatternError
from policy.match import Judge, NamesUsed, Verdict
from policy.rules import Access, AccessList, Identity, Rule
from policy.tables import MAX_KNOWN_NAMES, MAX_PATH
from policy.text import parse_rule

ME = Identity(type="io.snap", app="me", component="one")
MY_OTHER = Identity(type="io.snap", app="me", component="two")
FRIEND = Identity(type="io.snap", app="friend", component="ui")
FRIEND_PLAIN = Identity(type="io.snap", app="friend")
NAMESAKE = Identity(type="org.flatpak", app="me")


def judge(*rules: str, receive_from_host: bool = True, bus: str = "session") -> Judge:
    """Return the judge of these rules; `!` denies."""
    parsed = tuple(
        parse_rule(text.removeprefix("!"), deny=text.startswith("!"), origin="test")
        for text in rules
    )
    access = AccessList(rules=parsed, receive_from_host=receive_from_host)
    return Judge(access, bus=bus, me=ME)


def send(
    judge: Judge,
    name: str = "org.x",
    message: str = "/p org.i M",
    peer: Identity | None = None,
) -> bool:
    path, interface, member = message.split()
    return judge.send(
        {":1.7", name}, path, None if interface == "-" else interface, member, peer
    ).allowed


def test_no_rules_is_no_access() -> None:
    nobody = judge(receive_from_host=False)
    assert not send(nobody)
    assert not nobody.broadcast("/p", "org.i", "M").allowed
    assert not nobody.receive({":1.7"}, "/p", "org.i", "M", None, broadcast=False).allowed
    assert not nobody.own("org.x").allowed
    assert not nobody.see({"org.x"}, None).allowed
    assert not nobody.start(("org.x",), None).allowed
    assert not nobody.any_send
    assert not nobody.owner_matters


@pytest.mark.parametrize(
    ("rule", "message", "allowed"),
    [
        ("send:", "/p org.i M", True),
        ("send:org.x", "/p org.i M", True),
        ("send:org.x.*", "/p org.i M", True),
        ("send:org.?", "/p org.i M", True),
        ("send::1.7", "/p org.i M", True),
        ("send:org.y", "/p org.i M", False),
        ("send:org.x@/p", "/p org.i M", True),
        ("send:org.x@/p", "/p/q org.i M", False),
        ("send:org.x@/p/**", "/p/q org.i M", True),
        ("send:org.x:org.i.*", "/p org.i M", True),
        ("send:org.x:org.i.*", "/p org.j M", False),
        ("send:org.x:org.i.*", "/p - M", False),
        ("send:org.x:org.*.*", "/p org.i M", True),
        ("send:org.x:org.*.*", "/p - M", False),
        ("send:org.x:**.*", "/p - M", False),
        ("send:org.x:M", "/p - M", True),
        ("send:org.x:N", "/p - M", False),
        ("receive:org.x", "/p org.i M", False),
        ("own:org.x", "/p org.i M", False),
        ("see:org.x", "/p org.i M", False),
        ("send:org.x,bus=session", "/p org.i M", True),
        ("send:org.x,bus=system", "/p org.i M", False),
    ],
)
def test_each_condition(rule: str, message: str, allowed: bool) -> None:
    assert send(judge(rule), message=message) is allowed


@pytest.mark.parametrize(
    ("rule", "peers"),
    [
        ("send:org.x", [None, ME, MY_OTHER, FRIEND, FRIEND_PLAIN, NAMESAKE]),
        ("send:org.x,peer=host", [None]),
        ("send:org.x,peer=same-app", [ME, MY_OTHER]),
        ("send:org.x,peer=app:io.snap/friend", [FRIEND, FRIEND_PLAIN]),
        ("send:org.x,peer=app:io.snap/friend#ui", [FRIEND]),
        ("send:org.x,peer=app:org.flatpak/me", [NAMESAKE]),
    ],
)
def test_each_peer(rule: str, peers: list[Identity | None]) -> None:
    everybody = [None, ME, MY_OTHER, FRIEND, FRIEND_PLAIN, NAMESAKE]
    assert [peer for peer in everybody if send(judge(rule), peer=peer)] == peers


@pytest.mark.parametrize(
    ("rules", "message", "allowed"),
    [
        (["send:org.x:org.i.M"], "/p - M", False),
        (["send:org.x:M"], "/p - M", True),
        (["send:org.x", "!send:org.x:org.i.M"], "/p - M", False),
        (["send:org.x", "!send:org.x:org.i.M"], "/p - N", True),
        (["send:org.x", "!send::org.*.*"], "/p - M", False),
        (["send:org.x", "!send:org.*@/q:org.i.M"], "/p - M", True),
        (["send:org.x", "!send:org.*@/p:org.i.*"], "/p - M", False),
        (["send:org.x", "!send:org.y:org.i.M"], "/p - M", True),
        (["send:org.x", "!send::org.i.M,peer=same-app"], "/p - M", True),
    ],
)
def test_call_without_an_interface(rules: list[str], message: str, allowed: bool) -> None:
    # The service takes the member from any of its interfaces: a denial of one of them counts.
    assert send(judge(*rules), message=message) is allowed


def test_deny_beats_allow_and_says_so() -> None:
    both = judge("send:org.x", "!send:org.x:Bad")
    assert send(both)
    verdict = both.send({"org.x"}, "/p", "org.i", "Bad", None)
    assert verdict == Verdict(
        allowed=False,
        rule=parse_rule("send:org.x:Bad", deny=True, origin="test"),
        reason="denied by send:org.x:Bad (test)",
    )


def test_reasons_without_origin_and_without_rule() -> None:
    rule = parse_rule("own:org.x")
    owner = Judge(AccessList(rules=(rule,)), bus="session", me=ME)
    assert owner.own("org.x") == Verdict(allowed=True, rule=rule, reason="allowed by own:org.x")
    assert owner.own("org.y") == Verdict(
        allowed=False, rule=None, reason="no rule allows owning the name"
    )


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        (["send:"], True),
        (["send::org.i.M"], True),
        (["send:org.freedesktop.DBus:M"], True),
        (["send:org.x"], False),
        (["send:*"], False),
        (["send::N"], False),
        (["send:,peer=host"], True),
        (["send:", "!send::M"], False),
        (["send:", "!send::M,peer=host"], True),
        (["send:", "!send:org.x"], True),
        (["send:", "!send:org.freedesktop.DBus"], False),
    ],
)
def test_broadcasts_go_out_without_a_name(rules: list[str], allowed: bool) -> None:
    assert judge(*rules).broadcast("/p", "org.i", "M").allowed is allowed


@pytest.mark.parametrize(
    ("rules", "peer", "broadcast", "from_host", "allowed"),
    [
        ([], None, False, True, True),
        ([], None, False, False, False),
        ([], None, True, True, False),
        ([], FRIEND, False, True, False),
        (["!receive::M"], None, False, True, False),
        (["receive::M"], None, False, False, True),
        (["receive:org.x"], None, True, False, True),
        (["receive:org.x,peer=same-app"], FRIEND, False, True, False),
        (["receive:org.x,peer=app:io.snap/friend"], FRIEND, False, True, True),
    ],
)
def test_receiving(
    rules: list[str], peer: Identity | None, broadcast: bool, from_host: bool, allowed: bool
) -> None:
    receiver = judge(*rules, receive_from_host=from_host)
    verdict = receiver.receive({":1.7", "org.x"}, "/p", "org.i", "M", peer, broadcast=broadcast)
    assert verdict.allowed is allowed


TWIN = Identity(type=ME.type, app=ME.app)
OF_ANOTHER_TYPE = Identity(type="io.flat", app=ME.app, component=ME.component)
UNKNOWN = Identity(type="", app="")


@pytest.mark.parametrize(
    ("rules", "peer", "from_host", "allowed"),
    [
        ([], ME, True, True),
        ([], TWIN, True, True),
        ([], FRIEND, True, False),
        ([], OF_ANOTHER_TYPE, True, False),
        ([], UNKNOWN, True, False),
        ([], ME, False, False),
        (["receive:,peer=same-app"], TWIN, False, True),
        (["!receive::M"], ME, True, False),
        (["!receive:,peer=same-app"], TWIN, True, False),
    ],
)
def test_bug_1_own_connections_are_let_in_as_the_host_is(
    rules: list[str], peer: Identity, from_host: bool, allowed: bool
) -> None:
    receiver = judge(*rules, receive_from_host=from_host)
    what = ({":1.7"}, "/p", "org.i", "M", peer)
    assert receiver.receive(*what, broadcast=False).allowed is allowed
    assert receiver.receive(*what, broadcast=True).allowed is (allowed and not from_host)


@pytest.mark.parametrize(
    ("rules", "peer", "allowed"),
    [
        (["see:org.x"], None, True),
        (["see:"], None, True),
        (["see:,peer=host"], FRIEND, False),
        (["send:org.x@/elsewhere:org.i.M"], None, True),
        (["receive:org.*"], None, True),
        (["own:org.x"], None, True),
        (["send:"], None, False),
        (["send:org.x,peer=host"], FRIEND, False),
        (["send:org.x", "!see:org.x"], None, False),
        (["send:org.x", "!see:"], None, False),
        (["send:org.x", "!send:org.x"], None, True),
        (["send:org.x", "!see:org.x,peer=host"], FRIEND, True),
    ],
)
def test_sight(rules: list[str], peer: Identity | None, allowed: bool) -> None:
    assert judge(*rules).see({":1.7", "org.x"}, peer).allowed is allowed


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        (["send:org.x@/p:org.i.M"], True),
        (["send:,peer=host"], True),
        (["send:,peer=same-app"], False),
        (["see:org.x"], False),
        (["send:org.x", "!send:org.x@/p"], True),
        (["send:org.x", "!send:org.x"], False),
        (["send:org.x", "!send:"], False),
    ],
)
def test_starting_is_part_of_sending(rules: list[str], allowed: bool) -> None:
    assert judge(*rules).start(("org.x",), None).allowed is allowed


def test_names_used_are_those_of_this_bus() -> None:
    one = judge(
        "own:org.mine", "own+send:org.both", "!receive:org.a.*", "see:org.b,bus=system", "send:"
    )
    assert one.uses == NamesUsed(
        exact=frozenset({"org.mine", "org.both"}), subtrees=frozenset({"org.a"}), globs=False
    )
    assert judge("see:org.a-*").uses.globs


def test_seeing_by_peer_uses_all_names() -> None:
    assert judge("see:,peer=host").uses.globs
    assert judge("send:*,peer=host").uses.globs  # whoever is named may be seen
    assert not judge("see:", "send:,peer=host", "see:org.x,peer=host").uses.globs


def test_denying_sight_by_a_name_uses_all_names() -> None:
    """The owner of that name may have others, which no rule says."""
    assert judge("see:", "!see:org.a").uses.globs
    assert judge("send:*", "!see+send:org.a.*").uses.globs
    assert not judge("see:", "!send:org.a").uses.globs
    assert not judge("see:org.b", "!see:org.a").uses.globs
    assert not judge("send:", "!see:", "!see:org.a").uses.globs


def test_who_hears_a_broadcast_is_judged_by_its_peer() -> None:
    one = judge("send:,peer=app:org.t.T/a", "send:org.x:i.j.M", "!send::i.j.N,peer=app:org.t.T/a#c")
    other = Identity(type="org.t.T", app="b")
    friend, part = (Identity(type="org.t.T", app="a", component=c) for c in (None, "c"))
    assert one.restricts_broadcast_receivers
    assert one.broadcast("/p", "i.j", "M").allowed
    assert one.judge_broadcast_receiver("/p", "i.j", "M", friend).allowed
    assert not one.judge_broadcast_receiver("/p", "i.j", "M", other).allowed
    assert not one.judge_broadcast_receiver("/p", "i.j", "N", part).allowed
    assert not judge(
        "send:", "send:org.x,peer=host", "receive:,peer=host"
    ).restricts_broadcast_receivers


@pytest.mark.parametrize(
    ("rule", "matters"),
    [
        ("own:org.x", True),
        ("send:@/p", False),
        ("see:", False),
        ("send:org.x", True),
        ("!receive:org.x", True),
        ("receive:,peer=host", True),
    ],
)
def test_owners_matter_if_a_rule_asks_for_them(rule: str, matters: bool) -> None:
    assert judge(rule).owner_matters is matters


def test_a_list_of_denials_sends_nothing() -> None:
    assert not judge("!send:", "own:org.x").any_send
    assert judge("send:").any_send


@pytest.mark.parametrize("field", ["name", "path", "interface", "member"])
@pytest.mark.parametrize("access", list(Access))
@pytest.mark.parametrize("pattern", ["", "/a//b*"])
def test_a_list_with_a_bad_pattern_is_refused(field: str, access: Access, pattern: str) -> None:
    rule = Rule(access=frozenset({access}), **{field: pattern})  # type: ignore[arg-type]
    with pytest.raises(PatternError):
        Judge(AccessList(rules=(rule,)), bus="session", me=ME)


def test_too_long_a_path_is_refused_whatever_the_rules_say() -> None:
    open_house = judge("send:", "receive:")
    path = "/" + "a" * MAX_PATH
    assert send(open_house, message=f"{path[:-1]} org.i M")
    assert not send(open_house, message=f"{path} org.i M")
    assert not open_house.receive((), path, "org.i", "M", None, broadcast=False).allowed


def test_what_is_remembered_of_names_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_KNOWN_NAMES", 4)
    one = judge("send:org.x.*")
    for number in range(20):
        assert send(one, f"org.x.a{number}")
        assert not send(one, f"org.y.a{number}")
        assert len(one._tables._names._known) <= 4
    assert MAX_KNOWN_NAMES > 4
