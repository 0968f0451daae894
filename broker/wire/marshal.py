"""Bodies and whole messages of the few types that the bus driver's methods use.

Reading is strict. Written messages are little-endian. The caller passes valid values: a string with
a NUL, for example, raises ValueError.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Final

from broker.wire.errors import PeerProtocolError
from broker.wire.header import NO_EXTRA, Flag, Header, MessageType, serialise_header
from broker.wire.reader import Reader

Value = str | int | bool | Sequence[str]

_STRING_ARRAY: Final = "as"
_UINT32: Final = struct.Struct("<I")
# A bus sets this flag on every message that cannot be answered, and so does this module.
_NO_ANSWER: Final = int(Flag.NO_REPLY_EXPECTED)


def read_body(signature: str, body: bytes, *, little: bool) -> tuple[Value, ...]:
    """Return the values of a body.

    Raises PeerProtocolError for types outside s, o, g, u, b, as.
    """
    reader = Reader(body, little=little)
    values = tuple(_read_value(reader, kind) for kind in _split(signature))
    reader.finish()
    return values


def read_reply(reply: Header, data: bytes, signature: str) -> tuple[Value, ...]:
    """Return the values of the bus's reply. Raises PeerProtocolError if they are of other types."""
    if reply.signature != signature:
        raise PeerProtocolError(f"the bus answered ({reply.signature}) instead of ({signature})")
    return read_body(signature, data[reply.size :], little=reply.little)


def make_body(signature: str, values: Sequence[Value]) -> bytes:
    """Return the little-endian bytes of a body of the types of `read_body`."""
    out = bytearray()
    for kind, value in zip(_split(signature), values, strict=True):
        _append_value(out, kind, value)
    return bytes(out)


def make_call(  # noqa: PLR0913 - each one is a field of the message
    serial: int,
    *,
    destination: str | None,
    path: str,
    interface: str | None,
    member: str,
    signature: str = "",
    values: Sequence[Value] = (),
    body: bytes | None = None,
    flags: int = 0,
    unix_fds: int = 0,
) -> bytes:
    """Return a whole method call. `body`, if given, takes the place of `values`."""
    return _make(
        MessageType.METHOD_CALL,
        serial,
        make_body(signature, values) if body is None else body,
        flags=flags,
        path=path,
        interface=interface,
        member=member,
        destination=destination,
        signature=signature,
        unix_fds=unix_fds,
    )


def make_return(  # noqa: PLR0913 - each one is a field of the message
    serial: int,
    *,
    reply_serial: int,
    destination: str | None = None,
    sender: str | None = None,
    signature: str = "",
    values: Sequence[Value] = (),
    body: bytes | None = None,
) -> bytes:
    """Return a whole method return. `body`, if given, takes the place of `values`."""
    return _make(
        MessageType.METHOD_RETURN,
        serial,
        make_body(signature, values) if body is None else body,
        reply_serial=reply_serial,
        destination=destination,
        sender=sender,
        signature=signature,
    )


def make_error(
    serial: int,
    *,
    reply_serial: int,
    name: str,
    text: str,
    destination: str | None = None,
    sender: str | None = None,
) -> bytes:
    """Return a whole error with its text."""
    return _make(
        MessageType.ERROR,
        serial,
        make_body("s", (text,)),
        error_name=name,
        reply_serial=reply_serial,
        destination=destination,
        sender=sender,
        signature="s",
    )


def make_signal(  # noqa: PLR0913 - each one is a field of the message
    serial: int,
    *,
    path: str,
    interface: str,
    member: str,
    destination: str | None = None,
    sender: str | None = None,
    signature: str = "",
    values: Sequence[Value] = (),
    body: bytes | None = None,
    extra: Mapping[int, tuple[str, str]] = NO_EXTRA,
) -> bytes:
    """Return a whole signal. `body`, if given, takes the place of `values`."""
    return _make(
        MessageType.SIGNAL,
        serial,
        make_body(signature, values) if body is None else body,
        path=path,
        interface=interface,
        member=member,
        destination=destination,
        sender=sender,
        signature=signature,
        extra=extra,
    )


def _make(  # noqa: PLR0913 - each one is a field of the message
    type_: MessageType,
    serial: int,
    body: bytes,
    *,
    signature: str,
    destination: str | None,
    flags: int = _NO_ANSWER,
    path: str | None = None,
    interface: str | None = None,
    member: str | None = None,
    error_name: str | None = None,
    reply_serial: int | None = None,
    sender: str | None = None,
    unix_fds: int = 0,
    extra: Mapping[int, tuple[str, str]] = NO_EXTRA,
) -> bytes:
    header = Header(
        little=True,
        type=type_,
        flags=flags,
        body_length=len(body),
        serial=serial,
        path=path,
        interface=interface,
        member=member,
        error_name=error_name,
        reply_serial=reply_serial,
        destination=destination,
        sender=sender,
        signature=signature,
        unix_fds=unix_fds,
    )
    return serialise_header(header, sender=True, extra=extra) + body


def _split(signature: str) -> list[str]:
    kinds = []
    at = 0
    while at < len(signature):
        size = len(_STRING_ARRAY) if signature.startswith(_STRING_ARRAY, at) else 1
        kind = signature[at : at + size]
        if kind not in ("s", "o", "g", "u", "b", _STRING_ARRAY):
            raise PeerProtocolError(f"a body of type {signature[:40]!r}")
        kinds.append(kind)
        at += size
    return kinds


def _read_value(reader: Reader, kind: str) -> Value:
    match kind:
        case "s":
            return reader.string()
        case "o":
            return reader.object_path()
        case "g":
            return reader.signature()
        case "u":
            return reader.uint32()
        case "b":
            return reader.boolean()
        case _:
            return _read_strings(reader)


def _read_strings(reader: Reader) -> tuple[str, ...]:
    end = reader.array_end("s")
    texts = []
    while reader.at < end:
        texts.append(reader.string())
    if reader.at != end:
        raise PeerProtocolError("an element runs past the end of its array")
    return tuple(texts)


def _append_value(out: bytearray, kind: str, value: Value) -> None:
    if isinstance(value, int):
        if kind not in ("u", "b"):
            raise ValueError(f"a number as {kind!r}")
        _append_uint32(out, value)
    elif isinstance(value, str):
        _append_text(out, kind, value)
    elif kind == _STRING_ARRAY:
        _append_uint32(out, 0)
        start = len(out)
        for text in value:
            _append_text(out, "s", text)
        _UINT32.pack_into(out, start - _UINT32.size, len(out) - start)
    else:
        raise ValueError(f"a sequence as {kind!r}")


def _append_uint32(out: bytearray, value: int) -> None:
    out += bytes(-len(out) % 4)
    out += _UINT32.pack(value)


def _append_text(out: bytearray, kind: str, text: str) -> None:
    raw = text.encode()
    if kind not in ("s", "o", "g") or 0 in raw:
        raise ValueError(f"{text[:40]!r} as {kind!r}")
    if kind == "g":
        out.append(len(raw))
    else:
        _append_uint32(out, len(raw))
    out += raw
    out.append(0)
