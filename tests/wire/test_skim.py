"""Headers that nobody reads: what is found in them, and at what cost."""

import struct
from typing import Any

import pytest
from dbus_next._private.marshaller import Marshaller
from dbus_next.signature import Variant
from hypothesis import given, strategies as st

from broker.wire import skim
from broker.wire.errors import PeerProtocolError
from broker.wire.header import (
    BUS_LIMITS,
    FIXED_SIZE,
    MAX_FIELDS,
    READ_LIMITS,
    Header,
    MessageType,
    measure_header,
    parse_header,
    serialise_header,
)
from broker.wire.skim import skim_header
from tests.helpers.messages import big, changed
from tests.wire.test_header import SENDER, Written, write, write_fields, write_fixed

LONG = "/" + "a" * (2 * MAX_FIELDS)
FOUND = ("little", "type", "serial", "body_length", "size", "sender", "destination", "unix_fds")


def header(**fields: object) -> Header:
    given_ = {"little": True, "flags": 0, "body_length": 0, "serial": 9, "sender": ":1.5"}
    return Header(**(given_ | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("little", [True, False])
@pytest.mark.parametrize("offset", [0, 5])
def test_who_and_what_is_found_behind_a_path_of_two_megabytes(little: bool, offset: int) -> None:
    call = header(
        little=little,
        type=MessageType.METHOD_CALL,
        path=LONG,
        interface="a.b",
        member="M",
        destination="org.example.App",
        signature="s",
        body_length=5,
        unix_fds=3,
    )
    raw = serialise_header(call, sender=True)
    with pytest.raises(PeerProtocolError):
        parse_header(raw, limits=READ_LIMITS)
    found = skim_header(bytes(offset) + raw, offset)
    assert found.path is None
    for name in FOUND:
        expected = len(raw) if name == "size" else getattr(call, name)
        assert getattr(found, name) == expected


def test_a_reply_says_what_it_answers() -> None:
    fields: tuple[Written, ...] = ((1, "o", LONG), SENDER, (5, "u", 77))
    assert skim_header(write(*fields, type=2)).reply_serial == 77
    assert skim_header(write(*fields, type=2, order=">")).reply_serial == 77


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("as", ["x" * 50] * 1000),
        ("a{sv}", {"a": Variant("t", 7), "b": Variant("(yas)", [1, ["c"]])}),
        ("at", []),
        ("aa(yv)", [[[1, Variant("s", "x")]], []]),
        ("v", Variant("v", Variant("(gat(o))", ["as", [1], ["/"]]))),
        ("(y(sb)gnx)", [1, ["a", True], "a{sv}", 2, 3]),
        ("d", 1.5),
        ("s", "\uffff"),
        ("aaa{ya{sv}}", [[], [{}], [{1: {"a": Variant("b", True)}}]]),
    ],
)
def test_values_of_any_type_are_jumped_over(kind: str, value: object) -> None:
    fields = [[200, Variant(kind, value)], [6, Variant("s", ":1.77")], [9, Variant("u", 2)]]
    # The array's length and its padding take eight bytes, as in the fixed part of a header.
    make: Any = Marshaller
    raw = bytes(make("a(yv)", [fields]).marshall())[8:]
    found = skim_header(write_fixed(len(raw)) + raw)
    assert (found.destination, found.unix_fds) == (":1.77", 2)


def test_what_is_no_name_is_not_told() -> None:
    for strange in ("nodots", "a..b", "org." + "x" * 300, "\xe9.b"):
        assert skim_header(write((7, "s", strange), (6, "s", ":1.2"))).sender is None


def test_sixty_four_megabytes_cost_no_more_than_the_steps_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = []
    spend = skim._Skim._spend

    def count(self: skim._Skim, many: int = 1) -> None:
        steps.append(many)
        spend(self, many)

    monkeypatch.setattr(skim._Skim, "_spend", count)
    fields, _ = BUS_LIMITS
    small = write_fields(((77, "y", b"\1"),)).ljust(8, b"\0")
    nested = write_fields(((77, "v" * 255, b"\xff" + b"v" * 255 + b"\0"),))
    one = struct.pack("<BBxxI", 77, 1, fields - 16).replace(b"\1\0\0", b"\1s\0", 1)
    for filling in (
        small * (fields // 8),
        nested * (fields // len(nested)),
        one.ljust(fields, b"a"),
    ):
        steps.clear()
        raw = write_fixed(fields) + filling.ljust(fields, b"\0")
        skim_header(raw)
        assert sum(steps[:-1]) <= skim.MAX_STEPS
        assert steps[-1] <= 256


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(PeerProtocolError):
        skim_header(write_fixed(BUS_LIMITS.fields + 1))


@given(st.binary(min_size=FIXED_SIZE, max_size=200))
def test_any_bytes_are_skimmed(data: bytes) -> None:
    data = b"l\x01\x00\x01" + data[4:12] + struct.pack("<I", len(data) - FIXED_SIZE) + data[16:]
    data += bytes(-len(data) % 8)
    try:
        measure_header(data, 0, BUS_LIMITS)
    except PeerProtocolError:
        return
    found = skim_header(data)
    try:
        parsed = parse_header(data)
    except PeerProtocolError:
        return
    for name in ("sender", "destination", "reply_serial", "unix_fds"):
        assert getattr(found, name) == getattr(parsed, name)


def test_both_byte_orders_say_the_same() -> None:
    raw = write((6, "s", ":1.2"), SENDER, (9, "u", 2))
    assert (
        skim_header(
            big(changed(write(*((1, "o", "/a"), (3, "s", "M")), SENDER), unix_fds=2))
        ).unix_fds
        == 2
    )
    assert skim_header(raw).unix_fds == 2
