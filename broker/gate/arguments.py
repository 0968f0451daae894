"""What an app's calls to the bus say, and what the bus answers. No I/O."""

from broker.wire import errors, marshal
from broker.wire.errors import CallRefusedError, PeerProtocolError
from broker.wire.header import Header
from broker.wire.marshal import Value
from broker.wire.names import is_bus_name


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
