"""A header is refused with PeerProtocolError, or means the same written anew, and to dbus-next.

What two readers understand in two ways is a hole for whoever forwards it.
"""

import io
from dataclasses import replace
from typing import Any, Final

from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.signature import SignatureTree

from broker.wire.errors import PeerProtocolError
from broker.wire.header import (
    FIXED_SIZE,
    Field,
    Header,
    MessageType,
    measure,
    parse_header,
    serialise_header,
)
from tests.messages import big, call, changed, driver_call, signal

_FIELDS: Final = SignatureTree("a(yv)").types[0]
_KNOWN_FLAGS: Final = 7
_DEFINED: Final = frozenset(Field)
_REPLIES: Final = (MessageType.METHOD_RETURN, MessageType.ERROR)


def check(data: bytes) -> None:
    """Hold the invariant."""
    if len(data) < FIXED_SIZE:
        return
    try:
        header = parse_header(data)
    except PeerProtocolError:
        return
    assert measure(data) == header.size + header.body_length
    assert parse_header(data[: header.size]) == header == parse_header(b"Bl\1" + data, 3)
    written = serialise_header(header, sender=True)
    again = parse_header(written)
    assert again == _cleaned(header, again)
    assert serialise_header(again, sender=True) == written
    said = read_fields(data[: header.size], little=header.little)
    known = {code: value for code, value in said if code in _DEFINED}
    assert known.items() <= {field: getattr(header, field.name.lower()) for field in Field}.items()
    assert header.has_unknown is (len(known) < len(said))


def seeds() -> list[bytes]:
    """Return messages of every type, with every field."""
    full = changed(
        call(2, ":1.2", values=("x",), signature="s"),
        flags=7,
        sender=":1.9",
        unix_fds=2,
        extra={10: ("o", "/a"), 200: ("g", "a{sv}")},
    )
    reply = changed(driver_call(3, "Hello"), type=2, reply_serial=7, path=None, member=None)
    error = changed(full, type=3, error_name="a.b", reply_serial=9)
    return [full, big(full), reply, error, signal(4, sender=":1.7"), call(5, None, interface=None)]


def read_fields(data: bytes, *, little: bool) -> list[tuple[int, object]]:
    """Return the header fields of a message as dbus-next reads them."""
    make: Any = Unmarshaller
    reader = make(io.BytesIO(data))
    reader.endian = ord("l") if little else ord("B")
    reader.read(FIXED_SIZE - 4)
    return [(code, variant.value) for code, variant in reader.read_argument(_FIELDS)]


def _cleaned(header: Header, again: Header) -> Header:
    return replace(
        header,
        flags=header.flags & _KNOWN_FLAGS,
        has_unknown=False,
        size=again.size,
        reply_serial=header.reply_serial if header.type in _REPLIES else None,
        reply_serial_at=again.reply_serial_at,
    )
