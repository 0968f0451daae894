"""The byte stream of a bus, cut into messages. Unwanted messages are never stored. No I/O.

Theory of operation. A bus may legally deliver messages of up to 128 MiB, with 64 MiB of header
fields, from any sender. So `look` decides about each message when the header has arrived, before
the body arrives. The bytes of an unwanted message are skipped on arrival. A header over MAX_HEAD is
never parsed. The fields of such a header are skimmed one by one for the sender's name, so that a
call can be refused, and the field values are dropped on the way.

Descriptors. A bus sends a message's descriptors with the message's first byte, and the kernel ends
a read behind the bytes that were sent with descriptors:

    read   1: | end of message A | B with fds |     the batch belongs to B
    read   2: | rest of B | C ...

So a batch belongs to the last message that begins within the read. A batch that arrived before the
current message began belongs to a skipped message. If the kernel had no room for all descriptors
(MSG_CTRUNC), the message is delivered without descriptors.
"""

import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from broker.wire.errors import PeerProtocolError
from broker.wire.header import FIXED_SIZE, Field, Header, MessageType, parse_header

# Bytes of header fields. Of the defined fields only PATH may be longer than 255 bytes, and no
# object of the broker has such a path.
MAX_HEAD: Final = 8 * 1024
# Skimmed fields of an oversize header: the defined fields, and some unknown fields.
MAX_FIELDS: Final = 64
# Remembered headers. A repeated call then costs little, even a refused call.
MAX_REMEMBERED: Final = 256
_MAX_NAME: Final = 255
_FIXED: Final = {ord("l"): struct.Struct("<BBBBIII"), ord("B"): struct.Struct(">BBBBIII")}
_UINT32: Final = {ord("l"): struct.Struct("<I"), ord("B"): struct.Struct(">I")}


@dataclass(frozen=True, slots=True)
class ArrivedMessage:
    """A whole message that `look` wanted.

    The receiver owns the descriptors. `cut`: descriptors are missing.
    """

    header: Header
    body: bytes
    fds: list[int]
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Oversize:
    """A message with an oversize header. `sender` is empty if no sender was found cheaply."""

    type: int
    flags: int
    serial: int
    sender: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """Descriptors of a skipped message. The receiver closes the descriptors."""

    fds: list[int]


Item = ArrivedMessage | Oversize | Dropped


@dataclass(slots=True)
class _DescriptorBatch:
    """Descriptors that came with a read.

    `end` is the position of the read's end in the stream.
    """

    end: int
    fds: list[int]
    cut: bool


@dataclass(slots=True)
class _OversizeHeader:
    """An oversize header that is skimmed field by field."""

    start: int  # of the message, in the stream
    order: int
    type: int
    flags: int
    serial: int
    fields_end: int
    end: int
    fields: int = 0  # skimmed so far
    sender: str = ""


