"""Connect to a bus on TCP or on a unix socket, without blocking, in the gate's loop."""

import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from broker.gate.io.connect import OnConnected, connect_unix
from broker.gate.io.loop import WRITABLE, Loop, Timer
from broker.posix.files import read_small
from broker.wire.address import UnixAddress, make_unix_address

LOGGER: Final = logging.getLogger(__name__)

NONCE_SIZE: Final = 16  # bytes


@dataclass(frozen=True, slots=True)
class TcpPlace:
    """A TCP server, with the host's name resolved."""

    family: int
    sockaddr: tuple[Any, ...]  # in the form of getaddrinfo
    noncefile: bytes | None = None


Place = UnixAddress | TcpPlace


def dial(loop: Loop, places: Iterable[Place], uid: int, seconds: float, done: OnConnected) -> None:
    """Connect to the first place that answers, and call `done` with the socket or None.

    `seconds` is the time for all places together. Each place has the same share, so that a place
    that does not answer leaves time for the other places.
    """
    left = deque(places)
    _ProxyAttempt(loop, left, uid, seconds / max(1, len(left)), done).go()


class _ProxyAttempt:
    """Attempts to connect to several places in sequence."""

    def __init__(
        self, loop: Loop, places: deque[Place], uid: int, seconds: float, done: OnConnected
    ) -> None:
        self._loop: Final = loop
        self._left: Final = places
        self._uid: Final = uid
        self._seconds: Final = seconds
        self._done: Final = done
        self._nonce = b""
        self._sock: socket.socket | None = None
        self._timer: Timer | None = None

    def go(self) -> None:
        """Try the next place."""
        if not self._left:
            self._done(None)
            return
        place = self._left.popleft()
        if isinstance(place, UnixAddress):
            connect_unix(self._loop, make_unix_address(place.path), self._uid, self._tried_unix)
            return
        try:
            self._start(place)
        except OSError as exc:
            LOGGER.debug("bus-connect place=%r: %s", place, exc.strerror)
            self._give_up()

    def _tried_unix(self, sock: socket.socket | None) -> None:
        if sock is not None:
            self._done(sock)
        else:
            self._loop.next_turn(self.go)

    def _start(self, place: TcpPlace) -> None:
        # The nonce is read for each attempt, because a restarted bus writes another nonce.
        self._nonce = read_nonce(place.noncefile) if place.noncefile is not None else b""
        sock = socket.socket(place.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._sock = sock
        # A call is a small message, and the caller waits for the answer.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(BlockingIOError):  # in progress
            sock.connect(place.sockaddr)
        self._timer = self._loop.call_later(self._seconds, self._give_up)
        self._loop.add(sock.fileno(), WRITABLE, self._settled)

    def _settled(self, _events: int) -> None:
        assert self._sock is not None
        sock = self._sock
        try:
            if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error))
            if sock.getsockname() == sock.getpeername():
                # No program listens, and the kernel chose the same port for this end. The socket is
                # then connected to itself.
                raise OSError(None, "the socket is connected to itself")
            if self._nonce and sock.send(self._nonce) != len(self._nonce):
                raise OSError(None, "the nonce cannot be sent")
        except OSError as exc:
            LOGGER.debug("bus-connect: %s", exc.strerror)
            self._give_up()
            return
        self._release()
        self._done(sock)

    def _give_up(self) -> None:
        sock = self._sock
        self._release()
        if sock is not None:
            sock.close()
        # The next attempt starts from the loop. A direct call would nest the stack once per place.
        self._loop.next_turn(self.go)

    def _release(self) -> None:
        """Remove the socket from the loop, and cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._sock is not None:
            self._loop.remove(self._sock.fileno())
            self._sock = None


def read_nonce(path: bytes) -> bytes:
    """Return the nonce that a server of nonce-tcp: expects first. Raises OSError."""
    nonce = read_small(path, NONCE_SIZE)
    if len(nonce) != NONCE_SIZE:
        raise OSError(None, f"a nonce has {NONCE_SIZE} bytes")
    return nonce
