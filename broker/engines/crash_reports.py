"""What is kept of a gate that died: a text file with when and how, and the headers of its last messages.

The newest few stay, in the runtime folder. The gate wrote the headers (broker/gate/recorder.py); bodies are never in there.
"""

import logging
import os
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from broker.control_protocol.trace_file import SIZE, describe, read_rings
from broker.posix.files import open_file, read_small, write_file

LOGGER: Final = logging.getLogger(__name__)
TRACE: Final = "gate-trace"
# Where a gate that systemd started puts the trace of one that died before it.
MOVED: Final = "gate-trace.old"
MAX_CRASHES: Final = 5
_PATTERN: Final = "gate-crash-*.txt"
# Far longer than the line that we write.
_MAX_FIRST_LINE: Final = 1000
# Of another version of the gate it may be larger.
_MAX_TRACE: Final = 16 * SIZE


def keep_crash(
    folder: Path, pid: int, status: int | None, now: float, *, unseen: bool = False
) -> str:
    """Write down that the gate died, and return that in a line.

    `status` is what `os.waitpid` gives; None: it was not ours to wait for. `unseen`: it died some time before.
    """
    when = datetime.fromtimestamp(now, UTC)
    at = f"{'before' if unseen else 'at'} {when:%Y-%m-%d %H:%M:%S} UTC"
    who = f"the gate (process {pid})" if pid else "a gate"
    line = f"{who} {_describe_end(status)} {at}"
    path = folder / f"gate-crash-{when:%Y%m%dT%H%M%S.%f}-{pid}.txt"
    trace = find_trace(folder)
    try:
        entries = read_rings(read_small(trace, _MAX_TRACE)) if trace.is_file() else []
        lines = [f"{_describe_time(entry.when)} {describe(entry)}\n" for entry in entries]
        write_file(path, "".join([f"{line}\n", *lines]).encode())
        trace.unlink(missing_ok=True)
        _drop_old(folder)
    except OSError as exc:
        LOGGER.warning("%s: no record of it in %s: %s", line, folder, exc)
        return line
    return f"{line}; the headers of its last messages are in {path}"


def find_trace(folder: Path) -> Path:
    """Return where the trace of one that died is, if there is one: another may write its own by now."""
    moved = folder / MOVED
    return moved if moved.exists() else folder / TRACE


def last_crash(folder: Path) -> str:
    """Return a line about the last gate that died; empty if there is none on record."""
    paths = sorted(folder.glob(_PATTERN))
    if not paths:
        return ""
    try:
        fd = open_file(paths[-1], os.O_RDONLY)
        with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
            return f"{file.readline(_MAX_FIRST_LINE).rstrip()}: {paths[-1]}"
    except OSError:
        return ""


def _drop_old(folder: Path) -> None:
    for path in sorted(folder.glob(_PATTERN))[:-MAX_CRASHES]:
        path.unlink(missing_ok=True)


def _describe_time(when: float) -> str:
    try:
        return f"{datetime.fromtimestamp(when, UTC):%H:%M:%S.%f}"
    except (ValueError, OverflowError, OSError):  # the file says what it says
        return "at some time"


def _describe_end(status: int | None) -> str:
    if status is None:
        return "died (how, only the supervisor that started it could tell)"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
