"""Messages of the bus that the gate does not read, because their header is too large or too strange. No I/O.

A bus passes on header fields of up to 64 MiB, and dbus-broker also fields that D-Bus does not define, with values that
`parse_header` refuses. Neither the sender nor the app that would get such a message has broken a rule, so their
connections stay. The message alone is left out: it is reported, a call is refused, and a reply is replaced by an error.
"""

from typing import Final

from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.denials import Denial
from broker.wire import errors, marshal
from broker.wire.errors import PeerProtocolError
from broker.wire.header import FIXED_SIZE, READ_LIMITS, Flag, Header, MessageType
from broker.wire.interfaces import DRIVER

# The size of the largest header that is read.
MAX_HEADER: Final = FIXED_SIZE + READ_LIMITS.fields
TOO_LARGE: Final = f"header fields of more than {READ_LIMITS.fields} bytes"
# The types of messages that a program waits for. The header names the program.
AWAITED: Final = (MessageType.METHOD_CALL, MessageType.METHOD_RETURN, MessageType.ERROR)
_KINDS: Final = {MessageType.METHOD_CALL: "call", MessageType.SIGNAL: "signal"}


def leave_out(state: ConnectionState, header: Header, why: str) -> bytes | None:
    """Report a message of which only the skimmed header is known; return the error that replaces a reply.

    Raises PeerProtocolError if the bus itself sent the message, because no owner change may be missed.
    """
    if header.sender == DRIVER:
        raise PeerProtocolError(f"the bus sent an unreadable message: {why}")
    sender = header.sender or ""
    kind = _KINDS.get(MessageType(header.type), "reply") if header.type in AWAITED else "signal"
    state.sandbox.denied(state, Denial("receive", kind, sender, "", "", "", why, ""))
    if not sender:  # the field is behind more values than are read
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
