"""Ledger of the unique names on one bus that connections of sandboxes have ever had.

A bus may still deliver a message of a connection that has gone. A bus gives no unique name twice.
So a name in the ledger never belongs to a host, however long the connection is gone. Unique names
count upwards. So the names are kept as spans of numbers. A new span begins each time that a host
connects between two sandboxes.

If this gate dies, all connections end, but messages of these connections may still be on the bus.
The file tells the next gate about such names. So a name is written before the app may send with the
name. If the write fails, the connection is ended.

    app          gate                    file           bus
     |             | <- reply to Hello, :1.7 ------------ |
     |             | -- ":1 7 7" ---------> |             |
     | <- :1.7 --- |                        |             |
     | -- call --> | -- call --------------------------> |
     |             X (dies)                 |             |
                  next gate                 |             |
                   | <- ":1 7 7" ---------- |             |
                   | <- call of :1.7 -------------------- | (refused: :1.7 is no host)

Files are named after the id of the bus, which the gate learns in the handshake of the first
connection (`meet`). Before that, a name in any file is doubtful (`is_doubtful`), and a question
about such a name waits (bus_id_query.py). A restarted bus has another id, and gives the same names
again. So the ledger then begins empty (`move`).
"""

import contextlib
import errno
import logging
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from broker.posix.files import open_file

LOGGER: Final = logging.getLogger(__name__)
# Spans of all names of a bus. Reading or rewriting this many spans fits into a turn of the loop.
# Beyond that, the names between the older spans count as sandboxes' names too.
MAX_SPANS: Final = 16384
# The number of files of other buses that are kept, newest first.
MAX_FILES: Final = 16
# The number of redundant lines before a file is rewritten.
MAX_SURPLUS: Final = 4096
# Bytes to read from a file. A file of the gate is shorter, because a line has some 50 bytes.
MAX_FILE: Final = 2 * 1024 * 1024
_BEGINNING: Final = "sandboxed-names-"
_LINE: Final = re.compile(r"^([!-~]{1,255}) ([0-9]{20}) ([0-9]{20})$", re.ASCII | re.MULTILINE)
_NUMBER_SIZE: Final = 20  # digits. The size is fixed, because lines are changed in place.


class Spans:
    """A set of numbers, as an ordered list of separate ranges (first, last)."""

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        self._ends: Final = array("Q")
        ends = self._ends
        for first, last in sorted(spans):
            if ends and first <= ends[-1] + 1:
                ends[-1] = max(last, ends[-1])
            else:
                ends.extend((first, last))

    def __len__(self) -> int:
        return len(self._ends) // 2

    def __iter__(self) -> Iterator[tuple[int, int]]:
        ends = self._ends
        return ((ends[at], ends[at + 1]) for at in range(0, len(ends), 2))

    def __contains__(self, number: int) -> bool:
        # An odd place is within a span. The last number of a span has the even place behind it.
        at = bisect_right(self._ends, number)
        return at % 2 == 1 or (at > 0 and self._ends[at - 1] == number)

    def add(self, first: int, last: int) -> None:
        """Add the numbers from `first` to `last`, both included."""
        ends = self._ends
        low = bisect_right(ends, first)
        low -= low % 2  # the first span that may touch the new span
        if low and ends[low - 1] >= first - 1:
            low -= 2
        high = low
        while high < len(ends) and ends[high] <= last + 1:
            first, last = min(first, ends[high]), max(last, ends[high + 1])
            high += 2
        ends[low:high] = array("Q", (first, last))

    def dump(self) -> bytes:
        """Return the spans in native byte order, for a process of the same machine."""
        return self._ends.tobytes()

    def load(self, dump: bytes) -> None:
        """Restore the spans from `dump`. Raises ValueError."""
        self._ends.frombytes(dump)

    def thin_out(self) -> None:
        """Merge the older half of the spans in pairs, and so add the numbers between."""
        ends = self._ends
        older = len(ends) // 2
        older -= older % 4
        merged = array("Q")
        for at in range(0, older, 4):
            merged.extend((ends[at], ends[at + 3]))
        ends[:older] = merged


