"""A reserve of descriptors, kept for work that must not fail when all others are in use.

A new descriptor gets the lowest free number. So while no descriptor has a number near the limit,
enough are free and nothing needs to be counted. When a descriptor has such a number, the open
descriptors are counted, because lower numbers may be free.
"""

import errno
import fcntl
import os
import resource
from collections.abc import Iterable
from typing import Final

# Enough for the descriptors of a control frame, a connection, a transaction's files, and some more.
RESERVE: Final = 64
# Errors when no descriptor is left: in the process, on the machine, or in flight.
SCARCE: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS}
)


def is_reserved(fds: Iterable[int]) -> bool:
    """Return whether these new descriptors take from the reserve of the process."""
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
    """Count all open descriptors, new descriptors included."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208 - counted, not read
    except OSError:  # not even a descriptor for the listing is left
        return 2**31
