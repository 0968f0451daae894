"""A header is refused with PeerProtocolError, or means the same written anew, and to dbus-next.

What two readers understand in two ways is a hole for whoever forwards it.
"""

import contextlib
import io
from dataclasses import replace
from typing import Any, Final

from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.signature import SignatureTree

from broker.wire.errors import PeerProtocolError
from broker.wire.header import (
    BUS_LIMITS,
    FIXED_SIZE,
    Field,
    Header,
    MessageType,
    measure,
    measure_header,
    parse_header,
    serialise_header,
)
from broker.wire.skim import skim_header
from tests.helpers.messages import big, call, changed, driver_call, signal

_FIELDS: Final = SignatureTree("a(yv)").types[0]
_KNOWN_FLAGS: Final = 7
_DEFINED: Final = frozenset(Field)
_OF_A_CALL: Final = ("path", "interface", "member")
_OF_SOME_TYPES: Final = (*_OF_A_CALL, "error_name", "reply_serial")
_BELONGS: Final[dict[int, tuple[str, ...]]] = {
    MessageType.METHOD_CALL: _OF_A_CALL,
    MessageType.SIGNAL: _OF_A_CALL,
    MessageType.METHOD_RETURN: ("reply_serial",),
    MessageType.ERROR: ("error_name", "reply_serial"),
}


def check(data: bytes) -> None:
    """Hold the invariant."""
    if len(data) < FIXED_SIZE:
        return
    with contextlib.suppress(PeerProtocolError):
        if len(data) >= measure_header(data, 0, BUS_LIMITS):
            skim_header(data)
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
    _check_skimmed(data, header)


def _check_skimmed(data: bytes, header: Header) -> None:
    """Check that a look at names and numbers alone finds what the parser found."""
    skimmed = skim_header(data)
    for name in ("little", "type", "serial", "body_length", "size"):
        assert getattr(skimmed, name) == getattr(header, name)
    for name in ("sender", "destination", "reply_serial", "unix_fds"):
        # It may give up earlier, but find nothing else.
        assert getattr(skimmed, name) in (getattr(header, name), None, 0)


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
    long = changed(reply, path="/" + "a" * 70_000, member="M", sender=":1.9")
    return [
        full,
        big(full),
        long,
        reply,
        error,
        signal(4, sender=":1.7"),
        call(5, None, interface=None),
    ]


def read_fields(data: bytes, *, little: bool) -> list[tuple[int, object]]:
    """Return the header fields of a message as dbus-next reads them."""
    make: Any = Unmarshaller
    reader = make(io.BytesIO(data))
    reader.endian = ord("l") if little else ord("B")
    reader.read(FIXED_SIZE - 4)
    return [(code, variant.value) for code, variant in reader.read_argument(_FIELDS)]


def _cleaned(header: Header, again: Header) -> Header:
    belongs = _BELONGS.get(header.type, ())
    none: dict[str, Any] = {name: None for name in _OF_SOME_TYPES if name not in belongs}
    return replace(
        header,
        flags=header.flags & _KNOWN_FLAGS,
        has_unknown=False,
        has_misplaced=False,
        size=again.size,
        reply_serial_at=again.reply_serial_at,
        **none,
    )
