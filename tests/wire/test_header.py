"""Headers: what both buses take is taken, all else is refused, and what is written is canonical."""

import contextlib
import dataclasses
import struct
from typing import Any

import pytest
from hypothesis import given, strategies as st

from broker.wire.errors import PeerProtocolError
from broker.wire.header import (
    APP_LIMITS,
    BUS_LIMITS,
    FIXED_SIZE,
    MAX_FIELDS,
    MAX_MESSAGE,
    READ_LIMITS,
    Field,
    Flag,
    Header,
    MessageType,
    measure,
    measure_header,
    parse_header,
    serialise_header,
)

PATH = (1, "o", "/a")
INTERFACE = (2, "s", "a.B")
MEMBER = (3, "s", "M")
ERROR_NAME = (4, "s", "a.E")
REPLY_SERIAL = (5, "u", 7)
DESTINATION = (6, "s", "a.b")
SENDER = (7, "s", ":1.5")
CALL = (PATH, MEMBER)

# A field as a test writes it: code, type, value; bytes are a value as it is on the wire.
Written = tuple[int, str, str | int | bytes]


def write_fields(fields: tuple[Written, ...], order: str = "<") -> bytes:
    out = b""
    for code, kind, value in fields:
        out += bytes(-len(out) % 8) + bytes((code, len(kind))) + kind.encode() + b"\0"
        if isinstance(value, int):
            out += struct.pack(order + "I", value)
        elif isinstance(value, str):
            out += struct.pack("B" if kind == "g" else order + "I", len(value.encode()))
            out += value.encode() + b"\0"
        else:
            out += value
    return out


def write_fixed(fields_length: int, *, order: str = "<", **other: int) -> bytes:
    values = {"endian": ord("l" if order == "<" else "B"), "type": 1, "flags": 0, "version": 1}
    values |= {"body_length": 0, "serial": 1} | other
    return struct.pack(order + "BBBBIII", *values.values(), fields_length)


def write(*fields: Written, order: str = "<", **other: int) -> bytes:
    raw = write_fields(fields, order)
    return write_fixed(len(raw), order=order, **other) + raw + bytes(-len(raw) % 8)


FULL: dict[str, Any] = {
    "flags": 3,
    "body_length": 5,
    "serial": 0xFFFFFFFF,
    "path": "/org/example/App",
    "interface": "org.example.App",
    "member": "Do",
    "destination": "org.example.App",
    "signature": "a{sv}h",
    "unix_fds": 2,
}


@pytest.mark.parametrize("little", [True, False])
def test_a_call_is_parsed_as_it_was_written(little: bool) -> None:
    raw = serialise_header(Header(little=little, type=MessageType.METHOD_CALL, **FULL))
    header = parse_header(raw)
    assert header == Header(little=little, type=1, size=len(raw), **FULL)
    assert measure(raw) == len(raw) + 5
    assert measure_header(raw) == len(raw)


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_place_of_the_reply_serial_is_told(order: str) -> None:
    raw = write(SENDER, REPLY_SERIAL, order=order, type=2)
    header = parse_header(b"12345" + raw, 5)
    assert header.reply_serial == 7
    at = header.reply_serial_at
    assert struct.unpack(order + "I", raw[at : at + 4]) == (7,)
    assert header.sender == ":1.5"
    assert parse_header(write(*CALL)).reply_serial_at == -1


@pytest.mark.parametrize("data", [bytes, bytearray, memoryview])
def test_headers_are_read_from_any_buffer_at_any_offset(data: type) -> None:
    raw = write(*CALL)
    assert parse_header(data(b"xyz" + raw + b"more"), 3) == parse_header(raw)
    assert measure(data(b"xyz" + raw), 3) == len(raw)


