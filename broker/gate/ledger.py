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
# Spans of all names of a bus: what can be read, or written anew, while everybody waits. Beyond, what lies between the
# older ones counts as sandboxes' too.
MAX_SPANS: Final = 16384
# The buses that files are kept of.
MAX_FILES: Final = 16
# Lines of a file that say what others say already, before it is written anew.
MAX_SURPLUS: Final = 4096
# Bytes that are read of a file. It never gets as long: a line is of some 50 bytes.
MAX_FILE: Final = 2 * 1024 * 1024
_BEGINNING: Final = "sandboxed-names-"
_LINE: Final = re.compile(r"^([!-~]{1,255}) ([0-9]{20}) ([0-9]{20})$", re.ASCII | re.MULTILINE)
_NUMBER_SIZE: Final = 20  # digits in the file: a line can be changed where it is


class Spans:
    """Numbers, as ranges that do not touch: first and last of each, in order."""

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

    def dump(self) -> bytes:
        """Return them in few steps: for another process of this machine."""
        return self._ends.tobytes()

    def load(self, dump: bytes) -> None:
        """Have those of a dump. Raises ValueError."""
        self._ends.frombytes(dump)

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
        self._surplus = MAX_SURPLUS  # lines: more each time that writing it anew did not work out
        # What the files say of all buses, from when it is asked for until it is known which of them this is.
        self._rumours: dict[str, Spans] | None = None if folder is not None else {}
        self._last_line = ("", -1)  # its prefix, and the last number of its span

    def __contains__(self, unique_name: str) -> bool:
        return _holds(self._spans, unique_name)

    def is_doubtful(self, unique_name: str) -> bool:
        """Say whether it takes the bus's id to know whether the name is in here."""
        if self._rumours is None:
            assert self._folder is not None
            self._rumours = _read_all(self._folder)
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
        most = len(self) + self._surplus
        if self._size > most * len(_make_line(prefix, 0, 0)):
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

    def dump(self) -> tuple[tuple[str, bytes], ...]:
        """Return all spans."""
        return tuple((prefix, spans.dump()) for prefix, spans in self._spans.items())

    def load(self, bus_id: str, dump: tuple[tuple[str, bytes], ...]) -> None:
        """Have the spans of a dump, which are those of the file. Raises ValueError."""
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
        """Leave a line as it is that was cut off, and have the next one apart from it."""
        if self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":
            self._write_at(self._size, b"\n")

    def _write_at(self, at: int, data: bytes) -> None:
        if os.pwrite(self._fd, data, at) != len(data):
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size = at + len(data)

    def _write_anew(self) -> None:
        """Write one line for each span. If it does not work out the old file says the same."""
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
    """Return what is in a file; lines that were not written whole are none."""
    found: dict[str, list[tuple[int, int]]] = {}
    _read_into(found, path)
    return _merged(found)


def _merged(found: dict[str, list[tuple[int, int]]]) -> dict[str, Spans]:
    return {prefix: Spans(spans) for prefix, spans in found.items()}


def _read_into(found: dict[str, list[tuple[int, int]]], path: Path) -> None:
    try:
        with os.fdopen(open_file(path, os.O_RDONLY), "rb") as file:
            # The newest names, if it is longer than we made it: a bus may still have what those sent.
            file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_FILE))
            text = file.read(MAX_FILE).decode(errors="replace")
    except FileNotFoundError:
        return
    except OSError as exc:
        # A gate that does not start would be worse than one that does not know who was there before it.
        LOGGER.error("%s: %s: who was in a sandbox is not known", path, exc.strerror)  # noqa: TRY400
        return
    for prefix, low, high in _LINE.findall(text):
        first, last = int(low), int(high)
        if first <= last < 1 << 63:
            found.setdefault(prefix, []).append((first, last))


def _drop_old(path: Path) -> None:
    """Remove files of buses that were before, all but the newest."""
    with contextlib.suppress(OSError):
        others = [one for one in path.parent.glob(f"{_BEGINNING}*") if one != path]
        others.sort(key=lambda one: one.lstat().st_mtime)
        for one in others[:-MAX_FILES]:
            with contextlib.suppress(OSError):
                one.unlink()
