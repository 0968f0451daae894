"""A connection's state, written down and read by another process: nothing is lost, and nothing goes on differently."""

import copy
import struct
from collections.abc import Callable
from typing import Final

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from broker.control_protocol.messages import SandboxLimits, SandboxSpec
from broker.gate.dumps import (
    VERSION,
    BudgetDump,
    BusDump,
    CallDump,
    Fds,
    FilterDump,
    HandoverError,
    PlainCalls,
    RateLimitedLogDump,
    ReplierDump,
    ReplyAction,
    SandboxDump,
    unpack_rows,
)
from broker.gate.filter.bus_state import BusState
from broker.gate.filter.filter import Filter
from broker.gate.handover.channel import (
    Go,
    Offer,
    decode_header,
    decode_sandbox,
    decode_word,
    encode,
)
from broker.gate.name_ledger import NameLedger
from broker.wire import marshal
from broker.wire.errors import PeerProtocolError, PeerQuotaError
from broker.wire.header import parse_header
from broker.wire.interfaces import DRIVER
from tests.helpers.messages import (
    NO_REPLY,
    access,
    big,
    call,
    changed,
    driver_call,
    make_reply,
    signal,
)
from tests.helpers.modelbus import ABSENT, APP, ME, Dialogue, FakeHost, no_time