@pytest.mark.parametrize(
    ("type_", "fields"),
    [
        (1, CALL),
        (1, (DESTINATION, MEMBER, INTERFACE, PATH)),
        (2, (REPLY_SERIAL,)),
        (3, (REPLY_SERIAL, ERROR_NAME)),
        (4, (PATH, INTERFACE, MEMBER)),
        (1, (*CALL, (8, "g", ""))),
        (1, (*CALL, (9, "u", 0))),
        (1, (*CALL, ERROR_NAME, REPLY_SERIAL)),
        (1, ((6, "s", ":1.5"), *CALL)),
        (5, ()),
        (255, (PATH,)),
    ],
)
def test_messages_with_what_their_type_needs_are_taken(
    type_: int, fields: tuple[Written, ...]
) -> None:
    header = parse_header(write(*fields, type=type_))
    assert header.type == type_
    assert not header.has_unknown


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ((*CALL, PATH), "field 1 twice"),
        ((*CALL, DESTINATION, (6, "s", "c.d")), "field 6 twice"),
        ((*CALL, (6, "o", "/a")), "field 6 of type 'o'"),
        ((*CALL, (6, "as", 0)), "field 6 of type 'as'"),
        ((*CALL, (5, "s", "x")), "field 5 of type"),
        ((*CALL, (5, "t", bytes(12))), "field 5 of type"),
        ((*CALL, (5, "u", 0)), "REPLY_SERIAL 0"),
        ((*CALL, (0, "s", "x")), "field 0"),
        ((PATH,), "without MEMBER"),
        ((MEMBER,), "without PATH"),
        (((1, "o", "//a"), MEMBER), "field 1 is '//a'"),
        (((1, "o", "/a/"), MEMBER), "field 1 is"),
        (((1, "o", ""), MEMBER), "field 1 is"),
        (((1, "s", "/a"), MEMBER), "field 1 of type"),
        ((*CALL, (2, "s", "nodot")), "field 2 is"),
        ((PATH, (3, "s", "a.b")), "field 3 is"),
        ((PATH, (3, "s", "a" * 256)), "field 3 is"),
        ((*CALL, (4, "s", "e")), "field 4 is"),
        ((*CALL, (6, "s", "nodots")), "field 6 is"),
        ((*CALL, (6, "s", ":a..b")), "field 6 is"),
        ((*CALL, (6, "s", "a." + "b" * 254)), "field 6 is"),
        ((*CALL, (7, "s", "")), "field 7 is"),
        ((*CALL, (8, "g", "a")), "not a signature"),
        ((*CALL, (8, "g", "()")), "not a signature"),
        ((*CALL, (8, "g", "s")), "body"),
        ((*CALL, (6, "s", b"\3\0\0\0a\xff\xff\0")), "not UTF-8"),
        ((*CALL, (6, "s", b"\3\0\0\0a.bX")), "wrong NUL"),
        ((*CALL, (6, "s", b"\4\0\0\0a.b\0\0")), "wrong NUL"),
        ((*CALL, (6, "s", b"\xff\xff\xff\xffa.b\0")), "past the end"),
        ((*CALL, (6, "s", b"")), "past the end"),
        (((1, "o", "/org/freedesktop/DBus/Local"), MEMBER), "Local"),
        ((*CALL, (2, "s", "org.freedesktop.DBus.Local")), "Local"),
        ((*CALL, (10, "", b"")), "a variant of ''"),
        ((*CALL, (10, "ss", b"")), "a variant of 'ss'"),
        ((*CALL, (10, "o", "a")), "not an object path"),
        ((*CALL, (11, "v", b"\1v\0" * 80)), "too deep"),
    ],
)
def test_bad_fields_are_refused(fields: tuple[Written, ...], problem: str) -> None:
    with pytest.raises(PeerProtocolError, match=problem):
        parse_header(write(*fields))


@pytest.mark.parametrize(
    ("type_", "fields"),
    [
        (2, ()),
        (3, (REPLY_SERIAL,)),
        (3, (ERROR_NAME,)),
        (4, CALL),
        (4, (PATH, INTERFACE)),
        (4, (INTERFACE, MEMBER)),
    ],
)
def test_what_a_type_needs_must_be_there(type_: int, fields: tuple[Written, ...]) -> None:
    with pytest.raises(PeerProtocolError, match=f"type {type_} without"):
        parse_header(write(*fields, type=type_))


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"endian": 0}, "byte order 0x00"),
        ({"endian": ord("L")}, "byte order"),
        ({"version": 0}, "version 0"),
        ({"version": 2}, "version 2"),
        ({"type": 0}, "type or serial 0"),
        ({"serial": 0}, "type or serial 0"),
        ({"body_length": MAX_MESSAGE}, "body"),
        ({"body_length": 0xFFFFFFFF}, "body"),
    ],
)
def test_a_bad_beginning_is_refused_by_measure_and_parse(
    other: dict[str, Any], problem: str
) -> None:
    fields = write_fields(CALL)
    raw = write_fixed(len(fields), **other) + fields
    for function in (measure, measure_header, parse_header):
        with pytest.raises(PeerProtocolError, match=problem):
            function(raw)


