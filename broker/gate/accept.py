"""A sandbox's listening sockets, one of which its creator may have made and still have: nothing that is done to it there makes us wait."""

import errno
import select
import socket
import struct
from typing import Final

from broker.gate.loop import BROKEN, READABLE

LISTENING: Final = READABLE | select.EPOLLRDHUP
# What a listening socket does not recover from: somebody shut it down.
SHUT_DOWN: Final = BROKEN | select.EPOLLRDHUP
# Of these somebody may have given some back a moment later.
SCARCE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
PAUSE: Final = 0.1  # seconds
# Connections taken in one turn of the loop, so that one sandbox does not keep the others waiting.
A_TURN: Final = 16
_UCRED: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid


def take(sock: socket.socket) -> socket.socket | None:
    """Return a connection, if one waits. Raises OSError."""
    # Whoever gave us the socket may have made it block since, for the flag belongs to both, and may take
    # connections, too.
    sock.setblocking(False)
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    if not waiting.poll(0):
        return None
    try:
        return sock.accept()[0]
    except (BlockingIOError, ConnectionAbortedError):
        return None


def peer_uid(connection: socket.socket) -> int:
    """Return whose it is."""
    options = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(options)[1]
    return uid
