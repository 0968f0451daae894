"""The short way: what may take it, and that whatever it does is what the filter would have done."""

import os
import socket
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings, strategies as st

from broker.control_protocol.messages import SandboxLimits
from broker.gate.filter.costs import BYTES_A_MESSAGE
from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL
from broker.gate.io.loop import Loop
from broker.gate.io.stream import SocketStream
from broker.gate.sandbox.budgets import MessageBudget
from broker.gate.sandbox.fast_path import Accounting, install_fast_path
from broker.gate.sandbox.meter import Meter
from broker.posix.descriptors import Ancillary
from broker.wire.header import parse_header
from broker.wire.interfaces import DRIVER
from broker.wire.marshal import make_error, make_return
from tests.helpers.messages import NO_REPLY, access, big, call, changed, signal
from tests.helpers.modelbus import ME, Dialogue

RULES = access("send:org.a", "send:", "receive:org.a", deny=["send:org.b"])
OWNERS = {"org.a": ":1.2", "org.b": ":1.3"}
LIMITS = SandboxLimits(pending_calls=8)


class Way:
    """A warmed-up filter between two sockets, in a loop, and what came to the link."""

    def __init__(self) -> None:
        self.talk = Dialogue(RULES, owners=OWNERS, limits=LIMITS)
        self.filter = self.talk.filter
        self.loop = Loop()
        self.budget = MessageBudget(1000)
        mine, self.app = _pair()
        yours, self.bus = _pair()
        self.app_pipe = SocketStream(self.loop, mine, _nothing, _nothing)
        self.bus_pipe = SocketStream(self.loop, yours, _nothing, _nothing)
        self.sent: list[tuple[str, bytes, int]] = []
        self.rests: list[tuple[SocketStream, bytes]] = []
        self.failures: list[Exception] = []
        self.meter = Meter(self.filter, self.budget)
        payers = Accounting(self.filter, self.budget, self.meter)
        install_fast_path(self, payers, self.app_pipe, self.bus_pipe)
        self.app_pipe.is_clear = self.bus_pipe.is_clear = True

    def app_sent(self, data: bytes, ancillary: Sequence[Ancillary], _flags: int) -> None:
        self._note("app", data, ancillary)

    def bus_sent(self, data: bytes, ancillary: Sequence[Ancillary], _flags: int) -> None:
        self._note("bus", data, ancillary)

    def _note(self, side: str, data: bytes, ancillary: Sequence[Ancillary]) -> None:
        _, fds = self.app_pipe.received(data, ancillary, 0)
        for fd in fds:
            os.close(fd)
        self.sent.append((side, data, len(fds)))

    def cut_short(self, stream: SocketStream, rest: bytes) -> None:
        self.rests.append((stream, rest))

    def failed(self, exc: Exception) -> None:
        self.failures.append(exc)

    def knows(self, *messages: bytes) -> None:
        """Have calls of the app judged the long way, and answered by the owner of org.a."""
        for message in messages:
            self.talk.app(message)
        for asked in [*self.talk.model.calls]:
            self.talk.reply(asked, sender=":1.2")
        self.talk.clear()

    def knows_reply(self, reply: bytes) -> None:
        """Have a reply of that shape looked at before."""
        self.talk.app(call(parse_header(reply).reply_serial or 0, "org.a"))
        self.talk.deliver(reply)
        self.talk.clear()

    def turn(self) -> None:
        self.loop.call_later(0, self.loop.stop)
        self.loop._running = True
        self.loop.run()

    def app_sends(self, data: bytes, fds: Sequence[int] = ()) -> bytes:
        """Return what came out at the bus."""
        socket.send_fds(self.app, [data], list(fds))
        self.turn()
        return _take(self.bus)

    def bus_sends(self, data: bytes) -> bytes:
        """Return what came out at the app."""
        self.bus.sendall(data)
        self.turn()
        return _take(self.app)

    def close(self) -> None:
        self.app_pipe.close()
        self.bus_pipe.close()
        self.app.close()
        self.bus.close()
        self.loop.close()


def _pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


def _take(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 20)
    except BlockingIOError:
        return b""


def _nothing() -> None:
    pass


def a_reply(to: int, *, sender: str = ":1.2", serial: int = 50, text: str = "") -> bytes:
    return make_return(
        serial,
        reply_serial=to,
        sender=sender,
        destination=ME,
        signature="s" if text else "",
        values=(text,) if text else (),
    )


