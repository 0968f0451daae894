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
from typing import Final, Protocol

from broker.control_protocol.messages import Listener
from broker.gate.io.loop import BROKEN, READABLE, Loop
from broker.posix.reserve import is_reserved
from broker.posix.sockets import unlink_socket

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


class ListenerOwner(Protocol):
    """The sandbox of a listening socket."""

    def may_accept(self) -> bool:
        """Return False if no connection is to be taken now; the owner calls `resume` later."""

    def on_connection(self, listening: "ListeningSocket", connection: socket.socket) -> None:
        """Take a connection, which is the owner's from here on."""

    def on_scarce(self, why: str) -> None:
        """Note that no connection can be taken for a moment."""

    def on_lost(self, listening: "ListeningSocket", why: str) -> None:
        """Close the listening socket: no connection can be taken any more."""

    def failed(self, exc: Exception) -> None:
        """End the sandbox after an error that is none of the above."""


class ListeningSocket:
    """A listening socket in the loop, with the file that it is bound to.

    The socket accepts while nothing pauses it: its owner may, and for a moment a lack of descriptors does.
    """

    def __init__(self, loop: Loop, fd: int, spec: Listener, owner: ListenerOwner) -> None:
        """Make a listening socket of a descriptor, which is its own from here on. `start` comes next."""
        self.spec: Final = spec
        self.sock: Final = socket.socket(fileno=fd)
        self._loop: Final = loop
        self._owner: Final = owner
        self._is_closed = False
        self._is_paused = False

    def start(self) -> None:
        """Accept connections. Raises OSError if the loop has no room; `close` is needed also then."""
        self._loop.add(self.fd, LISTENING, self._readable)

    @property
    def fd(self) -> int:
        """The descriptor."""
        return self.sock.fileno()

    def pause(self) -> None:
        """Leave new connections in the kernel's queue. The end of the socket is noticed all the same."""
        self._is_paused = True
        self._loop.change(self.fd, 0)

    def resume(self) -> None:
        """Accept connections again."""
        if not self._is_closed:
            self._is_paused = False
            self._loop.change(self.fd, LISTENING)

    def close(self) -> None:
        """Close the socket and unlink its file, if the file is the gate's to unlink."""
        self._is_closed = True
        self._loop.remove(self.fd)
        self.sock.close()
        unlink_socket(self.spec.path, self.spec.device, self.spec.inode)

    def leave(self) -> None:
        """Leave the loop, and close nothing."""
        self._is_closed = True
        self._loop.remove(self.fd)
        self.sock.detach()

    def _readable(self, events: int) -> None:
        try:
            if events & SHUT_DOWN:
                self._owner.on_lost(self, "its creator has shut it down")
            else:
                self._accept_some()
        except Exception as exc:  # noqa: BLE001 - the owner knows what it means
            self._owner.failed(exc)

    def _accept_some(self) -> None:
        """Accept up to `A_TURN` connections, until the owner pauses the socket or closes it."""
        for _ in range(A_TURN):
            if not self._owner.may_accept():
                return
            try:
                connection = accept_nowait(self.sock, shared=not self.spec.path)
            except OSError as exc:
                self._accept_failed(exc)
                return
            if connection is None:
                return
            self._owner.on_connection(self, connection)
            if self._is_paused or self._is_closed:
                return

    def _accept_failed(self, exc: OSError) -> None:
        if exc.errno in SCARCE:
            self._owner.on_scarce(exc.strerror or "")
            self.pause()
            self._loop.call_later(PAUSE, self.resume)
        else:  # an error that lasts: the socket would be readable for ever
            self._owner.on_lost(self, exc.strerror or "")
