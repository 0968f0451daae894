"""A connection that is not filtered: what is left of the gate's care."""

import random

import pytest
from hypothesis import given, strategies as st

from broker.control_protocol.messages import SandboxLimits
from broker.gate.filter.costs import JUDGED_COST
from broker.gate.output import Chunk
from broker.proxy import passthrough
from broker.proxy.passthrough import PassthroughFilter
from broker.wire import marshal
from broker.wire.errors import PeerProtocolError, PeerQuotaError
from broker.wire.header import parse_header
from broker.wire.interfaces import DRIVER
from policy.importers.xdg_dbus_proxy import everything
from policy.match import Judge
from policy.rules import AccessList
from tests.helpers.messages import NO_REPLY, big, call, changed, driver_call, signal
from tests.helpers.modelbus import APP, ME, FakeHost, make_bus

HELLO = driver_call(1, "Hello")
ANSWER = marshal.make_return(
    1, reply_serial=1, destination=ME, sender=DRIVER, signature="s", values=(ME,)
)


class Stage:
    """A passage, with what came out of it."""

    def __init__(
        self, *, hello: bool = True, takes_fds: bool = True, limits: SandboxLimits | None = None
    ) -> None:
        self.host = FakeHost(limits=limits or SandboxLimits())
        judge = Judge(AccessList(rules=(everything(None),)), bus="bus", me=APP)
        bus = make_bus()
        self.passage = PassthroughFilter(bus, self.host, judge, app_takes_fds=takes_fds)
        self.state = self.passage.state
        if hello:
            self.app(HELLO)
            self.bus(ANSWER)

    def app(self, data: bytes, *fds: int) -> list[tuple[bytes, tuple[int, ...]]]:
        """Let the app send; return what goes to the bus."""
        self.passage.feed_app(data, fds)
        return taken(self.state.to_bus)

    def bus(self, data: bytes, *fds: int) -> list[tuple[bytes, tuple[int, ...]]]:
        """Let the bus send; return what goes to the app."""
        self.passage.feed_bus(data, fds)
        return taken(self.state.to_app)


def taken(output: list[bytes | Chunk]) -> list[tuple[bytes, tuple[int, ...]]]:
    found = [(bytes(i.data), i.fds) if isinstance(i, Chunk) else (i, ()) for i in output]
    output.clear()
    return found


def joined(items: list[tuple[bytes, tuple[int, ...]]]) -> bytes:
    assert not any(fds for _, fds in items)
    return b"".join(data for data, _ in items)


def with_fds(message: bytes, count: int) -> bytes:
    return changed(message, unix_fds=count)


def test_hello_passes_and_its_answer_is_noticed() -> None:
    stage = Stage(hello=False)
    assert joined(stage.app(HELLO)) == HELLO
    assert stage.state.unique_name == ""
    assert joined(stage.bus(ANSWER)) == ANSWER
    assert stage.state.unique_name == ME
    assert stage.state.bus.identities  # the host was told


MESSAGES = (
    call(2, "org.a", values=("x",), signature="s"),
    call(2**32 - 1, "org.a"),
    call(3, None, "Ping"),
    signal(4, values=("news",)),
    big(call(5, "org.a", values=("x",), signature="s")),
    driver_call(6, "BecomeMonitor", flags=NO_REPLY),
    driver_call(1, "Hello"),
)


@given(st.lists(st.sampled_from(MESSAGES)), st.randoms(use_true_random=False))
def test_whatever_is_valid_passes_as_it_is(messages: list[bytes], chance: random.Random) -> None:
    data = b"".join(messages)
    for feed in (Stage().app, Stage().bus):
        left, out = data, b""
        while left:
            size = chance.randint(1, 400)
            out += joined(feed(left[:size]))
            left = left[size:]
        assert out == data


def test_what_the_app_made_up_is_left_out() -> None:
    good = call(7, "org.a", values=("x",), signature="s")
    for forged in (
        changed(good, sender=":9.9"),
        changed(good, extra={10: ("o", "/forged")}),
        changed(good, sender=":9.9", extra={200: ("s", "x")}),
    ):
        stage = Stage()
        for _ in range(2):  # nothing of it is remembered
            assert joined(stage.app(forged)) == good


def test_flags_that_are_unknown_are_left_out() -> None:
    good = call(7, "org.a")
    assert joined(Stage().app(good[:2] + b"\xf8" + good[3:])) == good


def test_unknown_types_are_left_out() -> None:
    stage = Stage()
    good = call(7, "org.a")
    assert joined(stage.app(good[:1] + b"\x09" + good[2:] + good)) == good


@pytest.mark.parametrize(
    "broken",
    [
        b"x" * 16,
        b"l\1\0\2" + bytes(12),
        call(0, "org.a"),
        b"l\1\0\1\0\0\0\xff\1\0\0\0\0\0\0\0",
    ],
)
def test_broken_messages_end_the_connection(broken: bytes) -> None:
    with pytest.raises(PeerProtocolError):
        Stage().app(broken)