class NameLedger:
    """The sandboxed names of one bus. Without a folder, the ledger is only in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder: Final = folder
        self._spans: Final[dict[str, Spans]] = {}  # by the part of a name before the number
        self._path: Path | None = None
        self._fd = -1
        self._size = 0  # of the file
        self._surplus = MAX_SURPLUS  # lines; grows with each failed rewrite
        # The names in the files of all buses. The files are read on demand, until the id of this
        # bus is known. None means that the files were not read yet.
        self._rumours: dict[str, Spans] | None = None if folder is not None else {}
        self._last_line = ("", -1)  # prefix and last number

    def __contains__(self, unique_name: str) -> bool:
        return _holds(self._spans, unique_name)

    def is_doubtful(self, unique_name: str) -> bool:
        """Return whether the answer for a name depends on the unknown id of the bus."""
        if self._rumours is None:
            assert self._folder is not None
            self._rumours = _read_all(self._folder)
        return _holds(self._rumours, unique_name)

    def __len__(self) -> int:
        return sum(len(spans) for spans in self._spans.values())

    def add(self, unique_name: str) -> None:
        """Add a name to the ledger and the file. Raises OSError if the write fails."""
        self._add(*_parse(unique_name))

    def _add(self, prefix: str, number: int) -> None:
        spans = self._spans.get(prefix, Spans())
        if number in spans:
            return
        self._write_down(prefix, number)
        self._spans.setdefault(prefix, spans).add(number, number)
        if len(self) > MAX_SPANS:
            max(self._spans.values(), key=len).thin_out()
        most = len(self) + self._surplus
        if self._size > most * len(_make_line(prefix, 0, 0)):
            self._write_anew()

    def meet(self, bus_id: str) -> None:
        """Add the names in the file of this bus, whose id is now known.

        Raises OSError if a write fails.
        """
        self._rumours = {}
        self._path = self._find_path(bus_id)
        if self._path is None:
            return
        early = dict(self._spans)
        self._spans.clear()
        self._spans.update(_read(self._path))
        _drop_old(self._path)
        for prefix, spans in early.items():
            for first, last in spans:
                for number in range(first, last + 1):
                    self._add(prefix, number)

    def move(self, bus_id: str) -> None:
        """Replace all names by those of a new bus, and remove the file of the former bus."""
        self.close()
        self._spans.clear()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
        self.meet(bus_id)

    def close(self) -> None:
        """Close the file. The file stays on disk."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def dump(self) -> tuple[tuple[str, bytes], ...]:
        """Return all spans."""
        return tuple((prefix, spans.dump()) for prefix, spans in self._spans.items())

    def load(self, bus_id: str, dump: tuple[tuple[str, bytes], ...]) -> None:
        """Restore the spans from `dump`, which is equal to the file. Raises ValueError."""
        if bus_id:
            self._rumours = {}
        self._path = self._find_path(bus_id) if bus_id else None
        for prefix, spans in dump:
            self._spans.setdefault(prefix, Spans()).load(spans)

    # -- the file ---------------------------------------------------------------------------------

    def _find_path(self, bus_id: str) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"{_BEGINNING}{bus_id}"  # 32 hex digits: see sasl.py

    def _write_down(self, prefix: str, number: int) -> None:
        if self._path is None:
            return
        if self._fd < 0:
            self._fd = open_file(self._path, os.O_RDWR | os.O_CREAT)
            self._size = os.fstat(self._fd).st_size
            self._last_line = ("", -1)
            self._end_last_line()
        if self._last_line == (prefix, number - 1):
            at, data = self._size - _NUMBER_SIZE - 1, f"{number:0{_NUMBER_SIZE}d}\n".encode()
        else:
            at, data = self._size, _make_line(prefix, number, number)
        self._write_at(at, data)
        self._last_line = (prefix, number)

    def _end_last_line(self) -> None:
        """End a line that was cut off, so that the next line stands apart."""
        if self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":
            self._write_at(self._size, b"\n")

    def _write_at(self, at: int, data: bytes) -> None:
        try:
            written = os.pwrite(self._fd, data, at)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, str(self._path)) from exc
        if written != len(data):
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._size = at + len(data)

    def _write_anew(self) -> None:
        """Rewrite the file, with a line for each span. After a failure the old file is kept."""
        if self._path is None:
            return
        self._surplus += MAX_SURPLUS
        new = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with os.fdopen(os.open(new, flags, 0o600), "wb") as file:
                file.writelines(
                    _make_line(prefix, *span)
                    for prefix, spans in self._spans.items()
                    for span in spans
                )
            new.rename(self._path)
            self.close()
            self._surplus = MAX_SURPLUS


def _parse(unique_name: str) -> tuple[str, int]:
    prefix, _, digits = unique_name.rpartition(".")
    number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else -1
    return (prefix, number) if number >= 0 else (unique_name, 0)


def _make_line(prefix: str, first: int, last: int) -> bytes:
    return f"{prefix} {first:0{_NUMBER_SIZE}d} {last:0{_NUMBER_SIZE}d}\n".encode()


def _holds(spans: dict[str, Spans], unique_name: str) -> bool:
    prefix, number = _parse(unique_name)
    return prefix in spans and number in spans[prefix]


def _read_all(folder: Path) -> dict[str, Spans]:
    found: dict[str, list[tuple[int, int]]] = {}
    for path in folder.glob(f"{_BEGINNING}*"):
        _read_into(found, path)
    return _merged(found)


def _read(path: Path) -> dict[str, Spans]:
    """Return the spans in a file. Incomplete lines are skipped."""
    found: dict[str, list[tuple[int, int]]] = {}
    _read_into(found, path)
    return _merged(found)


def _merged(found: dict[str, list[tuple[int, int]]]) -> dict[str, Spans]:
    return {prefix: Spans(spans) for prefix, spans in found.items()}


def _read_into(found: dict[str, list[tuple[int, int]]], path: Path) -> None:
    try:
        with os.fdopen(open_file(path, os.O_RDONLY), "rb") as file:
            # If the file is too long, the newest names are read. The bus may still have messages of
            # these names.
            file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_FILE))
            text = file.read(MAX_FILE).decode(errors="replace")
    except FileNotFoundError:
        return
    except OSError as exc:
        # A gate that does not start would be worse than a gate that does not know earlier names.
        text = "%s: %s: the sandboxed names of an earlier gate are not known; remove or repair the file"
        LOGGER.error(text, path, exc.strerror)  # noqa: TRY400
        return
    for prefix, low, high in _LINE.findall(text):
        first, last = int(low), int(high)
        if first <= last < 1 << 63:
            found.setdefault(prefix, []).append((first, last))


def _drop_old(path: Path) -> None:
    """Remove the files of other buses, except for the newest files."""
    with contextlib.suppress(OSError):
        others = [one for one in path.parent.glob(f"{_BEGINNING}*") if one != path]
        others.sort(key=lambda one: one.lstat().st_mtime)
        for one in others[:-MAX_FILES]:
            with contextlib.suppress(OSError):
                one.unlink()