@pytest.fixture
def way() -> Iterator[Way]:
    way = Way()
    way.knows(call(2, "org.a"), call(3, "org.a", flags=NO_REPLY), signal(4))
    yield way
    way.close()


def test_known_call_and_its_reply_pass(way: Way) -> None:
    assert way.app_sends(call(7, "org.a")) == call(7, "org.a")
    assert way.bus_sends(a_reply(7)) == a_reply(7)
    assert not way.sent
    assert not way.filter.state.pending.calls_to_bus


@pytest.mark.parametrize("message", [call(9, "org.a", flags=NO_REPLY), signal(9)])
def test_what_wants_no_reply_passes(way: Way, message: bytes) -> None:
    assert way.app_sends(message) == message
    assert not way.sent
    assert not way.filter.state.pending.calls_to_bus


def test_each_message_is_paid_for(way: Way) -> None:
    before = way.budget.left
    way.app_sends(call(7, "org.a"))
    way.app_sends(signal(8))
    assert way.budget.left == before - 2


def test_large_reply_is_counted_and_costs_nothing(way: Way) -> None:
    small, large = a_reply(7), a_reply(8, text="x" * 10 * BYTES_A_MESSAGE)
    way.knows_reply(large)
    way.app_sends(call(7, "org.a"))
    way.app_sends(call(8, "org.a"))
    before, counted = way.budget.left, way.meter.counted
    assert way.bus_sends(small) == small
    assert way.meter.answered == 0
    assert way.bus_sends(large) == large
    assert not way.sent
    assert way.budget.left == before
    assert (way.meter.counted - counted, way.meter.answered) == (10, 10)


def test_message_behind_which_the_bus_is_asked_goes_the_long_way(way: Way) -> None:
    way.meter.counted = way.meter.ask_from - 1
    assert way.app_sends(call(7, "org.a"))
    assert way.app_sends(call(8, "org.a")) == b""
    assert way.sent == [("app", call(8, "org.a"), 0)]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(call(7, "org.a", "Other"), id="unknown"),
        pytest.param(call(7, "org.b"), id="denied"),
        pytest.param(call(7, "org.a") * 2, id="two"),
        pytest.param(call(7, "org.a")[:-1], id="less-than-one"),
        pytest.param(call(7, "org.a")[:8], id="no-header"),
        pytest.param(call(FIRST_GATE_SERIAL, "org.a"), id="serial-of-the-gate"),
        pytest.param(changed(call(7, "org.a"), sender=":1.1"), id="sender"),
        pytest.param(big(call(7, "org.a")), id="big-endian"),
        pytest.param(b"", id="end"),
    ],
)
def test_anything_else_goes_the_long_way(way: Way, data: bytes) -> None:
    if data:
        assert way.app_sends(data) == b""
    else:
        way.app.shutdown(socket.SHUT_WR)
        way.bus_pipe.is_clear = False
        way.turn()
        assert [type(exc).__name__ for exc in way.failures] == ["StreamClosedError"]
        return
    assert way.sent == [("app", data, 0)]


def test_descriptors_go_the_long_way(way: Way) -> None:
    assert way.app_sends(call(7, "org.a"), [0, 1]) == b""
    assert way.sent == [("app", call(7, "org.a"), 2)]


def test_serial_that_waits_goes_the_long_way(way: Way) -> None:
    way.app_sends(call(7, "org.a"))
    assert way.app_sends(call(7, "org.a")) == b""
    assert len(way.sent) == 1


def test_no_more_calls_wait_than_may(way: Way) -> None:
    for serial in range(10, 10 + LIMITS.pending_calls):
        assert way.app_sends(call(serial, "org.a"))
    assert way.app_sends(call(99, "org.a")) == b""
    assert len(way.filter.state.pending.calls_to_bus) == LIMITS.pending_calls


def test_spent_budget_goes_the_long_way(way: Way) -> None:
    way.budget.left = 1
    assert way.app_sends(call(7, "org.a"))
    assert way.app_sends(call(8, "org.a")) == b""
    assert way.budget.left == 0


