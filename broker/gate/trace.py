"""What the gate writes down of messages for whoever looks into its death: a ring in a file that it has mapped.

Only of messages that are judged: those whose header is known pass on the short way, which writes nothing. A write is one
into memory of our own; the kernel keeps it when we are killed. Before `trace_into` nothing is written.
"""

import itertools
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

from broker.wire.header import Header, parse_header
from broker.wire.trace import FROM_APP, FROM_BUS, SIZE, Note

_ring: memoryview | None = None
_numbers: Iterator[int] = itertools.count(1)


def parse_from_app(sandbox: str, data: bytes, pos: int) -> Header:
    """Parse the header of a message that begins at `pos`. Raises PeerProtocolError."""
    if _ring is not None:
        Note(next(_numbers), time.time(), FROM_APP, sandbox).write(_ring, data, pos)
    return parse_header(data, pos)


def parse_from_bus(sandbox: str, data: bytes, pos: int) -> Header:
    """Parse the header of a message that begins at `pos`. Raises PeerProtocolError."""
    if _ring is not None:
        Note(next(_numbers), time.time(), FROM_BUS, sandbox).write(_ring, data, pos)
    return parse_header(data, pos)


def trace_into(path: Path | None) -> None:
    """Write to that file from now on, or no more. Raises OSError.

    It takes the place of what is there: another gate may still have that one mapped.
    """
    global _ring  # noqa: PLW0603 - one a process, as its death is
    _ring = None
    if path is None:
        return
    new = path.with_name(f"{path.name}.{os.getpid()}")
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        # Room now: a page that the file system has none for would be the end of us later.
        os.posix_fallocate(fd, 0, SIZE)
        ring = memoryview(mmap.mmap(fd, SIZE))
        new.rename(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    _ring = ring