OWNERS: Final = {"org.a": ":1.2", "org.b": ":1.3", "org.sub.x": ":1.4"}
RULES: Final = (
    access("send:org.a", "receive:", "see:org.b", "own:org.mine.*"),
    access("send:", "receive:", "own:org.mine.one", deny=["send:org.b"]),
    access("see:org.sub.*", "send:org.sub.*", receive_from_host=False),
    access("see:", "send:org.a:org.example.I.Do", "own:org.mine.*", "send:*@/**"),
    access(),
)
LIMITS: Final = SandboxLimits(pending_calls=6, match_rules=4, names=2, tracked_names=2)
# What the app may say, by serial.
FROM_APP: Final[tuple[Callable[[int], bytes], ...]] = (
    lambda n: call(n, "org.a"),
    lambda n: call(n, "org.a", flags=NO_REPLY),
    lambda n: call(n, "org.b"),
    lambda n: call(n, "org.sub.x", signature="s", values=("x" * (n % 90),)),
    lambda n: call(n, "org.unknown"),
    lambda n: call(n, f"org.unknown{n % 3}"),
    lambda n: call(n, ":1.2"),
    lambda n: call(n, ":1.9"),
    lambda n: call(0xFFF00000 + n, "org.a"),
    lambda n: big(call(n, "org.a")),
    lambda n: changed(call(n, "org.a"), unix_fds=2),
    signal,
    lambda n: signal(n, destination="org.a"),
    lambda n: driver_call(n, "AddMatch", "s", ""),
    lambda n: driver_call(n, "AddMatch", "s", f"type='signal',member='M{n % 3}'"),
    lambda n: driver_call(n, "RemoveMatch", "s", ""),
    lambda n: driver_call(n, "RequestName", "su", f"org.mine.{'one' if n % 2 else 'two'}", 0),
    lambda n: driver_call(0xFFF00000 + n, "RequestName", "su", "org.mine.one", 0),
    lambda n: driver_call(n, "ReleaseName", "s", "org.mine.one"),
    lambda n: driver_call(n, "ListNames"),
    lambda n: driver_call(n, "GetNameOwner", "s", "org.b"),
    lambda n: driver_call(n, "NameHasOwner", "s", "org.unknown"),
    lambda n: driver_call(n, "StartServiceByName", "su", "org.sub.x", 0),
    lambda n: driver_call(n, "ListQueuedOwners", "s", "org.mine.one"),
    lambda n: marshal.make_return(n, reply_serial=max(n - 2, 1), destination=":1.2"),
)
# What others send to it.
FROM_BUS: Final[tuple[Callable[[int], bytes], ...]] = (
    lambda n: call(n, ME),
    lambda n: changed(call(n, ME), sender=":1.2"),
    lambda n: changed(call(n, ME), sender=":1.3", flags=NO_REPLY),
    lambda n: changed(call(n, ME), sender=":1.2", unix_fds=1),
    lambda n: signal(n, f"M{n % 3}", sender=":1.2"),
    lambda n: signal(n, sender=":1.9", destination=ME),
    lambda n: marshal.make_return(n, reply_serial=n % 7 + 1, destination=ME, sender=":1.2"),
    lambda n: signal(n, "NameLost", sender=DRIVER, interface=DRIVER, values=("org.mine.one",)),
)
# Most messages arrive whole.
CUTS: Final = st.one_of(st.just(1000), st.just(1000), st.integers(0, 300))
STEPS: Final = st.one_of(
    *[st.tuples(st.just("app"), st.sampled_from(FROM_APP), CUTS)] * 8,
    *[st.tuples(st.just("bus"), st.sampled_from(FROM_BUS), CUTS)] * 4,
    st.tuples(st.just("reply"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("use"), st.sampled_from(RULES), st.just(0)),
    *[
        st.tuples(
            st.just("change"),
            st.sampled_from([*OWNERS, "org.unknown"]),
            st.sampled_from(["", ":1.5", ":1.6"]),
        )
    ]
    * 3,
    # More than are followed.
    st.tuples(
        st.just("changes"), st.sampled_from([*OWNERS, "org.mine.one"]), st.sampled_from([2, 70])
    ),
    st.tuples(st.just("leave"), st.sampled_from([":1.2", ":1.4"]), st.just(0)),
    st.tuples(st.sampled_from(["pause", "step", "resume"]), st.just(0), st.just(0)),
)


class Player:
    """A dialogue with what its two ends have not sent yet: messages arrive cut in any place."""

    def __init__(self, talk: Dialogue) -> None:
        self.talk: Final = talk
        self.number = 10
        self.unsent = {"app": b"", "bus": b""}
        self.is_over = False

    def play(self, steps: list[tuple[str, object, object]]) -> None:
        for step in steps:
            if self.is_over:
                return
            self.number += 1
            try:
                self._do(*step)
            except (PeerProtocolError, PeerQuotaError) as exc:
                self.talk.host.closed.append(hash(str(exc)))
                self.is_over = True

    def _do(self, what: str, one: object, other: object) -> None:
        talk = self.talk
        if what in ("app", "bus"):
            self._send(what, one, other)  # type: ignore[arg-type]
        elif what == "reply" and talk.arrived:
            talk.deliver(make_reply(talk.arrived[-1], sender=":1.2", destination=ME))
        elif what == "use":
            talk.use(one)  # type: ignore[arg-type]
        elif what == "change":
            talk.change(str(one), str(other))
        elif what == "changes":
            assert isinstance(other, int)
            for number in range(other):
                talk.change(str(one), f":1.{100 + number}")
        elif what == "leave":
            talk.deliver(talk.model.leave(str(one)))
        elif what in ("pause", "resume"):
            talk.paused = what == "pause"
            talk.app()
        elif what == "step" and vars(talk)["_late"]:
            talk.step()

    def _send(self, end: str, make: Callable[[int], bytes], cut: int) -> None:
        message = make(self.number)
        fds = fds_of(message, self.number)
        # Descriptors come with the first bytes of their message, and it whole.
        cut = len(message) if fds else cut
        data = self.unsent[end] + message[:cut]
        self.unsent[end] = message[cut:]
        (self.talk.app if end == "app" else self.talk.deliver)(data, fds=fds)


def fds_of(message: bytes, number: int) -> list[int]:
    return [1000 + number * 10 + n for n in range(parse_header(message).unix_fds)]


def handed_over(player: Player) -> tuple[Player, FilterDump, BusDump]:
    """Return another one that goes on with what can be written down of this one, and what that was."""
    talk = player.talk
    fds = Fds()
    dump = msgspec.msgpack.decode(encode(talk.filter.dump(fds)), type=FilterDump)
    bus_dump = msgspec.msgpack.decode(encode(talk.bus.dump()), type=BusDump)
    bus = BusState(bus_dump.name, bus_dump.address, NameLedger(), ABSENT)
    bus.load(bus_dump)
    host = FakeHost(identity=talk.host.identity, limits=talk.host.limits)
    judging = Filter(bus, host, talk.state.judge, app_takes_fds=dump.app_takes_fds, clock=no_time)
    host.states.append(judging.state)
    bus.members.add(judging.state.verdicts)
    judging.load(dump, fds.all)
    if judging.state.unique_name:
        bus.set_broadcast_judge(judging.state.unique_name, judging.state.judge)
    twin = Dialogue.__new__(Dialogue)
    vars(twin).update(
        vars(talk)
        | {"bus": bus, "host": host, "filter": judging, "state": judging.state, "got": []}
        | {name: copy.deepcopy(vars(talk)[name]) for name in ("model", "_late")}
    )
    other = Player(twin)
    other.number, other.unsent = player.number, dict(player.unsent)
    return other, dump, bus_dump


@settings(max_examples=200)
@given(
    rules=st.sampled_from(RULES),
    before=st.lists(STEPS, min_size=5, max_size=40),
    after=st.lists(STEPS, max_size=15),
    hello=st.booleans(),
)
def test_another_goes_on_as_the_one_would_have(
    rules: object,
    before: list[tuple[str, object, object]],
    after: list[tuple[str, object, object]],
    hello: bool,
) -> None:
    talk = Dialogue(rules, owners=OWNERS, limits=LIMITS, hello=hello)  # type: ignore[arg-type]
    one = Player(talk)
    if not hello:
        talk.paused = True
        talk.app(driver_call(1, "Hello"))
    one.play(before)
    if one.is_over:
        return
    other, dump, bus_dump = handed_over(one)
    again = Fds()
    assert other.talk.filter.dump(again) == dump
    assert other.talk.bus.dump() == bus_dump
    assert other.talk.host.bytes_held == talk.host.bytes_held
    assert other.talk.filter.fds == talk.filter.fds
    assert other.talk.is_held() == talk.is_held()
    # What is remembered is not handed over: with it a message may go on while others wait.
    talk.state.verdicts.forget_all()
    talk.state.verdicts.bus_replies.clear()
    talk.state.verdicts.bus_reply_at.clear()
    talk.got.clear()
    talk.host.denials.clear()
    talk.host.closed.clear()
    for player in (one, other):
        player.play(after)
    assert [m.raw for m in other.talk.got] == [m.raw for m in talk.got]
    assert [m.fds for m in other.talk.got] == [m.fds for m in talk.got]
    assert [m.raw for m in other.talk.model.seen] == [m.raw for m in talk.model.seen]
    assert [m.fds for m in other.talk.model.seen] == [m.fds for m in talk.model.seen]
    assert other.talk.host.denials == talk.host.denials
    assert other.talk.host.closed == talk.host.closed
    if not one.is_over:
        ends = (Fds(), Fds())
        assert other.talk.filter.dump(ends[1]) == talk.filter.dump(ends[0])
        assert ends[0].all == ends[1].all


def test_a_reply_that_nobody_here_knows_to_deal_with_is_refused() -> None:
    talk = Dialogue(RULES[0], owners=OWNERS)
    dump = talk.filter.dump(Fds())
    for then in (
        ReplyAction("of-the-future"),
        ReplyAction("translate", (1,), ReplyAction("of-the-future")),
    ):
        calls = CallDump(serial=5, replier=ReplierDump(owner=":1.2"), action=then)
        strange = msgspec.structs.replace(
            dump, state=msgspec.structs.replace(dump.state, calls=(calls,))
        )
        new = Filter(talk.bus, FakeHost(), talk.state.judge, app_takes_fds=True, clock=no_time)
        with pytest.raises(ValueError, match="of-the-future"):
            new.load(strange, [])


def test_what_is_still_to_be_sent_is_not_handed_over() -> None:
    talk = Dialogue(RULES[0], owners=OWNERS)
    talk.filter.feed_app(call(5, "org.a"))
    with pytest.raises(HandoverError, match="to be sent"):
        talk.filter.dump(Fds())


def test_rules_that_ask_for_other_names_are_noticed() -> None:
    one, other = Dialogue(RULES[0], owners=OWNERS), Dialogue(RULES[4], owners=OWNERS)
    assert one.filter.fits_rules
    dump = one.filter.dump(Fds())
    new = Filter(other.bus, FakeHost(), other.state.judge, app_takes_fds=True, clock=no_time)
    new.load(dump, [])
    assert not new.fits_rules


def test_late_speakers_keep_their_rules() -> None:
    rules = access("send:org.example.*")
    talk = Dialogue(access("receive:"), owners=OWNERS)
    judge = Dialogue(rules).state.judge
    talk.bus.connected(":1.77", "c9", talk.host.identity)
    talk.bus.connected(":1.78", "c9", talk.host.identity)
    talk.bus.broadcast_judges.update({":1.77": judge, ":1.78": judge})
    talk.bus.gone(":1.77")
    talk.bus.gone(":1.78")
    dump = talk.bus.dump()
    assert len(dump.judges) == 1
    new = BusState(dump.name, dump.address, NameLedger(), ABSENT)
    new.load(dump)
    assert new.dump() == dump
    assert new.broadcast_judges[":1.77"] is new.broadcast_judges[":1.78"]
    assert new.broadcast_judges[":1.77"].access == judge.access


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"\x81\xa4type\xa3Xxx", encode(Go())[:-1]])
def test_nonsense_is_a_reason(data: bytes) -> None:
    for decode in (decode_word, decode_header, decode_sandbox):
        with pytest.raises(HandoverError):
            decode(data)


