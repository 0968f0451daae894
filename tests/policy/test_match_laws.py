"""Judge agrees with a plain reading of docs/policy.md, and the laws of access lists hold."""

from hypothesis import given, strategies as st
from msgspec.structs import replace

from policy.globs import (
    compile_interface,
    compile_member_glob,
    compile_path,
    parse_name_pattern,
)
from policy.match import Judge
from policy.rules import Access, AccessList, Identity, Peer, Rule

ME = Identity(type="io.snap", app="me", component="one")
MY_OTHER = Identity(type="io.snap", app="me", component="two")
FRIEND = Identity(type="io.snap", app="friend", component="ui")
FRIEND_PLAIN = Identity(type="io.snap", app="friend")
NAMESAKE = Identity(type="org.flatpak", app="me")

NAMES = ["org.a", "org.a.b", "org.ab", "net.c", ":1.7", "org.freedesktop.DBus"]
PATHS = ["/", "/a", "/a/b"]
INTERFACES = ["org.i", "org.i.j", "net.k"]
MEMBERS = ["Get", "Set"]
IDENTITIES = [None, ME, MY_OTHER, FRIEND, FRIEND_PLAIN, NAMESAKE]
PEERS = [
    None,
    Peer(kind="host"),
    Peer(kind="same-app"),
    Peer(kind="app", type="io.snap", app="friend"),
    Peer(kind="app", type="io.snap", app="friend", component="ui"),
]
RULES = st.builds(
    Rule,
    access=st.sets(st.sampled_from(list(Access)), min_size=1).map(frozenset),
    deny=st.booleans(),
    bus=st.sampled_from([None, None, "session", "system"]),
    name=st.sampled_from([None, *NAMES, "org.a.*", "org.*", "org.a*", "*.?", "*"]),
    path=st.sampled_from([None, None, *PATHS, "/a{,/**}", "/*"]),
    interface=st.sampled_from([None, None, *INTERFACES, "org.*", "{net.k,org.i}"]),
    member=st.sampled_from([None, None, *MEMBERS, "G*"]),
    peer=st.sampled_from(PEERS),
)
LISTS = st.builds(
    AccessList,
    rules=st.lists(RULES, max_size=6).map(tuple),
    receive_from_host=st.booleans(),
)
QUESTIONS = st.tuples(
    st.sets(st.sampled_from(NAMES), min_size=1, max_size=3),
    st.sampled_from(PATHS),
    st.sampled_from([None, *INTERFACES]),
    st.sampled_from(MEMBERS),
    st.sampled_from(IDENTITIES),
)
Question = tuple[set[str], str, str | None, str, Identity | None]


def answers(access: AccessList, question: Question) -> dict[str, bool]:
    """Ask everything there is to ask."""
    one = Judge(access, bus="session", me=ME)
    names, path, interface, member, peer = question
    name = min(names)
    verdicts = {
        "send": one.send(names, path, interface, member, peer),
        "broadcast": one.broadcast(path, interface, member),
        "receive": one.receive(names, path, interface, member, peer, broadcast=False),
        "hear": one.receive(names, path, interface, member, peer, broadcast=True),
        "own": one.own(name),
        "see": one.see(names, peer),
        "start": one.start((name,), peer),
    }
    for verdict in verdicts.values():
        assert verdict.reason
        if verdict.rule is not None:
            assert verdict.rule in access.rules
            assert verdict.allowed is not verdict.rule.deny
    return {key: verdict.allowed for key, verdict in verdicts.items()}


def plain_answers(access: AccessList, question: Question) -> dict[str, bool]:
    """Answer the same by reading the list from top to bottom."""
    names, path, interface, member, peer = question
    first = {min(names)}
    rules = [rule for rule in access.rules if rule.bus in {None, "session"}]

    def message(rule: Rule) -> bool:
        return (
            (rule.path is None or bool(compile_path(rule.path)(path)))
            and (rule.member is None or bool(compile_member_glob(rule.member)(member)))
            and (
                rule.interface is None
                # A service takes the member from any of its interfaces, so what is denied may be meant.
                or (
                    rule.deny
                    if interface is None
                    else bool(compile_interface(rule.interface)(interface))
                )
            )
        )

    def named(rule: Rule, names: set[str]) -> bool:
        return rule.name is None or any(map(parse_name_pattern(rule.name).matches, names))

    def verdict(matching: list[Rule]) -> bool | None:
        return None if not matching else not any(rule.deny for rule in matching)

    def about(access: Access) -> list[Rule]:
        return [rule for rule in rules if access in rule.access]

    def whole(access: Access) -> bool | None:
        return verdict(
            [r for r in about(access) if message(r) and named(r, names) and is_peer(r.peer, peer)]
        )

    received = whole(Access.RECEIVE)
    is_us = peer is None or (peer.type, peer.app) == (ME.type, ME.app)
    by_default = is_us and access.receive_from_host
    return {
        "send": bool(whole(Access.SEND)),
        "broadcast": bool(
            verdict(
                [
                    rule
                    for rule in about(Access.SEND)
                    if message(rule)
                    and rule.name in {None, "org.freedesktop.DBus"}
                    and not (rule.deny and rule.peer)
                ]
            )
        ),
        "receive": by_default if received is None else received,
        "hear": bool(received),
        "own": bool(verdict([r for r in about(Access.OWN) if named(r, first)])),
        "see": bool(
            verdict(
                [
                    rule
                    for rule in rules
                    if (Access.SEE in rule.access or (rule.name is not None and not rule.deny))
                    and named(rule, names)
                    and is_peer(rule.peer, peer)
                ]
            )
        ),
        "start": bool(
            verdict(
                [
                    rule
                    for rule in about(Access.SEND)
                    if named(rule, first)
                    and is_peer(rule.peer, peer)
                    and not (rule.deny and (rule.path or rule.interface or rule.member))
                ]
            )
        ),
    }


def is_peer(wanted: Peer | None, peer: Identity | None) -> bool:
    if wanted is None:
        return True
    if wanted.kind == "host" or peer is None:
        return wanted.kind == "host" and peer is None
    if wanted.kind == "same-app":
        return (peer.type, peer.app) == (ME.type, ME.app)
    return (peer.type, peer.app) == (wanted.type, wanted.app) and (
        wanted.component in {None, peer.component}
    )


@given(LISTS, QUESTIONS)
def test_the_index_answers_as_a_plain_reading_does(access: AccessList, question: Question) -> None:
    assert answers(access, question) == plain_answers(access, question)


@given(LISTS, RULES, QUESTIONS)
def test_one_more_allow_rule_never_takes_access_away(
    access: AccessList, rule: Rule, question: Question
) -> None:
    more = AccessList(
        rules=(*access.rules, replace(rule, deny=False)), receive_from_host=access.receive_from_host
    )
    before, after = answers(access, question), answers(more, question)
    assert all(after[key] for key in before if before[key])


@given(LISTS, RULES, QUESTIONS)
def test_one_more_deny_rule_never_gives_access(
    access: AccessList, rule: Rule, question: Question
) -> None:
    more = AccessList(
        rules=(*access.rules, replace(rule, deny=True)), receive_from_host=access.receive_from_host
    )
    before, after = answers(access, question), answers(more, question)
    assert all(before[key] for key in after if after[key])


@given(LISTS, QUESTIONS, st.data())
def test_the_order_of_rules_means_nothing(
    access: AccessList, question: Question, data: st.DataObject
) -> None:
    rules = data.draw(st.permutations(access.rules))
    other = AccessList(rules=tuple(rules), receive_from_host=access.receive_from_host)
    assert answers(access, question) == answers(other, question)
