"""File descriptors: in messages (SCM_RIGHTS), closed together, and how many a process may have."""

import array
import contextlib
import os
import resource
import socket
from collections.abc import Iterable, Sequence
from typing import Final

# The most descriptors that the kernel passes with one message.
SCM_MAX_FD: Final = 253
_INT_SIZE: Final = array.array("i").itemsize
# Bytes of a buffer for ancillary data that has room for that many.
ANCILLARY_SIZE: Final = socket.CMSG_SPACE(SCM_MAX_FD * _INT_SIZE)

# As recvmsg returns ancillary data: level, type, bytes.
Ancillary = tuple[int, int, bytes]


def received_fds(ancillary: Iterable[Ancillary]) -> list[int]:
    """Return the descriptors in the ancillary data of recvmsg."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            # The kernel cuts the data anywhere if the buffer is too small.
            fds.frombytes(data[: len(data) - len(data) % _INT_SIZE])
    return fds.tolist()


def rights(fds: Sequence[int]) -> list[Ancillary]:
    """Return the ancillary data for sendmsg that passes these descriptors."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []


def close_fds(fds: Iterable[int]) -> None:
    """Close all descriptors, also when closing one of them fails."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open descriptors to the hard limit.

    The usual soft limit of 1024 is too low: a connection takes two descriptors, and a sandbox one for each socket.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
