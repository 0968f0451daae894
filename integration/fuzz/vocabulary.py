"""What the state machine makes its messages and rules of: few words, so that they meet."""

from typing import Final

from hypothesis import strategies as st

from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL
from broker.wire.header import parse_header
from integration.fuzz.world import NAMES, PEERS, STRANGER
from policy.rules import Access, AccessList, Peer, Rule
from tests.helpers.messages import NO_REPLY, Message, big, call, changed, signal

PATHS: Final = ("/", "/a", "/a/b")
INTERFACES: Final = ("org.i", "org.i.j")
MEMBERS: Final = ("Get", "Set")
RULES: Final = st.builds(
    Rule,
    access=st.sets(st.sampled_from(list(Access)), min_size=1).map(frozenset),
    deny=st.sampled_from([False, False, True]),
    name=st.sampled_from([None, None, *NAMES, *PEERS, "org.a.*", "org.*", "*.c", "*"]),
    path=st.sampled_from([None, None, "/a", "/a{,/**}", "/*"]),
    interface=st.sampled_from([None, None, "org.i", "org.*"]),
    member=st.sampled_from([None, None, "Get", "S*"]),
    peer=st.sampled_from(
        [
            None,
            None,
            Peer(kind="host"),
            Peer(kind="same-app"),
            Peer(kind="app", type="org.test", app="other"),
        ]
    ),
)
# Rules at random allow little: half of the lists begin with one that allows much.
MUCH: Final = (Rule(access=frozenset({Access.SEND, Access.RECEIVE, Access.SEE})),)
LISTS: Final = st.builds(
    lambda first, more, receive: AccessList(rules=(*first, *more), receive_from_host=receive),
    st.sampled_from([(), MUCH]),
    st.lists(RULES, max_size=5),
    st.booleans(),
)
SERIALS: Final = st.one_of(
    st.integers(1, 30), st.integers(31, 99), st.integers(FIRST_GATE_SERIAL, FIRST_GATE_SERIAL + 20)
)
CALLS: Final = st.builds(
    call,
    SERIALS,
    st.sampled_from([*NAMES, *PEERS, STRANGER]),
    st.sampled_from(MEMBERS),
    path=st.sampled_from(PATHS),
    interface=st.sampled_from([None, *INTERFACES]),
    flags=st.sampled_from([0, 0, 0, 1, 2, 4, 7]),
)
SIGNALS: Final = st.builds(
    signal,
    SERIALS,
    st.sampled_from(MEMBERS),
    destination=st.sampled_from([None, None, *NAMES, *PEERS]),
    path=st.sampled_from(PATHS),
    interface=st.sampled_from(INTERFACES),
)
# What else may be said of a message without another meaning.
DRESSES: Final = st.sampled_from(
    [
        bytes,
        bytes,
        bytes,
        bytes,
        big,
        lambda message: changed(message, sender=":1.99"),
        lambda message: changed(message, extra={10: ("o", "/a"), 99: ("g", "u")}),
        lambda message: changed(message, reply_serial=3),
    ]
)
SIZES: Final = st.just([0]) | st.lists(st.integers(1, 60), min_size=1, max_size=3)
# What is said in every run, beside what is made up.
USUAL_CALLS: Final[tuple[tuple[bytes, object], ...]] = tuple(
    (call(1, name, "Get", path="/a", interface="org.i", flags=flags), dress)
    for name, flags, dress in (
        (":1.3", 0, bytes),  # first: it owns a name that nobody says
        ("org.a", 0, bytes),
        ("org.a", NO_REPLY, lambda message: changed(message, sender=STRANGER)),
        ("net.c", 0, big),
        (STRANGER, NO_REPLY, bytes),
    )
)
USUAL_SIGNALS: Final = tuple(
    (signal(1, "Get", path="/a", interface="org.i", sender=sender), sender) for sender in PEERS
)


def same(message: Message, made: bytes) -> bool:
    """Say whether what reached the bus is this message of the app."""
    mine, its = parse_header(made), message.header
    return (mine.type, mine.destination, mine.path, mine.interface, mine.member) == (
        its.type,
        its.destination,
        its.path,
        its.interface,
        its.member,
    )
