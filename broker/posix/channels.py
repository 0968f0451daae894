"""Kind checks for descriptors that another process passes as a channel.

The receiver uses a channel to learn when the other end closes, or to send a byte to the other end.
A datagram socket, a listening socket, a file and an eventfd have no other end whose closing the
kernel reports. Waiting for the end of such a descriptor would last for ever, so the checks refuse
these kinds.
"""

import errno
import fcntl
import os
import socket
import stat
from typing import Final

# The kinds that the two checks accept, as refusals state them.
READABLE_KIND: Final = "the read end of a pipe, or a connected unix stream or seqpacket socket"
WRITABLE_KIND: Final = "the write end of a pipe, or a connected unix stream or seqpacket socket"
_KINDS: Final = (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)


def ends_with_its_writers(fd: int) -> bool:
    """Return whether the kernel reports the end of a descriptor, as for `READABLE_KIND`."""
    # A FIFO open for reading and writing never ends, because it is one of its own writers.
    return (_is_fifo(fd) and _mode(fd) == os.O_RDONLY) or is_connected(fd)


def takes_a_byte(fd: int) -> bool:
    """Return whether a byte can be written to the other end, as for `WRITABLE_KIND`."""
    return (_is_fifo(fd) and _mode(fd) in {os.O_WRONLY, os.O_RDWR}) or is_connected(fd)


def is_connected(fd: int) -> bool:
    """Return whether a descriptor is a unix socket with a peer whose closing is reported."""
    try:
        with _unix_socket(fd) as sock:
            sock.getpeername()
            return sock.type in _KINDS
    except OSError:
        return False


def listens(fd: int) -> bool:
    """Return whether a descriptor is a unix stream socket that accepts connections."""
    try:
        with _unix_socket(fd) as sock:
            accepts = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            return sock.type == socket.SOCK_STREAM and bool(accepts)
    except OSError:
        return False


def duplicate_socket(fd: int) -> socket.socket:
    """Return a duplicate of a socket.

    Raises OSError for a descriptor that is no socket, or that is open for its path alone (O_PATH).
    """
    duplicate = os.dup(fd)
    try:
        return socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
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
    """Return the access mode of a descriptor, or -1 for a descriptor of a path alone (O_PATH)."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    return -1 if flags & os.O_PATH else flags & os.O_ACCMODE
