"""Unix stream sockets: binding to files, unlinking, and the credentials of the peer."""

import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import Final, NamedTuple

_UCRED: Final = struct.Struct("iII")  # struct ucred


class PeerCredentials(NamedTuple):
    """The process that called connect(2) or listen(2) on a socket, with its ids at that time."""

    pid: int
    uid: int
    gid: int


def bind_with_umask(sock: socket.socket, path: str, umask: int) -> None:
    """Bind a socket to a new file, with a mode without the bits of `umask`. Raises OSError.

    The mode is in force from the first moment. A chmod after bind(2) would give other users time to
    connect.
    """
    before = os.umask(umask)
    try:
        sock.bind(path)
    finally:
        os.umask(before)


def unlink_socket(name: str, device: int, inode: int) -> None:
    """Remove the file of a socket, unless another file has replaced it.

    An empty name means that the socket has no file.
    """
    if not name:
        return
    with contextlib.suppress(OSError):
        path = Path(name)
        found = path.lstat()
        if (found.st_dev, found.st_ino) == (device, inode):
            path.unlink()


def stream_socket_from_fd(fd: int) -> socket.socket:
    """Return a socket object for the descriptor of a unix stream socket."""
    # Without family and type, Python would ask the kernel for both.
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """Return the credentials of the process at the other end (SO_PEERCRED)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return PeerCredentials(*_UCRED.unpack(raw))


def peer_uid(connection: socket.socket) -> int:
    """Return the user id of the process at the other end."""
    return peer_credentials(connection).uid
