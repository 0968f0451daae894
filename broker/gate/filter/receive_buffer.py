"""The unfinished end of a byte stream, and the descriptors that came with it. No I/O.

Descriptors arrive with a read, and belong to a message that has bytes in that read. Descriptors that no message has
claimed when all bytes of their read are consumed are an attack or a bug, because a later message would get them:

    read 1   ....AAAA AAAA|BBBB     fds 3 4     A claims 3, B claims 4: B has bytes in read 1
    read 2   BBBB BBBB CCCC         fds 5       C claims 5
    read 3   CCCC                   fds 6       error if C is consumed and 6 is left
"""

from collections.abc import Sequence
from typing import Final, Protocol

from broker.gate.dumps import Fds, ReceiveBufferDump, pick
from broker.wire.errors import PeerProtocolError

# Descriptors of a connection that no message has claimed: those of one message, sent in two parts.
MAX_UNCLAIMED_FDS: Final = 253
# Parts smaller than this are joined, because an object for each byte that trickles in would take many bytes.
SMALL: Final = 4096


class Account(Protocol):
    """The account of the held bytes."""

    bytes_held: int


class _FdBatch:
    """The descriptors of a read. `end` is the end of the read, from the beginning of the held bytes."""

    __slots__ = ("end", "left")

    def __init__(self, left: int, end: int) -> None:
        self.left = left
        self.end = end


class ReceiveBuffer:
    """The receive buffer of a direction of a connection."""

    def __init__(self, account: Account | None) -> None:
        self._account: Final = account
        self._parts: list[bytes | bytearray] = []
        self._held = 0
        self._need = 0
        self._skip = 0
        # The number of the message that is held in part, 0 for none.
        self.unfinished = 0
        self._number = 0  # of the last message that was held in part
        # Lists, because they are short and nearly always empty.
        self._fds: Final[list[int]] = []
        self._batches: Final[list[_FdBatch]] = []

    @property
    def has_fds(self) -> bool:
        """Return whether descriptors wait for their message."""
        return bool(self._fds)

    @property
    def fd_count(self) -> int:
        """The number of descriptors that wait for their message."""
        return len(self._fds)

    @property
    def is_idle(self) -> bool:
        """Return whether nothing is held or skipped, so that the next bytes can be used as they arrive."""
        return not (self._parts or self._fds or self._skip)

    @property
    def held(self) -> int:
        """The number of held bytes."""
        return self._held

    def feed(self, data: bytes, fds: Sequence[int]) -> bytes | None:
        """Return the held bytes and `data`, once they are as many as expected."""
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
        """Return all held bytes, however few."""
        self._need = 0
        whole = b"".join(self._parts) if len(self._parts) > 1 else bytes(self._parts[0])
        self._parts.clear()
        self._count(-self._held)
        return whole

    def unread(self, data: bytes) -> None:
        """Hold all bytes that `feed` returned."""
        self._parts.append(data)
        self._count(len(data))

    def consume(self, data: bytes, used: int) -> None:
        """Hold the bytes behind the first `used` ones that `feed` returned.

        Raises PeerProtocolError if descriptors are left over.
        """
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
        """Set how many bytes, from the first held one, make a whole message."""
        self._need = size

    def skip(self, size: int) -> None:
        """Drop the next bytes as they arrive."""
        self._skip = size

    def peek_fds(self, count: int, at: int = 0) -> tuple[int, ...]:
        """Return the descriptors of the message that begins at `at` in the bytes that `feed` returned.

        Raises PeerProtocolError if they are missing, or came with bytes before the message.
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
        """Give up the descriptors of a message, which the caller has taken."""
        del self._fds[:count]
        while count:
            batch = self._batches[0]
            taken = min(count, batch.left)
            batch.left -= taken
            count -= taken
            if not batch.left:
                del self._batches[0]

    def take_fds_before(self, end: int) -> list[int]:
        """Give up the descriptors of reads that end at `end` or before: the caller closes them."""
        fds: list[int] = []
        while self._batches and self._batches[0].end <= end:
            count = self._batches.pop(0).left
            fds += self._fds[:count]
            del self._fds[:count]
        return fds

    def take_fds(self) -> list[int]:
        """Give up everything at the end of the connection: the caller closes the descriptors."""
        fds = self._fds.copy()
        self._fds.clear()
        self._batches.clear()
        self._parts.clear()
        self._count(-self._held)
        return fds

    def dump(self, fds: Fds) -> ReceiveBufferDump:
        """Return the state, with descriptors as indexes."""
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
        """Restore the state from `dump`."""
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
