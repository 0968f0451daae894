"""Messages that are legal on the bus and not read here are left out alone."""

import struct
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from broker.gate.dumps import Fds, FilterDump
from broker.gate.filter.filter import Filter
from broker.gate.handover.channel import encode
from broker.wire import marshal
from broker.wire.errors import PeerProtocolError
from broker.wire.header import MAX_FIELDS, MessageType, parse_header
from broker.wire.interfaces import DRIVER
from broker.wire.reader import MAX_STEPS
from policy.tables import MAX_PATH
from tests.helpers.messages import NO_REPLY, access, big, call, changed, misplaced, signal
from tests.helpers.modelbus import ME, Dialogue, no_time
from tests.wire.test_header import write_fields

LIMITS_EXCEEDED = "org.freedesktop.DBus.Error.LimitsExceeded"
LONG = "/" + "a" * (2 << 20)
MANY = write_fields(((77, "y", b"\1"),)).ljust(8, b"\0") * MAX_STEPS


def with_many_fields(message: bytes) -> bytes:
    """Return a message with more values in its header than anybody counts, in front of what it says."""
    header = parse_header(message)
    (length,) = struct.unpack_from("<I", message, 12)
    start = message[:12] + struct.pack("<I", length + len(MANY))
    return start + MANY + message[16 : header.size] + message[header.size :]


UNREADABLE = {
    "long": lambda message: changed(message, path=LONG),
    "long, big-endian": lambda message: changed(big(message), path=LONG),
    "strange": lambda message: changed(message, extra={200: ("s", "\uffff")}),
}


def pieces(data: bytes, size: int = 65536) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@pytest.fixture
def talk() -> Dialogue:
    found = Dialogue(access("send:org.a", "receive:"), owners={"org.a": ":1.2"})
    found.subscribe()
    return found


@pytest.mark.parametrize("how", UNREADABLE)
@pytest.mark.parametrize("size", [300, 65536, 1 << 30])
def test_attack_c7_a_broadcast_is_dropped_and_told(talk: Dialogue, how: str, size: int) -> None:
    if size == 300 and how != "strange":
        size = 4096
    bad = UNREADABLE[how](signal(3, "Bad", sender=":1.9"))
    after = signal(4, "Good", sender=":1.9")
    got = [m for piece in pieces(bad + after, size) for m in talk.deliver(piece)]
    assert [m.header.member for m in got] == ["Good"]
    (denial,) = talk.host.denials
    assert (denial.direction, denial.kind) == ("receive", "signal")
    assert talk.filter.bus_is_clear


def test_attack_c7_none_of_a_long_broadcast_is_stored(talk: Dialogue) -> None:
    bad = changed(signal(3, "Bad", sender=":1.9", values=("x" * 3_000_000,)), path=LONG)
    most = 0
    for piece in pieces(bad):
        talk.deliver(piece)
        most = max(most, talk.filter.dump(Fds()).from_bus.held.__len__())
    assert most < 16
    assert talk.filter.bus_is_clear


@pytest.mark.parametrize("how", UNREADABLE)
def test_attack_c7_a_call_is_refused_towards_its_caller(talk: Dialogue, how: str) -> None:
    for number, flags in ((3, 0), (4, NO_REPLY)):
        bad = UNREADABLE[how](changed(call(number, ME, flags=flags), sender=":1.9"))
        assert [m for piece in pieces(bad) for m in talk.deliver(piece)] == []
    (error,) = [m.header for m in talk.model.seen]
    assert (error.error_name, error.reply_serial, error.destination) == (LIMITS_EXCEEDED, 3, ":1.9")
    assert len(talk.host.denials) == 2
    assert talk.state.pending.calls_to_app == set()


@pytest.mark.parametrize("how", UNREADABLE)
@pytest.mark.parametrize("type_", [MessageType.METHOD_RETURN, MessageType.ERROR])
def test_attack_c7_a_reply_is_replaced(talk: Dialogue, how: str, type_: int) -> None:
    talk.app(call(7, "org.a"))
    (asked,) = talk.arrived
    fields: dict[str, Any] = {
        "type": type_,
        "reply_serial": asked.header.serial,
        "error_name": "a.b",
    }
    reply = changed(call(9, ME, interface=None), sender=":1.2", **fields)
    bad = misplaced(reply, LONG) if how.startswith("long") else UNREADABLE[how](reply)
    (error,) = [m for piece in pieces(bad) for m in talk.deliver(piece)]
    assert (error.header.error_name, error.header.reply_serial) == (LIMITS_EXCEEDED, 7)
    assert error.header.sender == ":1.2"
    assert not talk.state.pending.calls_to_bus


def test_attack_c7_a_forged_reply_is_none_for_being_long(talk: Dialogue) -> None:
    talk.app(call(7, "org.a"))
    reply = changed(call(9, ME), sender=":1.66", type=2, reply_serial=talk.arrived[0].header.serial)
    assert talk.deliver(misplaced(reply, LONG)) == []
    assert 7 in talk.state.pending.calls_to_bus


