"""Accept connections of a sandbox without ever waiting for anybody.

The creator of a sandbox may have made its listening socket, and then holds the same open file description: O_NONBLOCK
belongs to both, and so do the connections in the queue. No flag and no look before accept(2) keeps it from waiting if the
creator clears the flag and takes the connection in between. So a timer interrupts an accept that lasts: its signal's
handler sets the flag anew, and gives up after a few times. See docs/decisions/0011-accept-is-interrupted.md.
"""

import errno
import os
import select
import signal
import socket
import struct
import threading
from contextlib import suppress
from types import FrameType
from typing import Final

from broker.gate.loop import BROKEN, READABLE
from broker.posix.reserve import is_reserved

LISTENING: Final = READABLE | select.EPOLLRDHUP
# What a listening socket does not recover from: somebody shut it down.
SHUT_DOWN: Final = BROKEN | select.EPOLLRDHUP
# Of these somebody may have given some back a moment later.
SCARCE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
PAUSE: Final = 0.1  # seconds
# Connections taken in one turn of the loop, so that one sandbox does not keep the others waiting.
A_TURN: Final = 16
# How long an accept lasts until it is interrupted, and how often that is tried: 20 ms together.
INTERRUPT: Final = 0.005  # seconds
INTERRUPTS: Final = 4
_UCRED: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid


class KeptWaitingError(OSError):
    """Somebody makes the socket block as fast as it is made not to."""


class _Interrupter:
    """The handler of SIGALRM while a socket of somebody else's is accepted from."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock: Final = sock
        self._left = INTERRUPTS

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self._interrupt)
        signal.setitimer(signal.ITIMER_REAL, INTERRUPT, INTERRUPT)

    def __exit__(self, *_exc: object) -> None:
        # A signal that is on its way finds nothing to give up.
        self._left = -1
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if self._left < 0:
            return
        self._left -= 1
        if not self._left:
            raise KeptWaitingError(errno.EAGAIN, "its creator makes it block")
        with suppress(OSError):
            self._sock.setblocking(False)


def take(sock: socket.socket, *, shared: bool = False) -> socket.socket | None:
    """Return a connection, if one waits; `shared`: somebody else has the socket, too.

    Raises OSError, and KeptWaitingError after 20 ms.
    """
    sock.setblocking(False)
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    if not waiting.poll(0):
        return None
    try:
        # Signals are the main thread's. No other accepts in a gate.
        if shared and threading.current_thread() is threading.main_thread():
            with _Interrupter(sock):
                connection = sock.accept()[0]
        else:
            connection = sock.accept()[0]
    except (BlockingIOError, ConnectionAbortedError):
        return None
    if is_reserved([connection.fileno()]):
        connection.close()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return connection


def peer_uid(connection: socket.socket) -> int:
    """Return whose it is."""
    options = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(options)[1]
    return uid