def test_the_limits_are_the_last_values_taken() -> None:
    assert measure(write_fixed(0, body_length=MAX_MESSAGE - FIXED_SIZE)) == MAX_MESSAGE
    with pytest.raises(PeerProtocolError, match="body"):
        measure(write_fixed(1, body_length=MAX_MESSAGE - FIXED_SIZE))
    assert measure(write_fixed(MAX_FIELDS)) == MAX_FIELDS + FIXED_SIZE
    for length in (MAX_FIELDS + 1, 0xFFFFFFFF):
        with pytest.raises(PeerProtocolError, match="fields"):
            measure(write_fixed(length))


def test_what_a_bus_may_deliver_is_measured() -> None:
    fields, message = BUS_LIMITS
    assert measure(write_fixed(fields), limits=BUS_LIMITS) == fields + FIXED_SIZE
    assert measure_header(write_fixed(fields), limits=BUS_LIMITS) == fields + FIXED_SIZE
    most = write_fixed(0, body_length=message - FIXED_SIZE)
    assert measure(most, limits=BUS_LIMITS) == message
    for raw in (write_fixed(fields + 1), write_fixed(8, body_length=message - FIXED_SIZE)):
        with pytest.raises(PeerProtocolError):
            measure(raw, limits=BUS_LIMITS)


def test_what_an_app_may_send_is_read_with_what_a_bus_adds() -> None:
    room = MAX_FIELDS - len(write_fields((*CALL, (8, "g", ""))))
    long = write(*CALL[1:], (1, "o", "/" + "a" * (room - 20)))
    for limits in (APP_LIMITS, READ_LIMITS):
        parse_header(long, limits=limits)
    sent = serialise_header(
        dataclasses.replace(parse_header(long), sender=":" + "1.2" * 84),
        sender=True,
        extra={10: ("o", "/" + "c" * 254)},
    )
    assert len(sent) > MAX_FIELDS + FIXED_SIZE
    with pytest.raises(PeerProtocolError, match="fields of"):
        parse_header(sent)
    parse_header(sent, limits=READ_LIMITS)


@pytest.mark.parametrize(
    ("type_", "fields", "strange"),
    [
        (2, (REPLY_SERIAL,), (PATH, INTERFACE, MEMBER, ERROR_NAME)),
        (3, (REPLY_SERIAL, ERROR_NAME), (PATH, INTERFACE, MEMBER)),
        (1, CALL, (ERROR_NAME, REPLY_SERIAL)),
        (4, (PATH, INTERFACE, MEMBER), (ERROR_NAME, REPLY_SERIAL)),
    ],
)
def test_fields_of_other_types_are_told_and_not_written(
    type_: int, fields: tuple[Written, ...], strange: tuple[Written, ...]
) -> None:
    plain = parse_header(write(*fields, type=type_))
    assert not plain.has_misplaced
    for one in strange:
        header = parse_header(write(*fields, one, type=type_))
        assert header.has_misplaced
        assert serialise_header(header) == serialise_header(plain)


def test_a_body_without_signature_is_refused() -> None:
    with pytest.raises(PeerProtocolError, match="body without signature"):
        parse_header(write(*CALL, body_length=1))


@pytest.mark.parametrize("order", ["<", ">"])
def test_every_byte_of_padding_must_be_zero(order: str) -> None:
    fields = (PATH, MEMBER, (8, "g", "s"))
    raw = write(*fields, order=order, body_length=5)
    parse_header(raw)
    padding = [
        at
        for end in (write_fields(fields[:count], order) for count in (1, 2, 3))
        for at in range(FIXED_SIZE + len(end), FIXED_SIZE + (len(end) + 7 & ~7))
    ]
    assert len(padding) >= 3
    for at in padding:
        bad = bytearray(raw)
        bad[at] = 1
        with pytest.raises(PeerProtocolError, match="not zero"):
            parse_header(bad)


def test_a_header_cut_short_is_refused() -> None:
    raw = write(*CALL)
    for length in range(FIXED_SIZE, len(raw)):
        with pytest.raises(PeerProtocolError, match="cut short"):
            parse_header(raw[:length])


def test_an_empty_array_of_fields_is_no_crash() -> None:
    assert parse_header(write(type=9)).size == FIXED_SIZE
    with pytest.raises(PeerProtocolError, match="without PATH"):
        parse_header(write())


def test_a_field_array_that_ends_in_padding_is_refused() -> None:
    raw = write_fields(CALL)
    with pytest.raises(PeerProtocolError, match="past the end"):
        parse_header(write_fixed(len(raw) + 1) + raw + bytes(-len(raw) % 8))


