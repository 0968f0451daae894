"""Start of a gate process with two inherited descriptors."""

import fcntl
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Final

from broker.posix.descriptors import close_fds

# Descriptor numbers in the new process.
_READY_FD: Final = 3
_TAKE_OVER_FD: Final = 4
# Actions that give the process /dev/null as standard input and output.
_NO_TERMINAL: Final = (
    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
)


def spawn_gate(
    argv: Sequence[str],
    environment: Mapping[str, str],
    ready: int,
    take_over: int | None = None,
    *,
    detach: bool = False,
) -> int:
    """Start a gate and return its pid. Raises OSError.

    The gate writes a byte to `ready` as soon as the gate listens, and takes over from the gate at
    the other end of `take_over`. Both descriptors stay open in the caller. `detach` gives the
    process a separate session and separate standard streams. So Ctrl-C does not reach the gate, and
    a reader of the caller's output sees EOF when the caller ends.
    """
    given = {_READY_FD: ready} | ({_TAKE_OVER_FD: take_over} if take_over is not None else {})
    argv = [*argv, "--ready-fd", str(_READY_FD)]
    if take_over is not None:
        argv += ["--take-over", str(_TAKE_OVER_FD)]
    # `ready` may have number 4, for example. So each descriptor first moves out of the way. Then no
    # dup2 overwrites a descriptor.
    moved: list[int] = []
    try:
        for fd in given.values():
            moved.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _TAKE_OVER_FD + 1))  # noqa: PERF401
        placed = [(os.POSIX_SPAWN_DUP2, *pair) for pair in zip(moved, given, strict=True)]
        return os.posix_spawn(
            argv[0],
            argv,
            environment,
            file_actions=[*(_NO_TERMINAL if detach else ()), *placed],
            setsid=detach,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # ignored by Python
        )
    finally:
        close_fds(moved)
