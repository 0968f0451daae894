"""Frames of the control connection, and the splitting of snapshots into frames. No I/O.

A frame is a little-endian uint32 length and as many bytes of msgpack, which encode one Envelope.
File descriptors travel with the first byte of a frame (SCM_RIGHTS). `Envelope.fds` is the number of
the frame's descriptors.
"""

import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

import msgspec

from broker.control_protocol.messages import Envelope, SandboxState, Snapshot
from broker.posix.descriptors import SCM_MAX_FD
from broker.wire.errors import PeerProtocolError

# An access list of 10 000 rules takes about 2 MiB, and no list takes more than 8 MiB. Snapshots
# come in parts.
MAX_FRAME: Final = 32 * 1024 * 1024
MAX_FRAME_FDS: Final = SCM_MAX_FD
# Bytes of a part. A single sandbox may have more, and still stays far below MAX_FRAME.
MAX_PART_BYTES: Final = 8 * 1024 * 1024
# Replaces the count in `Envelope.fds` when the receiver had no room for the descriptors.
LOST: Final = -1
_LENGTH: Final = struct.Struct("<I")
_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Envelope)


def make_frame(envelope: Envelope) -> bytes:
    """Return the bytes of a frame."""
    body = _encoder.encode(envelope)
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """A reader that turns bytes and descriptors into envelopes with descriptors.

    Descriptors that no envelope has claimed yet belong to the reader. `take_all_fds` gives up these
    descriptors.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        # None stands for all descriptors of a frame, when this process had no room for them.
        self._fds: deque[int | None] = deque()

    def feed(
        self, data: bytes, fds: Sequence[int] = (), *, cut: bool = False
    ) -> list[tuple[Envelope, list[int]]]:
        """Return the envelopes that are complete now. Raises PeerProtocolError.

        `cut` says that the process had no room for the descriptors that came with `data`. The
        envelope of these descriptors then has LOST as the number of descriptors.
        """
        self._buffer += data
        self._fds.extend(fds)
        if cut:
            self._fds.append(None)
        complete = []
        while (item := self._next()) is not None:
            complete.append(item)
        return complete

    def take_all_fds(self) -> list[int]:
        """Give every unclaimed descriptor to the caller, which closes the descriptors."""
        fds = [fd for fd in self._fds if fd is not None]
        self._fds.clear()
        return fds

    def rest(self) -> tuple[bytes, tuple[int, ...]]:
        """Return a copy of the bytes and the descriptors of an unfinished frame."""
        return bytes(self._buffer), tuple(fd for fd in self._fds if fd is not None)

    def _next(self) -> tuple[Envelope, list[int]] | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > MAX_FRAME:
            raise PeerProtocolError(f"control frame of {length} bytes")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        try:
            envelope = _decoder.decode(bytes(self._buffer[_LENGTH.size : end]))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise PeerProtocolError(f"control frame: {exc}") from exc
        del self._buffer[:end]
        if envelope.fds > 0 and self._fds and self._fds[0] is None:
            self._fds.popleft()
            return msgspec.structs.replace(envelope, fds=LOST), []
        if not 0 <= envelope.fds <= len(self._fds):
            raise PeerProtocolError("control frame with too few descriptors")
        claimed = list(islice(self._fds, envelope.fds))
        if None in claimed:
            raise PeerProtocolError("control frame with too few descriptors")
        return envelope, [fd for _ in claimed if (fd := self._fds.popleft()) is not None]


def split_snapshot(
    head: Snapshot, states: Iterable[SandboxState], most: float
) -> Iterator[Snapshot]:
    """Yield `head` with these sandboxes, in parts of up to `most` bytes.

    Every part except the last has `more` set.
    """
    part: list[SandboxState] = []
    size = 0
    for state in states:
        its_size = len(_encoder.encode(state))
        if part and size + its_size > most:
            yield msgspec.structs.replace(head, sandboxes=tuple(part), more=True)
            part, size = [], 0
        part.append(state)
        size += its_size
    yield msgspec.structs.replace(head, sandboxes=tuple(part))