def test_unknown_fields_are_checked_told_and_not_kept() -> None:
    fields: tuple[Written, ...] = (
        (10, "o", "/evil"),
        *CALL,
        (10, "o", "/evil"),
        (200, "a{sv}", b"\0" * 4),
        (255, "y", b"\7"),
    )
    header = parse_header(write(*fields))
    assert header.has_unknown
    assert serialise_header(header) == write(*CALL)


def test_thousands_of_fields_are_refused() -> None:
    # Eight bytes each: far below the limit on bytes.
    raw = write_fields(((77, "y", b"\1"),)).ljust(8, b"\0") * 20_000
    with pytest.raises(PeerProtocolError, match="too many values"):
        parse_header(write_fixed(len(raw)) + raw)


def test_sender_and_reply_serial_are_written_only_where_they_belong() -> None:
    call = parse_header(write(*CALL, SENDER, REPLY_SERIAL))
    assert serialise_header(call) == write(*CALL)
    assert serialise_header(call, sender=True) == write(*CALL, SENDER)
    reply = parse_header(write(SENDER, REPLY_SERIAL, type=2))
    assert serialise_header(reply) == write(REPLY_SERIAL, type=2)


def test_unknown_flags_are_masked() -> None:
    header = parse_header(write(*CALL, flags=0xFF))
    assert header.flags == 0xFF
    assert parse_header(serialise_header(header)).flags == 0x07
    assert sum(Flag) == 0x07


def test_extra_fields_follow_the_defined_ones() -> None:
    header = parse_header(write(*CALL))
    raw = serialise_header(header, extra={12: ("g", "as"), 10: ("o", "/c/c1"), 11: ("s", "x")})
    assert raw == write(*CALL, (10, "o", "/c/c1"), (11, "s", "x"), (12, "g", "as"))
    assert parse_header(raw).has_unknown


HEADERS = st.builds(
    Header,
    little=st.booleans(),
    type=st.sampled_from(MessageType),
    flags=st.integers(0, 7),
    body_length=st.just(0),
    serial=st.integers(1, 2**32 - 1),
    path=st.sampled_from(["/", "/a/b_1/c"]),
    interface=st.sampled_from(["a.b", "org.example.Long.Name"]),
    member=st.sampled_from(["M", "Member12"]),
    error_name=st.sampled_from(["a.b", "org.example.Error"]),
    destination=st.none() | st.sampled_from([":1.2", "a.b-c"]),
    reply_serial=st.integers(1, 2**32 - 1),
    unix_fds=st.integers(0, 16),
)


@given(HEADERS)
def test_what_is_written_is_parsed_again_and_is_its_own_canonical_form(header: Header) -> None:
    raw = serialise_header(header)
    assert len(raw) % 8 == 0
    parsed = parse_header(raw)
    assert serialise_header(parsed) == raw
    told: dict[str, Any] = {"size": len(raw), "reply_serial_at": parsed.reply_serial_at}
    if header.type in (MessageType.METHOD_CALL, MessageType.SIGNAL):
        told["reply_serial"] = None
    else:
        told |= {"path": None, "interface": None, "member": None}
    if header.type != MessageType.ERROR:
        told["error_name"] = None
    assert parsed == dataclasses.replace(header, **told)


@given(HEADERS, st.data())
def test_damage_is_refused_or_has_a_meaning_that_survives(
    header: Header, data: st.DataObject
) -> None:
    raw = bytearray(serialise_header(header))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PeerProtocolError):
        parsed = parse_header(raw)
        again = parse_header(serialise_header(parsed, sender=True))
        for field in ("path", "interface", "member", "error_name", "destination", "sender"):
            if not parsed.has_misplaced or getattr(again, field) is not None:
                assert getattr(again, field) == getattr(parsed, field)


@given(st.binary(min_size=FIXED_SIZE, max_size=120))
def test_any_bytes_are_a_header_or_refused(data: bytes) -> None:
    with contextlib.suppress(PeerProtocolError):
        parse_header(b"l\x01\x00\x01" + data[4:])


def test_the_enums_are_the_specification() -> None:
    assert [type_.name for type_ in MessageType] == [
        "METHOD_CALL",
        "METHOD_RETURN",
        "ERROR",
        "SIGNAL",
    ]
    assert [int(field) for field in Field] == list(range(1, 10))