def test_a_word_is_read_as_it_was_said() -> None:
    offer = Offer(pid=1, reads=(VERSION, 7))
    assert decode_word(encode(offer)) == offer


def test_attack_c2_former_owners_beyond_those_that_are_followed_are_no_difference() -> None:
    talk = Dialogue(access("send:org.a", "own:org.a"), owners={"org.a": ":1.1"})
    talk.app(call(7, "org.a"))
    for number in range(170):
        talk.change("org.a", f":1.{number % 3 and number}")
        if number == 100:
            talk.app(call(8, "org.a"))
    one = Player(talk)
    for _ in range(3):  # and again and again
        other, dump, _ = handed_over(one)
        assert other.talk.filter.dump(Fds()) == dump
        one = other
    for serial, owner, good in ((7, ":1.1", True), (8, ":1.55", False), (8, ":1.160", True)):
        reply = marshal.make_return(9, reply_serial=serial, destination=ME, sender=owner)
        # The call's first owner, whoever came late enough, and nobody else.
        assert (one.talk.deliver(reply) != []) is good


def test_attack_c3_a_name_of_many_owners_is_written_once() -> None:
    """The size of a hand-over does not depend on how owners changed."""
    sizes = []
    for changes in (0, 60):
        talk = Dialogue(access("send:org.a"), owners={"org.a": ":1.1"})
        for number in range(3000):
            talk.filter.feed_app(call(10 + number, "org.a"))
            talk.state.to_bus.clear()
        for number in range(changes):
            talk.change("org.a", f":1.{number + 2}")
        sizes.append(len(encode(talk.filter.dump(Fds()))))
    assert sizes[0] < 3000 * 16 + 2000
    assert sizes[1] < sizes[0] + 60 * 40


