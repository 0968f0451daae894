"""The trace file: the last message headers, to explain the death of a gate. No I/O.

The file has two rings, with one behind the other. The first ring has the messages that were judged.
The second ring has the messages that passed because the header was known. In a common ring, the
many known messages would push out the judged messages. A ring has SLOTS slots of SLOT bytes, in
native byte order, because reader and writer run on the same machine.

The number of a judged message is removed first and written last. So a slot that was half written
when the process died has no number, and is not shown. A known message is written in a single step,
which is the fastest way. Such a slot may be half overwritten, and then still has a part of the
message before.
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
# Time, direction, length of the sandbox's id and length of the header. Id and header follow.
_ABOUT: Final = struct.Struct("dBBH")
_TEXT_AT: Final = _NUMBER.size + _ABOUT.size
_MAX_NAME: Final = 32
_MAX_TEXT: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A message in the trace file. The header may be cut short."""

    number: int
    when: float
    direction: int
    sandbox: str
    header: bytes
    is_known: bool = False


@dataclass(frozen=True, slots=True)
class RecordedHeader:
    """The trace entry of a message that is about to be judged."""

    number: int
    when: float
    direction: int
    sandbox: str

    def write(self, ring: memoryview, at: int, data: bytes, pos: int) -> None:
        """Write the header at `pos` to the slot at `at`, with all fields and without the body."""
        name = make_name(self.sandbox)
        room = SLOT - _TEXT_AT - len(name)
        header = data[pos : pos + min(_size(data, pos), room)]
        _NUMBER.pack_into(ring, at, 0)
        _ABOUT.pack_into(ring, at + _NUMBER.size, self.when, self.direction, len(name), len(header))
        ring[at + _TEXT_AT : at + _TEXT_AT + len(name) + len(header)] = name + header
        _NUMBER.pack_into(ring, at, self.number)


def make_name(sandbox: str) -> bytes:
    """Return a sandbox's id in the form of a slot."""
    return sandbox.encode("ascii", "replace")[:_MAX_NAME]


@functools.cache  # asked by each connection; there is a result for each length of a name
def known_slot(name_size: int) -> tuple[struct.Struct, int]:
    """Return the form of a slot for a known message, and the room for the header.

    The values of the form are number, time, direction, length of the name, length of the header,
    name and header. The name is the sandbox's id, with `name_size` bytes.
    """
    room = SLOT - _TEXT_AT - name_size
    return struct.Struct(f"QdBBH{name_size}s{room}s"), room


def read_rings(data: bytes) -> list[Entry]:
    """Return the entries of the rings, oldest first. Any bytes are accepted."""
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
    """Return a line about a message, with every text from the sandbox quoted."""
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
    """Return the size of the header at `pos`, without the padding behind."""
    fields = data[pos + 12 : pos + 16]
    is_little = data[pos : pos + 1] == b"l"
    return FIXED_SIZE + int.from_bytes(fields, "little" if is_little else "big")