@dataclass(slots=True)
class MessageIntake:
    """The stream of a bus. `look` is called in order with each header that is not oversize."""

    look: Callable[[Header], bool]
    skipped: int = 0  # bytes so far
    _buffer: bytearray = field(default_factory=bytearray)
    _at: int = 0  # position of the buffer's start in the stream
    _skip: int = 0  # bytes still to be dropped
    _skim: _OversizeHeader | None = None
    _wanted: Header | None = None  # header of the message whose body is not complete
    _size: int = 0  # of that message
    _parsed: dict[bytes, Header] = field(default_factory=dict)
    _batches: deque[_DescriptorBatch] = field(default_factory=deque)

    @property
    def held(self) -> int:
        """Return the number of stored bytes."""
        return len(self._buffer)

    @property
    def is_skipping(self) -> bool:
        """Return whether the next bytes of the stream are dropped."""
        return self._skip > 0

    def feed(self, data: bytes, fds: Sequence[int] = (), *, cut: bool = False) -> Iterator[Item]:
        """Take the bytes of a read, and yield items.

        Raises PeerProtocolError for an invalid stream.
        """
        if fds or cut:
            end = self._at + len(self._buffer) + len(data)
            self._batches.append(_DescriptorBatch(end, list(fds), cut))
        self._buffer += self._drop(data)
        while True:
            if self._skim is not None:
                if not self._skim_on():
                    return
                yield from self._skimmed()
            elif self._skip:
                return
            elif self._wanted is not None:
                if len(self._buffer) < self._size:
                    return
                yield self._take(self._wanted)
            elif not self._begin():
                return
            yield from self._drop_stale()

    def close(self) -> list[int]:
        """Return every descriptor that is still held. The caller closes the descriptors."""
        return [fd for batch in self._batches for fd in batch.fds]

    # -- a message ---------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Look at the next header; return False if the header is not complete yet."""
        buffer = self._buffer
        if len(buffer) < FIXED_SIZE:
            return False
        fixed = _FIXED.get(buffer[0])
        if fixed is None:
            raise PeerProtocolError(f"byte order {buffer[0]:#04x}")
        order, type_, flags, version, body, serial, fields = fixed.unpack_from(buffer)
        if version != 1:
            raise PeerProtocolError(f"protocol version {version}")
        head = FIXED_SIZE + (fields + 7 & ~7)
        if fields > MAX_HEAD:
            start = self._at
            fields_end = start + FIXED_SIZE + fields
            end = start + head + body
            self._skim = _OversizeHeader(start, order, type_, flags, serial, fields_end, end)
            self._pass(FIXED_SIZE)
            return True
        if len(buffer) < head:
            return False
        header = self._parse(bytes(buffer[:head]), body, serial)
        if header is not None and self.look(header):
            self._wanted, self._size = header, head + body
        else:
            self._pass(head + body)
        return True

    def _parse(self, raw: bytes, body: int, serial: int) -> Header | None:
        """Return the parsed header, or None for a header that cannot be parsed."""
        key = raw[:4] + raw[12:]  # all but the body's length and the serial
        known = self._parsed.get(key)
        if known is not None and bool(body) == bool(known.signature):
            return replace(known, body_length=body, serial=serial)
        try:
            header = parse_header(raw)
        except PeerProtocolError:
            # The header is within the limits of the bus but over a limit of the parser, for example
            # the limit on values in an unknown field.
            return None
        if header.type != MessageType.METHOD_CALL:
            return header
        if len(self._parsed) >= MAX_REMEMBERED:
            self._parsed.clear()
        self._parsed[key] = header
        return header

    def _take(self, header: Header) -> ArrivedMessage:
        fds, cut = self._take_fds(header.unix_fds)
        body = bytes(self._buffer[header.size : self._size])
        self._wanted = None
        self._pass(self._size)
        return ArrivedMessage(header, body, fds, cut)

    def _take_fds(self, count: int) -> tuple[list[int], bool]:
        """Return the descriptors of the message that begins here, and whether some are missing."""
        if not count:
            return [], False
        batch = self._batches[0] if self._batches else None
        if batch is None or batch.cut or len(batch.fds) < count:
            return [], True
        fds, batch.fds = batch.fds[:count], batch.fds[count:]
        return fds, False

    def _drop_stale(self) -> Iterator[Dropped]:
        """Drop the descriptors of past messages."""
        begun = self._at + self._skip
        while self._batches and self._batches[0].end <= begun:
            if fds := self._batches.popleft().fds:
                yield Dropped(fds)

    # -- skipping ----------------------------------------------------------------------------------

    def _drop(self, data: bytes) -> bytes:
        size = min(self._skip, len(data))
        self._skip -= size
        self._at += size
        self.skipped += size
        return data[size:] if size else data

    def _pass(self, size: int) -> None:
        """Skip bytes of the stream: buffered bytes now, later bytes on arrival."""
        here = min(size, len(self._buffer))
        del self._buffer[:here]
        self._at += here
        self._skip = size - here

    # -- an oversize header ------------------------------------------------------------------------

    def _skim_on(self) -> bool:
        """Skim the fields; return False if more bytes are needed."""
        skim = self._skim
        assert skim is not None
        while not self._skip:
            padding = -(self._at - skim.start) % 8
            if self._at + padding >= skim.fields_end:
                return True
            size = self._field(skim, padding)
            if size is None:
                return False
            skim.fields += 1
            if skim.fields > MAX_FIELDS:
                return True
            if not 0 < size <= skim.fields_end - self._at:
                return True  # no defined field has such a type, and the search ends
            self._pass(size)
        return False

    def _field(self, skim: _OversizeHeader, padding: int) -> int | None:
        """Return the length of the field that begins here.

        Returns 0 for an unknown type, and None if more bytes are needed.
        """
        buffer, value = self._buffer, padding + 4
        if len(buffer) < value + 4:
            # The rest may be a short signature.
            return None if self._at + len(buffer) < skim.fields_end else 0
        code, length, kind = buffer[padding], buffer[padding + 1], chr(buffer[padding + 2])
        if length != 1 or kind not in "sogu":
            return 0
        if kind == "u":
            return value + 4
        if kind == "g":
            return value + 1 + buffer[value] + 1
        (size,) = _UINT32[skim.order].unpack_from(buffer, value)
        whole: int = value + 4 + size + 1
        if code == Field.SENDER and size <= _MAX_NAME:
            if len(buffer) < whole:
                return None
            skim.sender = buffer[value + 4 : whole - 1].decode("ascii", "replace")
        return whole

    def _skimmed(self) -> Iterator[Item]:
        skim, self._skim = self._skim, None
        assert skim is not None
        self._pass(skim.end - self._at)
        yield Oversize(skim.type, skim.flags, skim.serial, skim.sender)