def test_attack_c7_a_header_of_many_values_ends_nothing(talk: Dialogue) -> None:
    for message in (signal(3, sender=":1.9"), changed(call(4, ME), sender=":1.9")):
        assert talk.deliver(with_many_fields(message)) == []
    assert [m.header.member for m in talk.deliver(signal(5, "Good", sender=":1.9"))] == ["Good"]
    assert len(talk.host.denials) == 2


def test_attack_c7_descriptors_of_what_is_left_out_are_closed(talk: Dialogue) -> None:
    bad = changed(signal(3, sender=":1.9"), path=LONG, unix_fds=2)
    first, *rest = pieces(bad)
    talk.deliver(first, fds=(100, 101))
    assert talk.host.closed == [100, 101]
    talk.deliver(*rest)
    good = changed(signal(4, sender=":1.9"), unix_fds=1)
    (got,) = talk.deliver(good, fds=(102,))
    assert got.fds == (102,)
    strange = changed(call(5, ME), sender=":1.9", unix_fds=1, extra={200: ("s", "\uffff")})
    talk.deliver(strange, fds=(103,))
    assert talk.host.closed == [100, 101, 103]


def test_attack_c7_what_the_bus_itself_says_is_never_missed(talk: Dialogue) -> None:
    said = signal(
        3, "NameOwnerChanged", sender=DRIVER, interface=DRIVER, values=("a.b", "", ":1.7")
    )
    with pytest.raises(PeerProtocolError, match="the bus sent"):
        talk.deliver(changed(said, extra={200: ("s", "\uffff")}))


def test_attack_c7_a_bus_without_end_is_still_given_up(talk: Dialogue) -> None:
    with pytest.raises(PeerProtocolError, match="header fields"):
        talk.deliver(b"l\4\0\1" + struct.pack("<III", 0, 1, 1 << 27))


@pytest.mark.parametrize("kind", ["signal", "call"])
def test_attack_c7_another_gate_goes_on_in_the_middle(talk: Dialogue, kind: str) -> None:
    bad = signal(3, sender=":1.9") if kind == "signal" else changed(call(3, ME), sender=":1.9")
    first, second, *rest = pieces(changed(bad, path=LONG))
    talk.deliver(first)
    talk.deliver(second)
    dump = msgspec.msgpack.decode(encode(talk.filter.dump(Fds())), type=FilterDump)
    new = Filter(talk.bus, talk.host, talk.state.judge, app_takes_fds=True, clock=no_time)
    new.load(dump, [])
    for piece in (*rest, signal(4, "Good", sender=":1.9")):
        new.feed_bus(piece)
    (good,) = new.state.to_app
    assert isinstance(good, bytes)
    assert parse_header(good).member == "Good"


def test_attack_c7_a_reply_of_an_app_has_nothing_but_what_a_reply_needs(talk: Dialogue) -> None:
    long = "/" + "b" * (MAX_FIELDS - 300)
    for number, type_ in ((1, MessageType.METHOD_RETURN), (2, MessageType.ERROR)):
        talk.deliver(changed(call(number, ME), sender=":1.9"))
        fields: dict[str, Any] = {"type": type_, "reply_serial": number, "error_name": "a.b"}
        reply = changed(call(20 + number, ":1.9", interface=None), **fields)
        path = write_fields(((1, "o", long), (3, "s", "Do")))
        path += bytes(-len(path) % 8)
        (length,) = struct.unpack_from("<I", reply, 12)
        raw = reply[:12] + struct.pack("<I", length + len(path)) + path + reply[16:]
        assert parse_header(raw).path == long
        assert talk.app(raw) == []
        (sent,) = [m.header for m in talk.model.seen]
        assert (sent.path, sent.interface, sent.member) == (None, None, None)
        assert (sent.reply_serial, sent.size < 200) == (number, True)
        assert (sent.error_name is None) is (type_ == MessageType.METHOD_RETURN)
        assert not talk.state.verdicts.app_replies
        talk.model.seen.clear()


def test_attack_c7_what_an_app_may_send_is_judged_at_another(talk: Dialogue) -> None:
    room = MAX_FIELDS - parse_header(call(3, ME)).size - 300
    longest = changed(call(3, ME), path="/" + "b" * room)
    added = changed(longest, sender=":1." + "9" * 250, extra={10: ("o", "/" + "c" * 250)})
    assert parse_header(longest).path is not None
    assert talk.deliver(added) == []  # judged, and no rule matches a path of that length
    (error,) = [m.header.error_name for m in talk.model.seen]
    assert (error or "").endswith("AccessDenied")
    (denial,) = talk.host.denials
    assert len(denial.path) <= MAX_PATH
    reply = marshal.make_return(9, reply_serial=1, destination=ME, sender=":1.9")
    assert talk.deliver(reply) == []


def test_attack_c7_one_message_may_wait_however_large(talk: Dialogue) -> None:
    talk.paused = True
    talk.app(call(7, "org.unknown"))
    limit = talk.host.limits.bytes_queued
    large = signal(3, sender=":1.9", values=("x" * limit,))
    talk.deliver(large)
    assert [len(m.raw) for m in talk.resume() if m.header.type == MessageType.SIGNAL] == [
        len(large)
    ]
