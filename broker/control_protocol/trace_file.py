"""The rings of the last message headers that a gate leaves behind for whoever looks into its death. No I/O.

There are two, one behind the other: of messages that were judged, and of those that passed because their header was known,
which would drive the others out. A ring is SLOTS slots of SLOT bytes, in native byte order, since reader and writer are on one
machine. A judged one's number is written last and taken away first: what was half written when its process died is not
shown. Of a known one everything is written at once, which is the fastest way; it may be half of the one before it.
"""

import functools
import struct
from dataclasses import dataclass
from typing import Final

from broker.wire.errors import PeerProtocolError
from broker.wire.header import FIXED_SIZE, MessageType, parse_header

SLOTS: Final = 256
SLOT: Final = 512
RING: Final = SLOTS * SLOT
SIZE: Final = 2 * RING
FROM_APP: Final = 0
FROM_BUS: Final = 1
_NUMBER: Final = struct.Struct("Q")
# When it was seen, its direction, how long the sandbox's id and the bytes of the header are that follow.
_ABOUT: Final = struct.Struct("dBBH")
_TEXT_AT: Final = _NUMBER.size + _ABOUT.size
_MAX_NAME: Final = 32
_MAX_TEXT: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A message that was seen. Its header may be cut short."""

    number: int
    when: float
    direction: int
    sandbox: str
    header: bytes
    is_known: bool = False


@dataclass(frozen=True, slots=True)
class RecordedHeader:
    """What is written down of a message that is about to be judged."""

    number: int
    when: float
    direction: int
    sandbox: str

    def write(self, ring: memoryview, at: int, data: bytes, pos: int) -> None:
        """Put the header that begins at `pos` into the slot at `at`: its fixed part and its fields, no body."""
        name = make_name(self.sandbox)
        room = SLOT - _TEXT_AT - len(name)
        header = data[pos : pos + min(_size(data, pos), room)]
        _NUMBER.pack_into(ring, at, 0)
        _ABOUT.pack_into(ring, at + _NUMBER.size, self.when, self.direction, len(name), len(header))
        ring[at + _TEXT_AT : at + _TEXT_AT + len(name) + len(header)] = name + header
        _NUMBER.pack_into(ring, at, self.number)


def make_name(sandbox: str) -> bytes:
    """Return a sandbox's id as it stands in a slot."""
    return sandbox.encode("ascii", "replace")[:_MAX_NAME]


@functools.cache  # there are as many as a name may have bytes, and each connection asks
def known_slot(name_size: int) -> tuple[struct.Struct, int]:
    """Return the form of a known message's slot with a name of that size, and how much of a header fits.

    Its values: number, time, direction, length of the name, length of the header, name, header.
    """
    room = SLOT - _TEXT_AT - name_size
    return struct.Struct(f"QdBBH{name_size}s{room}s"), room


def read_rings(data: bytes) -> list[Entry]:
    """Return what is in the rings, oldest first. Whatever the bytes are, it is a list."""
    entries = []
    for at in range(0, len(data) - SLOT + 1, SLOT):
        (number,) = _NUMBER.unpack_from(data, at)
        when, direction, name_size, header_size = _ABOUT.unpack_from(data, at + _NUMBER.size)
        start = at + _TEXT_AT
        end = start + name_size + header_size
        if number and end <= at + SLOT:
            name = data[start : start + name_size].decode("ascii", "replace")
            header = data[start + name_size : end]
            entries.append(
                Entry(
                    number=number,
                    when=when,
                    direction=direction,
                    sandbox=name,
                    header=header,
                    is_known=at >= RING,
                )
            )
    return sorted(entries, key=lambda entry: entry.number)


def describe(entry: Entry) -> str:
    """Return a line about a message. Nothing of it is as the sandbox wrote it: texts are quoted."""
    way = "app to bus" if entry.direction == FROM_APP else "bus to app"
    about = f"{entry.sandbox!r} {way}{' known' if entry.is_known else ''}"
    data = entry.header + bytes(-len(entry.header) % 8)
    if len(entry.header) < FIXED_SIZE or len(entry.header) < _size(entry.header, 0):
        return f"{about} cut short: {entry.header.hex()}"
    try:
        header = parse_header(data)
    except PeerProtocolError as exc:
        return f"{about} {str(exc)[:_MAX_TEXT]}: {entry.header.hex()}"
    texts = {
        "destination": header.destination,
        "sender": header.sender,
        "path": header.path,
        "interface": header.interface,
        "member": header.member,
        "error": header.error_name,
    }
    said = [f"{key}={text[:_MAX_TEXT]!r}" for key, text in texts.items() if text is not None]
    kind = MessageType(header.type).name.lower() if header.type in set(MessageType) else header.type
    numbers = f"serial={header.serial} body={header.body_length} fds={header.unix_fds}"
    if header.reply_serial:
        numbers += f" reply_to={header.reply_serial}"
    return " ".join([about, str(kind), numbers, *said])


def _size(data: bytes, pos: int) -> int:
    """Return the bytes of a header that begins at `pos`, without the padding behind it."""
    fields = data[pos + 12 : pos + 16]
    is_little = data[pos : pos + 1] == b"l"
    return FIXED_SIZE + int.from_bytes(fields, "little" if is_little else "big")
