"""Connections to buses, made as the user of the app."""

import logging
import os
import pwd
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from broker.gate.io.loop import Loop
from broker.posix.reserve import is_reserved
from broker.wire.address import UnixAddress, parse_address
from broker.wire.errors import ConfigError
from broker.wire.sasl import AuthClient, SaslClient

LOGGER: Final = logging.getLogger(__name__)

# Seconds until the next attempt after EAGAIN, which is the answer of a bus whose backlog is full.
RETRY_PAUSE: Final = 0.05
RETRIES: Final = 100

OnConnected = Callable[[socket.socket | None], None]


class Connector(Protocol):
    """The way in which connections to a bus are made and authenticated."""

    def connect(self, loop: Loop, address: str, uid: int, done: OnConnected) -> None:
        """Connect to `address` as user `uid`, and call `done` with the socket or None."""

    def make_client(self, sock: socket.socket, uid: int) -> AuthClient:
        """Return the client side of the handshake on a new connection."""


class UnixConnector:
    """A connector to buses behind unix sockets. The socket tells the bus the user."""

    def connect(self, loop: Loop, address: str, uid: int, done: OnConnected) -> None:
        """Connect to the first place of `address` that answers."""
        connect_unix(loop, address, uid, done)

    def make_client(self, sock: socket.socket, uid: int) -> AuthClient:
        """Return the client side of the handshake on a new connection."""
        return SaslClient(uid)


def connect_unix(loop: Loop, address: str, uid: int, done: OnConnected) -> None:
    """Connect to the first place of `address` that answers.

    `done` is called with the socket, or with None after a failure.
    """
    try:
        places = parse_address(address)
    except ConfigError as exc:
        LOGGER.error("bus-address: %s", exc)  # noqa: TRY400 - the operator needs no traceback
        done(None)
        return
    _UnixAttempt(loop, places, uid, done).go()


class _UnixAttempt:
    def __init__(self, loop: Loop, places: list[UnixAddress], uid: int, done: OnConnected) -> None:
        self._loop = loop
        self._places = places
        self._uid = uid
        self._done = done
        self._left = RETRIES

    def go(self) -> None:
        busy = False
        for place in self._places:
            try:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            except OSError:
                break
            if is_reserved([sock.fileno()]):
                sock.close()
                break
            try:
                with _as_user(self._uid):
                    sock.connect(place.path)
            except BlockingIOError:
                sock.close()
                busy = True
            except OSError as exc:
                sock.close()
                LOGGER.debug("bus-connect path=%r: %s", place.path, exc.strerror)
            else:
                self._done(sock)
                return
        self._left -= 1
        if busy and self._left:
            self._loop.call_later(RETRY_PAUSE, self.go)
        else:
            self._done(None)


@contextmanager
def _as_user(uid: int) -> Iterator[None]:
    """Change the effective user and groups for a moment.

    A bus sees the user and groups that the process has during connect(2).
    """
    mine = os.geteuid()
    if uid == mine:
        yield
        return
    groups, gid = os.getgroups(), os.getegid()
    user = pwd.getpwuid(uid)
    os.setgroups(os.getgrouplist(user.pw_name, user.pw_gid))
    os.setegid(user.pw_gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(mine)
        os.setegid(gid)
        os.setgroups(groups)
