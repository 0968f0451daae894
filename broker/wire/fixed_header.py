"""The fixed header of a little-endian message, and all values of the first word. No I/O."""

import struct
from typing import Final

from broker.wire.header import Flag, MessageType

# First word (byte order, type, flags, version), body length, serial, length of the field array.
FIXED: Final = struct.Struct("<IIII")
U32: Final = struct.Struct("<I")


def _first_words(message_type: int, *, mute: bool | None = None) -> list[int]:
    """Return all first words of a message type, with any flags or by NO_REPLY_EXPECTED."""
    flags = [f for f in range(8) if mute is None or bool(f & Flag.NO_REPLY_EXPECTED) is mute]
    return [ord("l") | message_type << 8 | f << 16 | 1 << 24 for f in flags]


CALLS: Final = _first_words(MessageType.METHOD_CALL, mute=False)
MUTE_CALLS: Final = _first_words(MessageType.METHOD_CALL, mute=True)
SIGNALS: Final = _first_words(MessageType.SIGNAL)
# The sender of a reply may set NO_REPLY_EXPECTED or not.
REPLIES: Final = frozenset(
    _first_words(MessageType.METHOD_RETURN) + _first_words(MessageType.ERROR)
)
