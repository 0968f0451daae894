"""The unique names of one bus that were ever given to connections of sandboxes.

A bus gives no unique name twice, so a name that stands here is never a host's, however long its connection is gone:
a bus may still carry what that one sent. Names count upwards, so they are kept as spans of numbers, which are as
many as the times that a host connected between two sandboxes.

The file is for the next gate if this one dies: its connections are gone then, and their messages are not. Each name
is written before the app may say anything under it. What cannot be written ends the connection.

    gate                    file                     bus
     | <- Hello's answer, :1.7 ----------------------- |
     | -- :1. 7 7 ---------> |                         |
     | (the app is told its name, and may speak)       |
"""

import contextlib
import errno
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# Spans of all names of a bus: a megabyte. Beyond, what lies between the older ones counts as sandboxes' too.
MAX_SPANS: Final = 65536
# The buses that files are kept of.
MAX_FILES: Final = 16
# Lines of a file that say what others say already, before it is written anew.
MAX_SURPLUS: Final = 4096
_BEGINNING: Final = "sandboxed-names-"
_LINE: Final = re.compile(r"(\S+) ([0-9]{20}) ([0-9]{20})", re.ASCII)
_NUMBER_SIZE: Final = 20  # digits in the file: a line can be changed where it is


class Spans:
    """Numbers, as ranges that do not touch: first and last of each, in order."""

    def __init__(self) -> None:
        self._ends: Final = array("Q")

    def __len__(self) -> int:
        return len(self._ends) // 2

    def __iter__(self) -> Iterator[tuple[int, int]]:
        ends = self._ends
        return ((ends[at], ends[at + 1]) for at in range(0, len(ends), 2))

    def __contains__(self, number: int) -> bool:
        # An odd place is within a span; its last number has the place behind it.
        at = bisect_right(self._ends, number)
        return at % 2 == 1 or (at > 0 and self._ends[at - 1] == number)

    def add(self, first: int, last: int) -> None:
        """Add all from `first` to `last`, both included."""
        ends = self._ends
        low = bisect_right(ends, first)
        low -= low % 2  # the first span that may touch the new one
        if low and ends[low - 1] >= first - 1:
            low -= 2
        high = low
        while high < len(ends) and ends[high] <= last + 1:
            first, last = min(first, ends[high]), max(last, ends[high + 1])
            high += 2
        ends[low:high] = array("Q", (first, last))

    def thin_out(self) -> None:
        """Have half as many of the older ones: what lies between two of them is added."""
        ends = self._ends
        older = len(ends) // 2
        older -= older % 4
        merged = array("Q")
        for at in range(0, older, 4):
            merged.extend((ends[at], ends[at + 3]))
        ends[:older] = merged


class Ledger:
    """The names of one bus. Without a folder they are in memory alone."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder: Final = folder
        self._spans: Final[dict[str, Spans]] = {}  # by all of the name before its number
        self._path: Path | None = None
        self._fd = -1
        self._size = 0  # of the file
        # What the files say of all buses, until it is known which of them this is.
        self._rumours = _read_all(folder) if folder is not None else {}
        self._lines = 0
        self._last_line = ("", -1)  # its prefix, and the last number of its span

    def __contains__(self, unique_name: str) -> bool:
        return _holds(self._spans, unique_name)

    def is_doubtful(self, unique_name: str) -> bool:
        """Say whether it takes the bus's id to know whether the name is in here."""
        return _holds(self._rumours, unique_name)

    def __len__(self) -> int:
        return sum(len(spans) for spans in self._spans.values())

    def add(self, unique_name: str) -> None:
        """Take note of a name. Raises OSError if it cannot be written down."""
        prefix, number = _parse(unique_name)
        spans = self._spans.get(prefix, Spans())
        if number in spans:
            return
        self._write_down(prefix, number)
        self._spans.setdefault(prefix, spans).add(number, number)
        if len(self) > MAX_SPANS:
            max(self._spans.values(), key=len).thin_out()
        if self._lines > len(self) + MAX_SURPLUS:
            self._write_anew()

    def meet(self, bus_id: str) -> None:
        """Have the names that were written down of that bus."""
        self._rumours = {}
        self._path = self._find_path(bus_id)
        if self._path is not None:
            self._spans.update(_read(self._path))
            _drop_old(self._path)

    def move(self, bus_id: str) -> None:
        """Have the names of another bus: the one before is no more."""
        self.close()
        self._spans.clear()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
        self.meet(bus_id)

    def close(self) -> None:
        """Close the file, which stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def dump(self) -> tuple[tuple[str, int, int], ...]:
        """Return all spans."""
        return tuple(
            (prefix, first, last) for prefix, spans in self._spans.items() for first, last in spans
        )

    def load(self, bus_id: str, spans: tuple[tuple[str, int, int], ...]) -> None:
        """Have the spans of a dump, which are those of the file."""
        if bus_id:
            self._rumours = {}
        self._path = self._find_path(bus_id) if bus_id else None
        for prefix, first, last in spans:
            self._spans.setdefault(prefix, Spans()).add(first, last)

    # -- the file ---------------------------------------------------------------------------------

    def _find_path(self, bus_id: str) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"{_BEGINNING}{bus_id}"  # 32 hex digits: see sasl.py

    def _write_down(self, prefix: str, number: int) -> None:
        if self._path is None:
            return
        if self._fd < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._path, flags, 0o600)
            self._size = os.fstat(self._fd).st_size
            self._last_line = ("", -1)
        if self._last_line == (prefix, number - 1):
            at, data = self._size - _NUMBER_SIZE - 1, f"{number:0{_NUMBER_SIZE}d}\n".encode()
        else:
            at, data = self._size, _make_line(prefix, number, number)
            self._lines += 1
        written = os.pwrite(self._fd, data, at)
        if written != len(data):
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size = at + len(data)
        self._last_line = (prefix, number)

    def _write_anew(self) -> None:
        """Write one line for each span. If it does not work out the old file says the same."""
        if self._path is None:
            return
        new = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with os.fdopen(os.open(new, flags, 0o600), "wb") as file:
                file.write(b"".join(_make_line(*span) for span in self.dump()))
            new.rename(self._path)
            self.close()
        self._lines = len(self)


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
    found: dict[str, Spans] = {}
    for path in folder.glob(f"{_BEGINNING}*"):
        for prefix, spans in _read(path).items():
            for first, last in spans:
                found.setdefault(prefix, Spans()).add(first, last)
    return found


def _read(path: Path) -> dict[str, Spans]:
    """Return what is in a file; lines that were not written whole are none."""
    found: dict[str, Spans] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        if (fields := _LINE.fullmatch(line)) is not None:
            first, last = int(fields[2]), int(fields[3])
            if first <= last < 1 << 63:
                found.setdefault(fields[1], Spans()).add(first, last)
    return found


def _drop_old(path: Path) -> None:
    """Remove files of buses that were before, all but the newest."""
    with contextlib.suppress(OSError):
        others = [one for one in path.parent.glob(f"{_BEGINNING}*") if one != path]
        others.sort(key=lambda one: one.stat().st_mtime)
        for one in others[:-MAX_FILES]:
            one.unlink(missing_ok=True)
