"""Accept connections of a sandbox without ever blocking for more than 20 ms.

The creator of a sandbox may have made the listening socket. Then the creator holds the same open
file description, and shares O_NONBLOCK and the queue of connections with the gate. So neither the
flag nor poll(2) keeps accept(2) from blocking:

    creator                       gate
     |                             | O_NONBLOCK on
     |                             | poll: a connection waits
     | O_NONBLOCK off              |
     | accept: takes the connection|
     |                             | accept: blocks
     |                             | 5, 10, 15 ms: SIGALRM, O_NONBLOCK on; Python repeats accept
     |                             |   -> EAGAIN, or accept blocks again if the creator was faster
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
# Errors that may go away in a moment, when a program frees the resource.
SCARCE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
PAUSE: Final = 0.1  # seconds
# Connections accepted in one turn of the loop. The limit keeps a sandbox from delaying the others.
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
        # A signal that is already pending must not raise.
        self._left = -1
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if self._left < 0:
            return
        self._left -= 1
        if not self._left:
            raise KeptWaitingError(errno.EAGAIN, "the creator of the socket makes accept block")
        with suppress(OSError):
            self._sock.setblocking(False)


def accept_nowait(sock: socket.socket, *, shared: bool = False) -> socket.socket | None:
    """Accept a connection, or return None if no connection waits.

    `shared` says that another program may hold the listening socket. Raises OSError, and
    KeptWaitingError after 20 ms.
    """
    sock.setblocking(False)
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    if not waiting.poll(0):
        return None
    try:
        # Only the main thread receives signals. In a gate, only the main thread accepts.
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
        """Return whether to accept a connection now.

        After False the owner calls `resume` later.
        """

    def on_connection(self, listening: "ListeningSocket", connection: socket.socket) -> None:
        """Take a connection, which belongs to the owner from here on."""

    def on_scarce(self, why: str) -> None:
        """Note that no connection can be accepted for a moment."""

    def on_lost(self, listening: "ListeningSocket", why: str) -> None:
        """Close the listening socket, which cannot accept connections any more."""

    def failed(self, exc: Exception) -> None:
        """End the sandbox after any other error."""


class ListeningSocket:
    """A listening socket in the loop, with the file of the socket.

    The socket accepts connections unless paused. The owner may pause the socket, and a lack of
    descriptors pauses the socket for a moment.
    """

    def __init__(self, loop: Loop, fd: int, spec: Listener, owner: ListenerOwner) -> None:
        """Make a listening socket of a descriptor, which belongs to the object from here on.

        The next call is `start`.
        """
        self.spec: Final = spec
        self.sock: Final = socket.socket(fileno=fd)
        self._loop: Final = loop
        self._owner: Final = owner
        self._is_closed = False
        self._is_paused = False

    def start(self) -> None:
        """Accept connections. Raises OSError if the loop has no room.

        The owner calls `close` also after an error.
        """
        self._loop.add(self.fd, LISTENING, self._readable)

    @property
    def fd(self) -> int:
        """The descriptor of the socket."""
        return self.sock.fileno()

    def pause(self) -> None:
        """Leave new connections in the kernel's queue. The end of the socket is still noticed."""
        self._is_paused = True
        self._loop.change(self.fd, 0)

    def resume(self) -> None:
        """Accept connections again."""
        if not self._is_closed:
            self._is_paused = False
            self._loop.change(self.fd, LISTENING)

    def close(self) -> None:
        """Close the socket, and unlink the file if the gate has to."""
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
                self._owner.on_lost(self, "the creator has shut down the socket")
            else:
                self._accept_some()
        except Exception as exc:  # noqa: BLE001 - the owner decides about the error
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
        else:  # The error lasts, and the socket would be readable for ever.
            self._owner.on_lost(self, exc.strerror or "")
