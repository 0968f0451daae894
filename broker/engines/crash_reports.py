"""Reports of gates that died: time, cause, and headers of the last messages.

The newest MAX_CRASHES files are kept in the runtime folder. The gate recorded the headers (broker/gate/recorder.py).
Bodies are never recorded.
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
# The trace of a gate that died, moved aside by the next gate that systemd started.
MOVED: Final = "gate-trace.old"
MAX_CRASHES: Final = 5
_PATTERN: Final = "gate-crash-*.txt"
# Far longer than the first line of a report.
_MAX_FIRST_LINE: Final = 1000
# Another version of the gate may write a larger trace.
_MAX_TRACE: Final = 16 * SIZE


def keep_crash(
    folder: Path, pid: int, status: int | None, now: float, *, unseen: bool = False
) -> str:
    """Write a report on a gate that died, and return the first line.

    `status` comes from `os.waitpid`, and is None if the gate was another process's child. `unseen` says that the
    gate died some time before `now`.
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
        LOGGER.warning("%s: cannot write a crash report in %s: %s", line, folder, exc)
        return line
    return f"{line}; the headers of its last messages are in {path}"


def find_trace(folder: Path) -> Path:
    """Return the path that the trace of a dead gate would have."""
    moved = folder / MOVED
    return moved if moved.exists() else folder / TRACE


def last_crash(folder: Path) -> str:
    """Return a line about the last gate that died; empty if there is no report."""
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
    except (ValueError, OverflowError, OSError):  # the file may hold any number
        return "at some time"


def _describe_end(status: int | None) -> str:
    if status is None:
        return "died (only the supervisor that started it knows how)"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