def test_nothing_overtakes_what_waits(way: Way) -> None:
    read: list[bytes] = []
    way.app_pipe.readable = lambda: read.append(way.app_pipe.read()[0])
    way.app_pipe.is_clear = False
    assert way.app_sends(call(7, "org.a")) == b""
    assert read == [call(7, "org.a")]


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(a_reply(7, sender=":1.3"), id="sender"),
        pytest.param(a_reply(8), id="serial"),
        pytest.param(
            make_error(5, reply_serial=7, name="a.b", text="c", sender=DRIVER), id="error"
        ),
        pytest.param(a_reply(7)[:-1], id="half"),
    ],
)
def test_reply_that_is_not_the_known_one_goes_the_long_way(way: Way, reply: bytes) -> None:
    way.app_sends(call(7, "org.a"))
    assert way.bus_sends(reply) == b""
    assert way.sent == [("bus", reply, 0)]
    assert 7 in way.filter.state.pending.calls_to_bus


def test_reply_is_let_through_once(way: Way) -> None:
    way.app_sends(call(7, "org.a"))
    assert way.bus_sends(a_reply(7))
    assert way.bus_sends(a_reply(7)) == b""


def test_rules_that_change_close_it(way: Way) -> None:
    way.talk.use(access())
    assert way.app_sends(call(7, "org.a")) == b""
    assert way.sent == [("app", call(7, "org.a"), 0)]


def test_call_to_the_app_and_its_reply_pass(way: Way) -> None:
    way.talk.deliver(changed(call(20, ME), sender=":1.2"))
    way.talk.app(make_return(30, reply_serial=20, destination=":1.2"))
    asking = changed(call(21, ME), sender=":1.2")
    answer = make_return(31, reply_serial=21, destination=":1.2")
    assert way.bus_sends(asking) == asking
    assert way.app_sends(answer) == answer
    assert not way.sent
    assert way.app_sends(answer) == b""  # nobody asks any more


def test_what_is_not_taken_is_handed_on(way: Way) -> None:
    body = ("x" * 60000,)
    way.knows(call(40, "org.a", signature="s", values=body))
    for serial in range(50, 58):
        way.app.sendall(call(serial, "org.a", signature="s", values=body))
        way.turn()
        if way.rests:
            break
    ((pipe, rest),) = way.rests
    assert pipe is way.bus_pipe
    assert call(serial, "org.a", signature="s", values=body).endswith(rest)
    assert rest


def test_other_end_that_is_gone_is_found_by_reading(way: Way) -> None:
    way.bus.close()
    way.app.sendall(call(7, "org.a"))
    way.bus_pipe.is_clear = False
    way.turn()
    assert not way.failures
    assert not way.rests


SMALL = st.integers(1, 12)
FROM_APP = st.one_of(
    st.builds(call, SMALL, st.sampled_from(["org.a", "org.b", ":1.2", ":1.9"])),
    st.builds(lambda n: call(n, "org.a", flags=NO_REPLY), SMALL),
    st.builds(signal, SMALL),
    st.builds(lambda n, to: make_return(n, reply_serial=to, destination=":1.2"), SMALL, SMALL),
)
FROM_BUS = st.one_of(
    st.builds(a_reply, SMALL, sender=st.sampled_from([":1.2", ":1.3", DRIVER])),
    st.builds(lambda n: changed(call(n, ME), sender=":1.2"), SMALL),
    st.builds(lambda n: signal(n, sender=":1.2"), SMALL),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.just("app"), FROM_APP) | st.tuples(st.just("bus"), FROM_BUS)))
def test_both_ways_agree(messages: list[tuple[str, bytes]]) -> None:
    """What the short way passes on, a filter of the same past passes on unchanged, and both go on alike."""
    way, beside = Way(), Dialogue(RULES, owners=OWNERS, limits=LIMITS)
    try:
        for side, message in messages:
            way.sent.clear()
            passed = way.app_sends(message) if side == "app" else way.bus_sends(message)
            state = beside.state
            if side == "app":
                beside.filter.feed_app(message)
                expected = state.to_bus
            else:
                beside.filter.feed_bus(message)
                expected = state.to_app
            if passed:
                assert expected == [message] == [passed]
            else:
                (way.filter.feed_app if side == "app" else way.filter.feed_bus)(message)
            for filter_ in (way.filter, beside.filter):
                filter_.state.to_bus.clear()
                filter_.state.to_app.clear()
            assert way.filter.state.pending.calls_to_bus.keys() == state.pending.calls_to_bus.keys()
            assert way.filter.state.pending.calls_to_app == state.pending.calls_to_app
    finally:
        way.close()
