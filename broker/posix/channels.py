"""Descriptors that another process passes as a channel: to be told of its end, or to be told something.

A channel has two ends, and the kernel says when the other one is closed. What never ends (a datagram or
listening socket, a file, an eventfd) would make whatever waits for its end wait for ever, so it is refused.
"""

import errno
import fcntl
import os
import socket
import stat
from typing import Final

# Stated in the refusal: the kinds that the two checks accept.
READABLE_KIND: Final = "the read end of a pipe, or a connected unix stream or seqpacket socket"
WRITABLE_KIND: Final = "the write end of a pipe, or a connected unix stream or seqpacket socket"
_KINDS: Final = (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)


def ends_with_its_writers(fd: int) -> bool:
    """Say whether the kernel tells of the end of a descriptor: `READABLE_KIND`."""
    # Open for both, a FIFO has us for a writer.
    return (_is_fifo(fd) and _mode(fd) == os.O_RDONLY) or is_connected(fd)


def takes_a_byte(fd: int) -> bool:
    """Say whether whoever waits at the other end can be told: `WRITABLE_KIND`."""
    return (_is_fifo(fd) and _mode(fd) in {os.O_WRONLY, os.O_RDWR}) or is_connected(fd)


def is_connected(fd: int) -> bool:
    """Say whether it is a socket with one other end, whose closing is told."""
    try:
        with _unix_socket(fd) as sock:
            sock.getpeername()
            return sock.type in _KINDS
    except OSError:
        return False


def listens(fd: int) -> bool:
    """Say whether it is a unix stream socket that takes connections."""
    try:
        with _unix_socket(fd) as sock:
            accepts = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            return sock.type == socket.SOCK_STREAM and bool(accepts)
    except OSError:
        return False


def duplicate_socket(fd: int) -> socket.socket:
    """Return a duplicate. Raises OSError if it is no socket, or open for its path alone (O_PATH)."""
    own = os.dup(fd)
    try:
        return socket.socket(fileno=own)
    except OSError:
        os.close(own)
        raise


def _unix_socket(fd: int) -> socket.socket:
    sock = duplicate_socket(fd)
    if sock.family != socket.AF_UNIX:
        sock.close()
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
    return sock


def _is_fifo(fd: int) -> bool:
    return stat.S_ISFIFO(os.fstat(fd).st_mode)


def _mode(fd: int) -> int:
    """Return how it is open; -1: only for its path."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    return -1 if flags & os.O_PATH else flags & os.O_ACCMODE
