"""The unfinished end of a byte stream, and the descriptors that came with it. No I/O.

Descriptors arrive with some read; they belong to a message that has bytes in that read. One that names
no message by the time all bytes of its read are used is an attack (or a bug): it would be given to a later message.
"""

from collections.abc import Sequence
from typing import Final, Protocol

from broker.gate.dumps import Fds, ReceiveBufferDump, pick
from broker.wire.errors import PeerProtocolError

# What one connection may have in flight before a message claims it: one message's worth, sent in two parts.
MAX_UNCLAIMED_FDS: Final = 253
# Parts smaller than this are put together, or each byte that trickles in would cost many.
SMALL: Final = 4096


class Account(Protocol):
    """Who pays for what is held."""

    bytes_held: int


class _FdBatch:
    """Descriptors of one read. `end` counts from the beginning of what is held."""

    __slots__ = ("end", "left")

    def __init__(self, left: int, end: int) -> None:
        self.left = left
        self.end = end


class ReceiveBuffer:
    """One direction of a connection."""

    def __init__(self, account: Account | None) -> None:
        self._account: Final = account
        self._parts: list[bytes | bytearray] = []
        self._held = 0
        self._need = 0
        self._skip = 0
        # A number for the message that is half here, 0 for none.
        self.unfinished = 0
        self._number = 0  # of the last one
        # Lists, because they are short and nearly always empty.
        self._fds: Final[list[int]] = []
        self._batches: Final[list[_FdBatch]] = []

    @property
    def has_fds(self) -> bool:
        """True when descriptors wait for their message."""
        return bool(self._fds)

    @property
    def fd_count(self) -> int:
        """How many descriptors wait for their message."""
        return len(self._fds)

    @property
    def is_idle(self) -> bool:
        """True when nothing is held or expected: what arrives can be used as it is."""
        return not (self._parts or self._fds or self._skip)

    @property
    def held(self) -> int:
        """How many bytes are held."""
        return self._held

    def feed(self, data: bytes, fds: Sequence[int]) -> bytes | None:
        """Return all that is held and `data`, once it is as much as was said to be needed."""
        if self._skip and data:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        if fds:
            self._fds.extend(fds)
            if len(self._fds) > MAX_UNCLAIMED_FDS:
                raise PeerProtocolError("more file descriptors than any message may have")
            self._batches.append(_FdBatch(len(fds), self._held + len(data)))
        if not self._parts:
            return data or None
        if data:
            last = self._parts[-1]
            if len(data) >= SMALL:
                self._parts.append(data)
            elif isinstance(last, bytearray):
                last += data
            else:
                self._parts.append(bytearray(data))
            self._count(len(data))
        if self._held < self._need:
            return None
        return self.take_all()

    def take_all(self) -> bytes:
        """Return all that is held, however little it is."""
        self._need = 0
        whole = b"".join(self._parts) if len(self._parts) > 1 else bytes(self._parts[0])
        self._parts.clear()
        self._count(-self._held)
        return whole

    def unread(self, data: bytes) -> None:
        """Hold what `take` gave, as it was."""
        self._parts.append(data)
        self._count(len(data))

    def consume(self, data: bytes, used: int) -> None:
        """Hold what is left of what `take` gave. Raises PeerProtocolError (descriptors left over)."""
        if used < len(data):
            self._parts.append(data[used:] if used else data)
            self._count(len(data) - used)
        if not self._held:
            self.unfinished = 0
        elif used or not self.unfinished:
            self._number += 1
            self.unfinished = self._number
        for batch in self._batches:
            batch.end -= used
        if self._batches and self._batches[0].end <= 0:
            raise PeerProtocolError("file descriptors that belong to no message")

    def expect(self, size: int) -> None:
        """Say how many bytes, from the first unused one, make a whole message."""
        self._need = size

    def skip(self, size: int) -> None:
        """Throw the next bytes away as they come."""
        self._skip = size

    def peek_fds(self, count: int, at: int = 0) -> tuple[int, ...]:
        """Return the descriptors of the message that begins at `at` of what `take` gave.

        Raises PeerProtocolError if they are not there, or came with bytes before it.
        """
        if not count:
            return ()
        if self._batches and self._batches[0].end <= at:
            raise PeerProtocolError("file descriptors that belong to no message")
        if count > len(self._fds):
            raise PeerProtocolError(
                f"a message says it has {count} descriptors, {len(self._fds)} came"
            )
        return tuple(self._fds[:count])

    def drop_fds(self, count: int) -> None:
        """Give up the descriptors of a message: somebody else has them now."""
        del self._fds[:count]
        while count:
            batch = self._batches[0]
            taken = min(count, batch.left)
            batch.left -= taken
            count -= taken
            if not batch.left:
                del self._batches[0]

    def take_fds_before(self, end: int) -> list[int]:
        """Give up the descriptors that came with reads up to there: the caller closes them."""
        fds: list[int] = []
        while self._batches and self._batches[0].end <= end:
            count = self._batches.pop(0).left
            fds += self._fds[:count]
            del self._fds[:count]
        return fds

    def take_fds(self) -> list[int]:
        """Give up everything, at the end: the caller closes the descriptors."""
        fds = self._fds.copy()
        self._fds.clear()
        self._batches.clear()
        self._parts.clear()
        self._count(-self._held)
        return fds

    def dump(self, fds: Fds) -> ReceiveBufferDump:
        """Return all of it, with descriptors as indexes."""
        return ReceiveBufferDump(
            held=b"".join(self._parts),
            need=self._need,
            skip=self._skip,
            unfinished=self.unfinished,
            number=self._number,
            fds=fds.put_all(self._fds),
            batches=tuple((batch.left, batch.end) for batch in self._batches),
        )

    def load(self, dump: ReceiveBufferDump, fds: Sequence[int]) -> None:
        """Be as the one was that made the dump."""
        if dump.held:
            self.unread(dump.held)
        self._need = dump.need
        self._skip = dump.skip
        self.unfinished = dump.unfinished
        self._number = dump.number
        self._fds.extend(pick(fds, dump.fds))
        self._batches.extend(_FdBatch(left, end) for left, end in dump.batches)

    def _count(self, size: int) -> None:
        self._held += size
        if self._account is not None:
            self._account.bytes_held += size
