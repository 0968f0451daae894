"""Messages that the bus may deliver and the gate does not read, because their header is too large or too strange. No I/O.

A bus passes header fields of 64 MiB on, and dbus-broker also fields that D-Bus does not define, with values that
`parse_header` refuses. Whoever sent them broke no rule, and the app that gets them even less. So such a message is
left out alone: it is reported, the caller of a call is refused, and a reply is replaced by an error.
"""

from typing import Final

from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.denials import Denial
from broker.wire import errors, marshal
from broker.wire.errors import PeerProtocolError
from broker.wire.header import FIXED_SIZE, READ_LIMITS, Flag, Header, MessageType
from broker.wire.interfaces import DRIVER

# Of a header that is read.
MAX_HEADER: Final = FIXED_SIZE + READ_LIMITS.fields
TOO_LARGE: Final = f"header fields of more than {READ_LIMITS.fields} bytes"
# Kinds of messages that a program waits for; the header names the program.
AWAITED: Final = (MessageType.METHOD_CALL, MessageType.METHOD_RETURN, MessageType.ERROR)
_KINDS: Final = {MessageType.METHOD_CALL: "call", MessageType.SIGNAL: "signal"}


def leave_out(state: ConnectionState, header: Header, why: str) -> bytes | None:
    """Report a message of which only the skimmed header is known; return what the app gets in its place.

    Raises PeerProtocolError if the bus itself made it: what it says of owners must not be missed.
    """
    if header.sender == DRIVER:
        raise PeerProtocolError(f"the bus sent an unreadable message: {why}")
    sender = header.sender or ""
    kind = _KINDS.get(MessageType(header.type), "reply") if header.type in AWAITED else "signal"
    state.sandbox.denied(state, Denial("receive", kind, sender, "", "", "", why, ""))
    if not sender:  # it stands behind more values than are read
        return None
    text = f"The message cannot be delivered: {why}"
    if header.type == MessageType.METHOD_CALL:
        if not header.flags & Flag.NO_REPLY_EXPECTED:
            state.refuse_caller(sender, header.serial, errors.LIMITS_EXCEEDED, text)
        return None
    if header.type not in AWAITED or not header.reply_serial:
        return None
    return marshal.make_error(
        header.serial,
        reply_serial=header.reply_serial,
        name=errors.LIMITS_EXCEEDED,
        text=text,
        destination=state.unique_name or None,
        sender=sender,
    )