def test_a_known_header_does_not_excuse_a_missing_body() -> None:
    stage = Stage()
    message = call(7, "org.a", values=("x",), signature="s")
    stage.app(message)
    header = parse_header(message)
    without = message[:4] + bytes(4) + message[8 : header.size]
    with pytest.raises(PeerProtocolError, match="body"):
        stage.app(without)


def test_known_headers_cost_less() -> None:
    stage = Stage()
    stage.passage.spent = 0
    stage.app(call(7, "org.a") * 3)
    assert stage.passage.spent == JUDGED_COST + 2


def test_what_is_remembered_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passthrough, "MAX_REMEMBERED", 4)
    stage = Stage()
    for number in range(20):
        message = call(7, f"org.a{number}")
        assert joined(stage.app(message)) == message
    assert len(stage.passage._clean) <= 4
    long = call(7, "org.a", path="/" + "x" * 600)
    assert joined(stage.app(long * 2)) == long * 2
    assert len(stage.passage._clean) <= 4


# -- descriptors --------------------------------------------------------------------------------------


def test_descriptors_stay_with_their_message() -> None:
    plain, one, two = call(7, "org.a"), with_fds(call(8, "org.a"), 1), with_fds(call(9, "org.a"), 2)
    for feed in (Stage().app, Stage().bus):
        assert feed(plain + one + two + plain, 100, 101, 102) == [
            (plain, ()),
            (one, (100,)),
            (two, (101, 102)),
            (plain, ()),
        ]
        assert joined(feed(plain)) == plain


def test_descriptors_come_before_the_end_of_their_message() -> None:
    message = with_fds(call(8, "org.a", values=("x" * 100,), signature="s"), 1)
    for feed in (Stage().app, Stage().bus):
        assert feed(message[:40], 100) == []
        assert feed(message[40:]) == [(message, (100,))]


def test_descriptors_that_no_message_names_end_the_connection() -> None:
    stage = Stage()
    with pytest.raises(PeerProtocolError):
        stage.app(call(7, "org.a"), 100)
    assert stage.passage.close() == [100]


def test_descriptors_do_not_go_to_a_later_message_of_the_same_read() -> None:
    stage = Stage()
    plain, later = call(7, "org.a"), with_fds(call(8, "org.a"), 1)
    assert stage.app(plain[:20], 100) == []
    with pytest.raises(PeerProtocolError, match="no message"):
        stage.app(plain[20:] + later)


def test_descriptors_that_are_missing_end_the_connection() -> None:
    with pytest.raises(PeerProtocolError):
        Stage().app(with_fds(call(7, "org.a"), 2), 100)


def test_descriptors_need_to_be_negotiated() -> None:
    with pytest.raises(PeerProtocolError, match="negotiated"):
        Stage(takes_fds=False).app(with_fds(call(7, "org.a"), 1), 100)


def test_an_app_without_descriptors_gets_none() -> None:
    stage = Stage(takes_fds=False)
    reply = marshal.make_return(
        5, reply_serial=7, destination=ME, sender=":1.2", signature="s", values=("x",)
    )
    ((error, fds),) = stage.bus(with_fds(reply, 1), 100)
    assert (parse_header(error).error_name or "").endswith("NotSupported")
    assert parse_header(error).reply_serial == 7
    assert not fds
    assert stage.bus(with_fds(signal(5, sender=":1.2"), 1), 101) == []
    asked = changed(with_fds(call(6, ME), 1), sender=":1.2")
    assert stage.bus(asked, 102) == []
    assert stage.bus(changed(asked, flags=NO_REPLY), 103) == []
    ((refused, _),) = taken(stage.state.to_bus)
    assert (parse_header(refused).reply_serial, parse_header(refused).destination) == (6, ":1.2")
    assert stage.host.closed == [100, 101, 102, 103]


# -- budgets ------------------------------------------------------------------------------------------


def test_a_message_over_the_budget_ends_the_connection() -> None:
    stage = Stage(limits=SandboxLimits(bytes_held=1000))
    message = call(7, "org.a", values=("x" * 5000,), signature="s")
    with pytest.raises(PeerQuotaError, match="bytes_held=1000"):
        stage.app(message[:100])


def test_what_is_held_is_counted_and_given_back() -> None:
    stage = Stage()
    message = call(7, "org.a", values=("x" * 5000,), signature="s")
    stage.app(message[:100])
    assert stage.host.bytes_held == 100
    assert stage.passage.from_app.unfinished
    assert joined(stage.app(message[100:])) == message
    assert stage.host.bytes_held == 0
    assert not stage.passage.from_app.unfinished
