"""Query of a bus's id, for requests that come before the first app connects.

A new gate reads the sandboxed names of an earlier gate from a file, which is found by the id of the
bus (name_ledger.py). The bus states the id in the handshake. So the gate connects and goes through
the handshake. The gate closes the connection before Hello, so that the connection gets no name.
"""

import socket
from collections.abc import Callable
from typing import Final

from broker.gate.filter.bus_state import BusState
from broker.gate.io.connect import connect_unix
from broker.gate.io.loop import Loop
from broker.gate.io.stream import SocketStream, StreamClosedError
from broker.posix.descriptors import close_fds
from broker.wire.errors import PeerProtocolError
from broker.wire.sasl import SaslClient

# Seconds. A caller on a bus waits longer for an answer.
QUERY_SECONDS: Final = 5.0


class BusIdQuery:
    """A connection that ends with the handshake.

    `done` is called once, also after a failure.
    """

    def __init__(
        self, loop: Loop, bus: BusState, uid: int, done: Callable[["BusIdQuery"], None]
    ) -> None:
        self.bus: Final = bus
        # Requests of the supervisor that wait for the id, as (serial, unique name).
        self.waiting_requests: list[tuple[int, str]] = []
        self._loop: Final = loop
        self._done: Final = done
        self._client: Final = SaslClient(uid)
        self._stream: SocketStream | None = None
        self._is_over = False
        self._deadline: Final = loop.call_later(QUERY_SECONDS, self.end)
        connect_unix(loop, bus.address, uid, self._connected)

    def end(self) -> None:
        """Close the connection, and call `done`. A second call does nothing."""
        if self._is_over:
            return
        self._is_over = True
        self._deadline.cancel()
        if self._stream is not None:
            self._stream.close()
        # `__init__` may call `end` before the caller has the object. So `done` is called in a later
        # turn.
        self._loop.next_turn(lambda: self._done(self))

    def _connected(self, sock: socket.socket | None) -> None:
        if self._is_over:
            if sock is not None:
                sock.close()
            return
        if sock is None:
            self.end()
            return
        self._stream = SocketStream(self._loop, sock, self._readable, _nothing)
        try:
            self._stream.write([self._client.start()])
        except StreamClosedError:
            self.end()

    def _readable(self) -> None:
        assert self._stream is not None
        try:
            data, fds = self._stream.read()
            close_fds(fds)
            self._client.feed(data)
        except BlockingIOError:
            return
        except (StreamClosedError, PeerProtocolError, OSError):
            self.end()
            return
        if self._client.guid:
            self.bus.authenticated(self._client.guid)
            self.end()


def _nothing() -> None:
    pass
