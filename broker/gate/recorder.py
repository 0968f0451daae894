"""Recorder of the last headers in the gate, to explain the death of a gate.

The headers are in two rings in a mapped file. The first ring has the messages that were judged. The
second ring has the known messages, or the first message of each run of known messages. A write goes
to the gate's own memory, which the kernel keeps when the gate is killed. Nothing is written before
`trace_into`.
"""

import itertools
import mmap
import os
import time
from collections.abc import Callable, Iterator
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
    """The recorder for the headers of one sandbox's messages.

    `parse_from_app` and `parse_from_bus` are for messages that are judged. `note_from_app` and
    `note_from_bus` are for known messages. In a run of known messages only the first is recorded.
    """

    __slots__ = ("_sandbox", "note_from_app", "note_from_bus")

    def __init__(self, sandbox: str) -> None:
        self._sandbox: Final = sandbox
        name = make_name(sandbox)
        self.note_from_app: Final = _make_note(name, FROM_APP)
        self.note_from_bus: Final = _make_note(name, FROM_BUS)

    def parse_from_app(self, data: bytes, pos: int) -> Header:
        """Record and parse the header at `pos`. Raises PeerProtocolError."""
        _note(self._sandbox, FROM_APP, data, pos)
        return parse_header(data, pos)

    def parse_from_bus(self, data: bytes, pos: int) -> Header:
        """Record and parse the header at `pos`. Raises PeerProtocolError."""
        _note(self._sandbox, FROM_BUS, data, pos)
        return parse_header(data, pos, READ_LIMITS)


def _note(sandbox: str, direction: int, data: bytes, pos: int) -> None:
    if _rings is not None:
        note = RecordedHeader(next(_numbers), time.time(), direction, sandbox)
        note.write(_rings, next(_judged), data, pos)


def _make_note(name: bytes, direction: int) -> Callable[[bytes, int, int], None]:
    """Return the function that records a known header: data, position and size of the header.

    Every known message costs a call of such a function. A closure takes 0.15 µs less than a method.
    """
    name_size = len(name)
    slot, room = known_slot(name_size)
    pack_into = slot.pack_into

    def note(data: bytes, pos: int, size: int) -> None:
        if _rings is not None:
            if size > room:  # noqa: PLR1730 - min() costs a call for each message
                size = room
            header = data[pos : pos + size]
            number, at = next(_numbers), next(_known)
            pack_into(_rings, at, number, _now(), direction, name_size, size, name, header)

    return note


def trace_into(path: Path | None) -> None:
    """Record headers in the file `path` from now on. None ends the recording.

    An existing file is replaced and not overwritten, because another gate may still have the file
    mapped. Raises OSError.
    """
    global _rings  # noqa: PLW0603 - a process has one trace file
    _rings = None
    if path is None:
        return
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.unlink(missing_ok=True)  # of an earlier process with the same pid
    fd = open_file(new, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        # The space is allocated now. Otherwise a write to a page without space would later end the
        # gate by SIGBUS.
        os.posix_fallocate(fd, 0, SIZE)
        rings = memoryview(mmap.mmap(fd, SIZE))
        new.rename(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    _rings = rings
