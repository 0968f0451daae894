"""Connecting to a bus that is not behind a unix socket, without waiting, in the gate's loop."""

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
    """A TCP server, its host's name resolved."""

    family: int
    sockaddr: tuple[Any, ...]  # as getaddrinfo gives it
    noncefile: bytes | None = None


Place = UnixAddress | TcpPlace


def dial(loop: Loop, places: Iterable[Place], uid: int, seconds: float, done: OnConnected) -> None:
    """Connect to the first place that answers; `done` gets the socket, or None.

    `seconds` are for all together: each has the same share, so that one that does not answer leaves the
    others theirs.
    """
    left = deque(places)
    _ProxyAttempt(loop, left, uid, seconds / max(1, len(left)), done).go()


class _ProxyAttempt:
    """One socket at a time."""

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
        # Read each time: a bus that starts anew writes another.
        self._nonce = read_nonce(place.noncefile) if place.noncefile is not None else b""
        sock = socket.socket(place.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._sock = sock
        # A call is one small message, and whoever made it waits for the answer.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(BlockingIOError):  # on its way
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
                # Nobody listens, and the kernel gave us that very port: we would talk to ourselves.
                raise OSError(None, "it is our own end")
            if self._nonce and sock.send(self._nonce) != len(self._nonce):
                raise OSError(None, "it does not take the nonce")
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
        # Not at once: a list of many places would be as deep a stack.
        self._loop.next_turn(self.go)

    def _release(self) -> None:
        """Take the socket out of the loop, and forget it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._sock is not None:
            self._loop.remove(self._sock.fileno())
            self._sock = None


def read_nonce(path: bytes) -> bytes:
    """Return what a server of nonce-tcp: wants to hear first. Raises OSError."""
    nonce = read_small(path, NONCE_SIZE)
    if len(nonce) != NONCE_SIZE:
        raise OSError(None, f"a nonce has {NONCE_SIZE} bytes")
    return nonce
