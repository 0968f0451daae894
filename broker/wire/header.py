"""Message headers: measuring by the first 16 bytes, strict parsing, and canonical writing.

`parse_header` accepts headers that both dbus-daemon and dbus-broker accept, and raises
PeerProtocolError for all others. If a forwarding program and a bus read the same header
differently, access checks can be bypassed. `serialise_header` writes the fields that D-Bus defines
for a message's type and no others, whatever the parsed message had. Neither function looks into a
body.

Limits depend on the sender. An app is held to APP_LIMITS. A bus may deliver messages up to the
limits of the specification (BUS_LIMITS). Such a message is measured, so that only this message is
left out. Of these headers only headers within READ_LIMITS are parsed; skim.py reads the
necessary fields of larger headers.
"""

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple, cast

from broker.wire.errors import PeerProtocolError
from broker.wire.names import (
    Predicate,
    is_bus_name,
    is_error_name,
    is_interface,
    is_member,
    is_object_path,
)
from broker.wire.reader import Reader, skip_value

FIXED_SIZE: Final = 16
MAX_MESSAGE: Final = 2**27  # bytes, header included; the specification's limit
# The specification would allow 64 MiB. Real field arrays have a few hundred bytes, because names
# have at most 255. An object path of nearly this size is an attack on the parser.
MAX_FIELDS: Final = 2**20
# A bus adds SENDER to a message, and this program adds header field 10. Names have at most 255
# bytes.
BUS_ADDS: Final = 4096


class HeaderLimits(NamedTuple):
    """The largest sizes of a header's field array and of a whole message, in bytes."""

    fields: int
    message: int


APP_LIMITS: Final = HeaderLimits(MAX_FIELDS, MAX_MESSAGE)
# The specification's limit on arrays is the limit on the field array. A bus checks the limit before
# adding fields.
BUS_LIMITS: Final = HeaderLimits(2**26 + BUS_ADDS, MAX_MESSAGE + BUS_ADDS)
# Larger than APP_LIMITS, so that no app can make a message that grows too large at the bus.
READ_LIMITS: Final = HeaderLimits(MAX_FIELDS + BUS_ADDS, MAX_MESSAGE + BUS_ADDS)

_FIXED_LITTLE: Final = struct.Struct("<BBBBIII")
_FIXED_BIG: Final = struct.Struct(">BBBBIII")
_FIXED: Final = {ord("l"): _FIXED_LITTLE, ord("B"): _FIXED_BIG}
_VERSION: Final = 1
_KNOWN_FLAGS: Final = 0x07

LOCAL_PATH: Final = "/org/freedesktop/DBus/Local"
LOCAL_INTERFACE: Final = "org.freedesktop.DBus.Local"

Data = bytes | bytearray | memoryview


class MessageType(enum.IntEnum):
    """The types of messages. Messages of other types are ignored, not errors."""

    METHOD_CALL = 1
    METHOD_RETURN = 2
    ERROR = 3
    SIGNAL = 4


class Flag(enum.IntFlag):
    """Header flags. Unknown flags are not passed on."""

    NO_REPLY_EXPECTED = 0x1
    NO_AUTO_START = 0x2
    ALLOW_INTERACTIVE_AUTHORIZATION = 0x4


class Field(enum.IntEnum):
    """The header fields that D-Bus defines."""

    PATH = 1
    INTERFACE = 2
    MEMBER = 3
    ERROR_NAME = 4
    REPLY_SERIAL = 5
    DESTINATION = 6
    SENDER = 7
    SIGNATURE = 8
    UNIX_FDS = 9


_FIELD_TYPES: Final[Mapping[int, str]] = {
    Field.PATH: "o",
    Field.INTERFACE: "s",
    Field.MEMBER: "s",
    Field.ERROR_NAME: "s",
    Field.REPLY_SERIAL: "u",
    Field.DESTINATION: "s",
    Field.SENDER: "s",
    Field.SIGNATURE: "g",
    Field.UNIX_FDS: "u",
}

_GRAMMAR: Final[Mapping[int, Predicate]] = {
    Field.PATH: is_object_path,
    Field.INTERFACE: is_interface,
    Field.MEMBER: is_member,
    Field.ERROR_NAME: is_error_name,
    Field.DESTINATION: is_bus_name,
    Field.SENDER: is_bus_name,
}

_REQUIRED: Final[Mapping[int, tuple[Field, ...]]] = {
    MessageType.METHOD_CALL: (Field.PATH, Field.MEMBER),
    MessageType.METHOD_RETURN: (Field.REPLY_SERIAL,),
    MessageType.ERROR: (Field.ERROR_NAME, Field.REPLY_SERIAL),
    MessageType.SIGNAL: (Field.PATH, Field.INTERFACE, Field.MEMBER),
}

