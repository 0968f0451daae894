"""The last descriptors of a process, kept for what has to go on when it has no others.

A new descriptor has the lowest number that is free. So as long as none has a number near the limit there are enough, and nothing
needs to be counted. When one has, they are counted: there may be holes below it.
"""

import errno
import fcntl
import os
import resource
from collections.abc import Iterable
from typing import Final

# Enough for the descriptors of a control frame, a connection, the files of a transaction, and some more.
RESERVE: Final = 64
# Errors when no descriptor is left: of the process, of the machine, or in flight.
SCARCE: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS}
)


def is_reserved(fds: Iterable[int]) -> bool:
    """Say whether these new descriptors take from the last that the process may have."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return False
    first = limit - min(RESERVE, limit // 4)
    return (_is_open(first) or any(fd >= first for fd in fds)) and _count() >= first


def _is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def _count() -> int:
    """Count all that are open, the new ones included."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208 - counted, not read
    except OSError:  # as there is not even one left for that
        return 2**31
