"""The bus's byte stream cut into messages, of which those that nobody wants are never stored. No I/O.

Theory of operation. What a bus may legally deliver is up to 128 MiB a message, with 64 MiB of header fields, from anybody
on it. So each message is looked at when its header is there, and before there is a body: `look` says whether it is
wanted. What is not is skipped as it arrives. A header over MAX_HEAD is no message to us: its fields are gone
through one by one for the sender's name, so that a call can be refused, and their texts are dropped on the way.

Descriptors. A bus sends a message's descriptors with its first byte, and the kernel ends a read behind them. So a
batch belongs to the message that begins last within its read, and one that arrived before a message began is of a
message that was skipped. If the kernel had no room for all (MSG_CTRUNC) the message goes without.
"""

import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from broker.wire.errors import PeerProtocolError
from broker.wire.header import FIXED_SIZE, Field, Header, MessageType, parse_header

# Bytes of header fields. Of those that are defined only PATH may have more than 255, and no object of ours has.
MAX_HEAD: Final = 8 * 1024
# Fields of an oversize header that are gone through: those that are defined, and some that others made up.
MAX_FIELDS: Final = 64
# Parsed headers that are remembered: a repeated call costs little, even if it is refused.
MAX_REMEMBERED: Final = 256
_MAX_NAME: Final = 255
_FIXED: Final = {ord("l"): struct.Struct("<BBBBIII"), ord("B"): struct.Struct(">BBBBIII")}
_UINT32: Final = {ord("l"): struct.Struct("<I"), ord("B"): struct.Struct(">I")}


@dataclass(frozen=True, slots=True)
class ArrivedMessage:
    """A message that is wanted, whole. Its descriptors are the taker's; `cut`: they are not all there."""

    header: Header
    body: bytes
    fds: list[int]
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Oversize:
    """A message with a header that is not kept. The sender is empty if it could not be found cheaply."""

    type: int
    flags: int
    serial: int
    sender: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """Descriptors of a message that was skipped: the taker closes them."""

    fds: list[int]


Item = ArrivedMessage | Oversize | Dropped


@dataclass(slots=True)
class _DescriptorBatch:
    """Descriptors that came with a read, which ended at this place of the stream."""

    end: int
    fds: list[int]
    cut: bool


@dataclass(slots=True)
class _OversizeHeader:
    """A header that is gone through field by field."""

    start: int  # of the message, in the stream
    order: int
    type: int
    flags: int
    serial: int
    fields_end: int
    end: int
    fields: int = 0  # so far
    sender: str = ""


@dataclass(slots=True)
class MessageIntake:
    """The stream of a bus. `look` is called with each header, but oversize ones, in order."""

    look: Callable[[Header], bool]
    skipped: int = 0  # bytes so far
    _buffer: bytearray = field(default_factory=bytearray)
    _at: int = 0  # where in the stream the buffer begins
    _skip: int = 0  # bytes that are still to be dropped
    _skim: _OversizeHeader | None = None
    _wanted: Header | None = None  # of the message whose body is not complete yet
    _size: int = 0  # of that message
    _parsed: dict[bytes, Header] = field(default_factory=dict)
    _batches: deque[_DescriptorBatch] = field(default_factory=deque)

    @property
    def held(self) -> int:
        """The number of bytes that are stored."""
        return len(self._buffer)

    @property
    def is_skipping(self) -> bool:
        """Return whether the next bytes of the stream are dropped."""
        return self._skip > 0

    def feed(self, data: bytes, fds: Sequence[int] = (), *, cut: bool = False) -> Iterator[Item]:
        """Take what was read, and give what came of it. Raises PeerProtocolError: no bus says that."""
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
        """Return every descriptor that is still here: the caller closes them."""
        return [fd for batch in self._batches for fd in batch.fds]

    # -- a message ----------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Look at the next header; return False if it is not complete yet."""
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
        """Return the header, None if it cannot be read."""
        key = raw[:4] + raw[12:]  # all but the body's length and the serial
        known = self._parsed.get(key)
        if known is not None and bool(body) == bool(known.signature):
            return replace(known, body_length=body, serial=serial)
        try:
            header = parse_header(raw)
        except PeerProtocolError:
            # Within the bus's limits, and over those of the parser, for instance that of values in an unknown field.
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
        """Give up what came with messages that are past."""
        begun = self._at + self._skip
        while self._batches and self._batches[0].end <= begun:
            if fds := self._batches.popleft().fds:
                yield Dropped(fds)

    # -- what is not stored ---------------------------------------------------------------------------

    def _drop(self, data: bytes) -> bytes:
        size = min(self._skip, len(data))
        self._skip -= size
        self._at += size
        self.skipped += size
        return data[size:] if size else data

    def _pass(self, size: int) -> None:
        """Skip bytes of the stream: buffered ones now, later ones when they come."""
        here = min(size, len(self._buffer))
        del self._buffer[:here]
        self._at += here
        self._skip = size - here

    # -- a header that is too long ----------------------------------------------------------------------

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
                return True  # a type that no defined field has: not looked for any longer
            self._pass(size)
        return False

    def _field(self, skim: _OversizeHeader, padding: int) -> int | None:
        """Return how long the field that begins here is; 0: unknown, None: more of it is needed."""
        buffer, value = self._buffer, padding + 4
        if len(buffer) < value + 4:
            # A signature of few characters may be all that is left.
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
