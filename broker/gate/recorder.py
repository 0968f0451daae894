"""The last headers that the gate has handled, in two rings in a mapped file, for an inquiry after it died.

One ring has each message that was judged. The other has known messages, or the first one of each run of them. A write
goes into the gate's own memory, which the kernel keeps when the gate is killed. Nothing is written before `trace_into`.
"""

import itertools
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from broker.control_protocol.trace_file import (
    FROM_APP,
    FROM_BUS,
    RING,
    SIZE,
    SLOT,
    RecordedHeader,
    known_slot,
    make_name,
)
from broker.posix.files import open_file
from broker.wire.header import READ_LIMITS, Header, parse_header

_rings: memoryview | None = None
_numbers: Iterator[int] = itertools.count(1)
# The next slot of each ring.
_judged: Iterator[int] = itertools.cycle(range(0, RING, SLOT))
_known: Iterator[int] = itertools.cycle(range(RING, SIZE, SLOT))

_now: Final = time.time


class HeaderRecorder:
    """Records the headers of one sandbox's messages.

    `note_from_app` and `note_from_bus` are for known messages.
    """

    __slots__ = ("_name", "_name_size", "_pack_into", "_room", "_sandbox")

    def __init__(self, sandbox: str) -> None:
        self._sandbox: Final = sandbox
        self._name: Final = make_name(sandbox)
        self._name_size: Final = len(self._name)
        slot, self._room = known_slot(self._name_size)
        self._pack_into: Final = slot.pack_into

    # Each known message costs a call of one of these two, so they are the same with another constant.

    def note_from_app(self, data: bytes, pos: int, size: int) -> None:
        """Write down a known header of the app."""
        if _rings is not None:
            size = min(size, self._room)
            self._pack_into(
                _rings,
                next(_known),
                next(_numbers),
                _now(),
                FROM_APP,
                self._name_size,
                size,
                self._name,
                data[pos : pos + size],
            )

    def note_from_bus(self, data: bytes, pos: int, size: int) -> None:
        """Write down a known header of the bus."""
        if _rings is not None:
            size = min(size, self._room)
            self._pack_into(
                _rings,
                next(_known),
                next(_numbers),
                _now(),
                FROM_BUS,
                self._name_size,
                size,
                self._name,
                data[pos : pos + size],
            )

    def parse_from_app(self, data: bytes, pos: int) -> Header:
        """Write down and parse the header that begins at `pos`. Raises PeerProtocolError."""
        _note(self._sandbox, FROM_APP, data, pos)
        return parse_header(data, pos)

    def parse_from_bus(self, data: bytes, pos: int) -> Header:
        """Write down and parse the header that begins at `pos`. Raises PeerProtocolError."""
        _note(self._sandbox, FROM_BUS, data, pos)
        return parse_header(data, pos, READ_LIMITS)


def _note(sandbox: str, direction: int, data: bytes, pos: int) -> None:
    if _rings is not None:
        note = RecordedHeader(next(_numbers), time.time(), direction, sandbox)
        note.write(_rings, next(_judged), data, pos)


def trace_into(path: Path | None) -> None:
    """Write to that file from now on, or no more. Raises OSError.

    It takes the place of what is there: another gate may still have that one mapped.
    """
    global _rings  # noqa: PLW0603 - one a process, as its death is
    _rings = None
    if path is None:
        return
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.unlink(missing_ok=True)  # of a process that had our number
    fd = open_file(new, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        # Room now: a page that the file system has none for would be the end of us later.
        os.posix_fallocate(fd, 0, SIZE)
        rings = memoryview(mmap.mmap(fd, SIZE))
        new.rename(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    _rings = rings
