"""What an app's calls to the bus say, and what the bus answers. No I/O."""

from dataclasses import replace
from typing import Final, Literal

from broker.wire import errors, marshal
from broker.wire.errors import CallRefusedError, PeerProtocolError
from broker.wire.header import Header, parse_header, serialise_header
from broker.wire.marshal import Value
from broker.wire.names import is_bus_name
from broker.wire.reader import Reader, skip_value

_PROPERTIES: Final = "a{sv}"
_HANDLE: Final = "h"  # the type of a descriptor


def arguments(call: Header, data: bytes, signature: str) -> tuple[Value, ...]:
    """Read the arguments of a call. Raises CallRefusedError if they are not of that form."""
    if call.signature != signature:
        raise CallRefusedError(
            errors.INVALID_ARGS, f"{call.member} takes ({signature}), not ({call.signature})"
        )
    return marshal.read_body(signature, data[call.size :], little=call.little)


def bus_name(call: Header, data: bytes) -> str:
    """Read the bus name that a call is about. Raises CallRefusedError if it is about none."""
    name = str(arguments(call, data, "s")[0])
    if not is_bus_name(name):
        raise CallRefusedError(errors.INVALID_ARGS, f"not a bus name: {name[:40]!r}")
    return name


def results(reply: Header, data: bytes, signature: str) -> tuple[Value, ...]:
    """Read what the bus answered. Raises PeerProtocolError if it is not of that form."""
    if reply.signature != signature:
        raise PeerProtocolError(f"the bus answered ({reply.signature}) instead of ({signature})")
    return marshal.read_body(signature, data[reply.size :], little=reply.little)


def without_descriptors(data: bytes) -> bytes:
    """Return an answer of type `a{sv}` without its descriptors, and without the entries that name one.

    The descriptors themselves are the caller's to close. Raises PeerProtocolError if the answer is of another type.
    """
    reply = parse_header(data)
    if reply.signature != _PROPERTIES:
        raise PeerProtocolError(f"the bus answered ({reply.signature}) instead of ({_PROPERTIES})")
    body = data[reply.size :]
    reader = Reader(body, little=reply.little)
    end = reader.array_end("{")
    kept = bytearray()
    while reader.at < end:
        reader.align(8)
        start = reader.at
        reader.string()
        kind = reader.variant_type()
        skip_value(reader, kind)
        if _HANDLE not in kind:
            # An entry begins at a multiple of eight, so its bytes are the same at any other.
            kept += bytes(-len(kept) % 8) + body[start : reader.at]
    reader.finish()
    order: Literal["little", "big"] = "little" if reply.little else "big"
    new = len(kept).to_bytes(4, order) + bytes(4) + kept
    header = replace(reply, unix_fds=0, body_length=len(new))
    return serialise_header(header, sender=True) + new
