"""Unix stream sockets: bound to files, unlinked, made from descriptors, and the user at the other end."""

import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import Final, NamedTuple

_UCRED: Final = struct.Struct("iII")  # struct ucred


class PeerCredentials(NamedTuple):
    """The process that connected a socket, or made it listen, as it was then."""

    pid: int
    uid: int
    gid: int


def bind_with_umask(sock: socket.socket, path: str, umask: int) -> None:
    """Bind a socket to a new file whose mode leaves out the bits of `umask`. Raises OSError.

    The mode holds from the first moment. A chmod after bind(2) would leave others the time to connect.
    """
    before = os.umask(umask)
    try:
        sock.bind(path)
    finally:
        os.umask(before)


def unlink_socket(name: str, device: int, inode: int) -> None:
    """Remove the file of a socket, if it still is that file; an empty name: the socket has none."""
    if not name:
        return
    with contextlib.suppress(OSError):
        path = Path(name)
        found = path.lstat()
        if (found.st_dev, found.st_ino) == (device, inode):
            path.unlink()


def stream_socket_from_fd(fd: int) -> socket.socket:
    """Return the socket object for the descriptor of a unix stream socket."""
    # Python asks the kernel for the family and type unless both are given.
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """Return the credentials of the process at the other end (SO_PEERCRED)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return PeerCredentials(*_UCRED.unpack(raw))


def peer_uid(connection: socket.socket) -> int:
    """Return the user id of the process at the other end."""
    return peer_credentials(connection).uid