def test_attack_c3_changes_between_calls_cost_a_few_bytes_each() -> None:
    talk = Dialogue(access("send:org.a"), owners={"org.a": ":1.1"})
    for number in range(1000):
        talk.filter.feed_app(call(10 + number, "org.a"))
        talk.state.to_bus.clear()
        talk.change("org.a", f":1.{number + 2}")
    assert len(encode(talk.filter.dump(Fds()))) < 1000 * 40


def _sandbox_dump() -> SandboxDump:
    return SandboxDump(
        spec=SandboxSpec(
            id="c1", identity=APP, uid=0, access=RULES[0], listeners=(), limits=SandboxLimits()
        ),
        guid="0",
        messages=BudgetDump(left=1, filled=0.0),
        limited_log=RateLimitedLogDump(second=0.0),
        reports_left=1,
    )


def test_rows_are_packed() -> None:
    plain = PlainCalls()
    for serial, owner, name, since in ((1, ":1.1", "a.b", 0), (0xFFFFFFFF, ":1.2", "", 77)):
        plain.add((serial, *plain.index(owner, name), since))
    dump = plain.dump()
    assert (dump.owners, dump.names) == ((":1.1", ":1.2"), ("a.b", ""))
    assert list(unpack_rows(dump.rows)) == [(1, 0, 0, 0), (0xFFFFFFFF, 1, 1, 77)]
    with pytest.raises(struct.error):
        list(unpack_rows(b"abc"))


def test_names_that_a_change_hides_are_told_in_one_order_on_either_side() -> None:
    """The order in which owners came is not handed over: `org.a` goes to another owner and back, behind `org.b`."""
    shown = access("send:org.a", "send:org.b")
    talk = Dialogue(shown, owners={"org.a": ":1.2", "org.b": ":1.3"}, limits=LIMITS)
    talk.subscribe()
    talk.change("org.a", ":1.4")
    talk.change("org.a", ":1.2")
    other, _, _ = handed_over(Player(talk))
    talk.got.clear()
    for each in (talk, other.talk):
        each.use(access("send:org.c"))
    assert [m.raw for m in other.talk.got] == [m.raw for m in talk.got]
    assert sum(m.header.member == "NameOwnerChanged" for m in talk.got) >= 2
