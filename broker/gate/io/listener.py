"""Accept connections of a sandbox without ever blocking for more than 20 ms.

The creator of a sandbox may have made its listening socket. Then it holds the same open file description, and shares
O_NONBLOCK and the queue of connections with the gate. So neither the flag nor poll(2) keeps accept(2) from blocking:

    creator                       gate
     |                             | O_NONBLOCK on
     |                             | poll: a connection waits
     | O_NONBLOCK off              |
     | accept: takes it            |
     |                             | accept: blocks
     |                             | 5, 10, 15 ms: SIGALRM, O_NONBLOCK on; Python repeats accept
     |                             |   -> EAGAIN, or it blocks again if the creator was faster
     |                             | 20 ms: SIGALRM, KeptWaitingError; the caller closes the socket

See docs/decisions/0016-accept-is-interrupted.md.
"""

import errno
import os
import select
import signal
import socket
import threading
from contextlib import suppress
from types import FrameType
from typing import Final

from broker.gate.io.loop import BROKEN, READABLE
from broker.posix.reserve import is_reserved

LISTENING: Final = READABLE | select.EPOLLRDHUP
# Events after which a listening socket accepts no more, because it was shut down.
SHUT_DOWN: Final = BROKEN | select.EPOLLRDHUP
# Errors that may be over a moment later, when a program has freed the resource.
SCARCE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
PAUSE: Final = 0.1  # seconds
# Connections taken in one turn of the loop, so that one sandbox does not keep the others waiting.
A_TURN: Final = 16
# The time until an accept is interrupted, and the most interrupts: 20 ms together.
INTERRUPT: Final = 0.005  # seconds
INTERRUPTS: Final = 4


class KeptWaitingError(OSError):
    """The creator of a socket clears O_NONBLOCK as fast as the gate sets it."""


class _Interrupter:
    """The handler of SIGALRM during an accept on a shared socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock: Final = sock
        self._left = INTERRUPTS

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self._interrupt)
        signal.setitimer(signal.ITIMER_REAL, INTERRUPT, INTERRUPT)

    def __exit__(self, *_exc: object) -> None:
        # A signal that is already on its way must not raise.
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


def accept_nowait(sock: socket.socket, *, shared: bool = False) -> socket.socket | None:
    """Accept a connection; None if none waits.

    `shared`: another program may hold the listening socket. Raises OSError, and KeptWaitingError after 20 ms.
    """
    sock.setblocking(False)
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    if not waiting.poll(0):
        return None
    try:
        # Only the main thread gets signals, and in a gate only that one accepts.
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