# Fields that have a meaning only in messages of some types.
_BELONGS: Final[Mapping[int, frozenset[int]]] = {
    Field.PATH: frozenset({MessageType.METHOD_CALL, MessageType.SIGNAL}),
    Field.INTERFACE: frozenset({MessageType.METHOD_CALL, MessageType.SIGNAL}),
    Field.MEMBER: frozenset({MessageType.METHOD_CALL, MessageType.SIGNAL}),
    Field.ERROR_NAME: frozenset({MessageType.ERROR}),
    Field.REPLY_SERIAL: frozenset({MessageType.METHOD_RETURN, MessageType.ERROR}),
}

NO_EXTRA: Final[Mapping[int, tuple[str, str]]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A parsed header. Positions count from the start of the message."""

    little: bool
    type: int
    flags: int
    body_length: int
    serial: int
    path: str | None = None
    interface: str | None = None
    member: str | None = None
    error_name: str | None = None
    destination: str | None = None
    sender: str | None = None
    signature: str = ""
    reply_serial: int | None = None
    unix_fds: int = 0
    reply_serial_at: int = -1  # position of the value's four bytes; -1: no such field
    has_unknown: bool = False  # has fields that D-Bus does not define, to be stripped
    has_misplaced: bool = False  # has fields that D-Bus defines for other message types
    size: int = 0  # of the header with padding: the position of the body


def measure(data: Data, offset: int = 0, limits: HeaderLimits = APP_LIMITS) -> int:
    """Return the length of the message whose first 16 bytes are at `offset`.

    The caller makes sure that 16 bytes are there. Raises PeerProtocolError for bytes that cannot
    begin a message, and for messages above the limits.
    """
    _, _, _, body_length, _, fields_length = unpack_fixed(data, offset, limits)
    return FIXED_SIZE + (fields_length + 7 & ~7) + body_length


def measure_header(data: Data, offset: int = 0, limits: HeaderLimits = APP_LIMITS) -> int:
    """Return the length of the header, padding included. Raises as `measure`."""
    _, _, _, _, _, fields_length = unpack_fixed(data, offset, limits)
    return FIXED_SIZE + (fields_length + 7 & ~7)


def parse_header(data: Data, offset: int = 0, limits: HeaderLimits = APP_LIMITS) -> Header:
    """Return the header at `offset`. Raises PeerProtocolError for an invalid header.

    The whole header must be present; the body may be missing.
    """
    little, type_, flags, body_length, serial, fields_length = unpack_fixed(data, offset, limits)
    size = FIXED_SIZE + (fields_length + 7 & ~7)
    # The header is copied, so that positions count from the start of the message as alignment does.
    raw = bytes(data[offset : offset + size])
    if len(raw) < size:
        raise PeerProtocolError("a header that is cut short")
    end = FIXED_SIZE + fields_length
    reader = Reader(raw, little=little, at=FIXED_SIZE, end=end)
    fields, reply_serial_at, has_unknown = _parse_fields(reader)
    if any(raw[end:]):
        raise PeerProtocolError("padding behind the header is not zero")
    _check_fields(type_, body_length, fields)
    text = cast("Mapping[int, str]", fields)
    number = cast("Mapping[int, int]", fields)
    return Header(
        little=little,
        type=type_,
        flags=flags,
        body_length=body_length,
        serial=serial,
        path=text.get(Field.PATH),
        interface=text.get(Field.INTERFACE),
        member=text.get(Field.MEMBER),
        error_name=text.get(Field.ERROR_NAME),
        destination=text.get(Field.DESTINATION),
        sender=text.get(Field.SENDER),
        signature=text.get(Field.SIGNATURE, ""),
        reply_serial=number.get(Field.REPLY_SERIAL),
        unix_fds=number.get(Field.UNIX_FDS, 0),
        reply_serial_at=reply_serial_at,
        has_unknown=has_unknown,
        has_misplaced=any(
            type_ not in belongs for code, belongs in _BELONGS.items() if code in fields
        ),
        size=size,
    )


def serialise_header(
    header: Header,
    *,
    extra: Mapping[int, tuple[str, str]] = NO_EXTRA,
    sender: bool = False,
) -> bytes:
    """Return the canonical bytes of a header in the header's byte order, padded for the body.

    SENDER is written only with `sender`. Other fields are written only in messages of types for
    which D-Bus defines the field. `extra`, code -> (type, text), follows the defined fields.
    """
    out = bytearray(FIXED_SIZE)
    order = "<" if header.little else ">"
    values: tuple[tuple[int, str | int | None], ...] = (
        (Field.PATH, header.path),
        (Field.INTERFACE, header.interface),
        (Field.MEMBER, header.member),
        (Field.ERROR_NAME, header.error_name),
        (Field.REPLY_SERIAL, header.reply_serial),
        (Field.DESTINATION, header.destination),
        (Field.SENDER, header.sender if sender else None),
        (Field.SIGNATURE, header.signature or None),
        (Field.UNIX_FDS, header.unix_fds or None),
    )
    for code, value in values:
        if value is not None and header.type in _BELONGS.get(code, (header.type,)):
            _append_field(out, order, code, (_FIELD_TYPES[code], value))
    for code, typed in sorted(extra.items()):
        assert code not in _FIELD_TYPES
        _append_field(out, order, code, typed)
    fields_length = len(out) - FIXED_SIZE
    fixed = _FIXED_LITTLE if header.little else _FIXED_BIG
    fixed.pack_into(
        out,
        0,
        ord("l") if header.little else ord("B"),
        header.type,
        header.flags & _KNOWN_FLAGS,
        _VERSION,
        header.body_length,
        header.serial,
        fields_length,
    )
    out += bytes(-len(out) % 8)
    return bytes(out)


def unpack_fixed(
    data: Data, offset: int, limits: HeaderLimits
) -> tuple[bool, int, int, int, int, int]:
    """Return the values of the fixed header, checked against the limits.

    The values are: whether the message is little-endian, type, flags, body length, serial, and
    the length of the field array.
    """
    fixed = _FIXED.get(data[offset])
    if fixed is None:
        raise PeerProtocolError(f"byte order {data[offset]:#04x}")
    endian, type_, flags, version, body_length, serial, fields_length = fixed.unpack_from(
        data, offset
    )
    if version != _VERSION:
        raise PeerProtocolError(f"protocol version {version}")
    if type_ == 0 or serial == 0:
        raise PeerProtocolError("a message with type or serial 0")
    # Both limits are checked first, so no later sum can be large.
    if fields_length > limits.fields:
        raise PeerProtocolError(f"header fields of {fields_length} bytes")
    if FIXED_SIZE + (fields_length + 7 & ~7) + body_length > limits.message:
        raise PeerProtocolError(f"a message with {body_length} bytes of body")
    return endian == ord("l"), type_, flags, body_length, serial, fields_length


def _parse_fields(reader: Reader) -> tuple[dict[int, str | int], int, bool]:
    fields: dict[int, str | int] = {}
    reply_serial_at = -1
    has_unknown = False
    while reader.at < reader.end:
        reader.spend()
        reader.align(8)
        code = reader.byte()
        kind = reader.variant_type()
        expected = _FIELD_TYPES.get(code)
        if expected is None:
            if code == 0:
                raise PeerProtocolError("header field 0")
            has_unknown = True
            # Three containers surround the value: the array of fields, the element, and this
            # variant.
            skip_value(reader, kind, depth=2)
            continue
        if kind != expected:
            raise PeerProtocolError(f"header field {code} of type {kind[:40]!r}")
        if code in fields:
            raise PeerProtocolError(f"header field {code} twice")
        if code == Field.REPLY_SERIAL:
            reply_serial_at = reader.at
        fields[code] = _read_field(reader, code, kind)
    return fields, reply_serial_at, has_unknown


def _read_field(reader: Reader, code: int, kind: str) -> str | int:
    if kind == "u":
        return reader.uint32()
    if kind == "g":
        return reader.signature()
    text = reader.string()
    if not _GRAMMAR[code](text):
        raise PeerProtocolError(f"header field {code} is {text[:40]!r}")
    return text


def _check_fields(type_: int, body_length: int, fields: Mapping[int, str | int]) -> None:
    for code in _REQUIRED.get(type_, ()):
        if code not in fields:
            raise PeerProtocolError(f"a message of type {type_} without {code.name}")
    if fields.get(Field.REPLY_SERIAL) == 0:
        raise PeerProtocolError("REPLY_SERIAL 0")
    # Libraries make up messages of these names for their own users, such as Disconnected.
    if fields.get(Field.PATH) == LOCAL_PATH or fields.get(Field.INTERFACE) == LOCAL_INTERFACE:
        raise PeerProtocolError("a message from the Local path or interface")
    # No type has values of zero bytes, so a body needs a signature and a signature needs a body.
    if bool(fields.get(Field.SIGNATURE)) != bool(body_length):
        raise PeerProtocolError("a body without signature, or a signature without body")


def _append_field(out: bytearray, order: str, code: int, typed: tuple[str, str | int]) -> None:
    kind, value = typed
    out += bytes(-len(out) % 8)
    out += bytes((code, 1, ord(kind), 0))  # aligns the value to 4, which is enough for every kind
    if isinstance(value, int):
        out += struct.pack(order + "I", value)
    else:
        raw = value.encode()
        out += struct.pack("B" if kind == "g" else order + "I", len(raw))
        out += raw
        out.append(0)
