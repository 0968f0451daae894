"""File descriptors: passing in messages (SCM_RIGHTS), closing, and the limit of a process."""

import array
import contextlib
import os
import resource
import socket
from collections.abc import Iterable, Sequence
from typing import Final

# The kernel's limit on descriptors of a message.
SCM_MAX_FD: Final = 253
_INT_SIZE: Final = array.array("i").itemsize
# Bytes of a buffer for ancillary data with room for this number of descriptors.
ANCILLARY_SIZE: Final = socket.CMSG_SPACE(SCM_MAX_FD * _INT_SIZE)

# Ancillary data in the form of recvmsg: level, type, bytes.
Ancillary = tuple[int, int, bytes]


def received_fds(ancillary: Iterable[Ancillary]) -> list[int]:
    """Return the descriptors in the ancillary data of recvmsg."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            # If the buffer is too small, the kernel may truncate the data inside a descriptor.
            fds.frombytes(data[: len(data) - len(data) % _INT_SIZE])
    return fds.tolist()


def rights(fds: Sequence[int]) -> list[Ancillary]:
    """Return the ancillary data for sendmsg that passes these descriptors."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []


def close_fds(fds: Iterable[int]) -> None:
    """Close all descriptors, even if closing one of them fails."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open descriptors to the hard limit.

    The usual soft limit of 1024 is too low, because a connection takes two descriptors, and a
    sandbox takes one for each socket.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
