"""The beginning of a connection: SASL with the app, connecting to the bus, SASL with the bus, and the time until Hello.

    app                     gate                                bus
     | -- AUTH EXTERNAL ---> |                                   |
     | <-- OK -------------- | (the gate's own guid)             |
     | -- BEGIN, messages -> | owner.app_authenticated()         |
     |                       | connect() ----------------------> |
     |                       | -- AUTH EXTERNAL ---------------> |
     |                       | <-- OK ; AGREE_UNIX_FD ---------- |
     |                       | -- BEGIN -----------------------> |
     |                       | owner.established(): the messages |
     | -- Hello -----------> | --------------------------------> |
     |                       | <-- the unique name ------------- |
     |                       | said_hello(): no deadline more    |

Between `app_authenticated` and `connect` the owner may compile rules, or wait for the address of a container server. The
gate reads nothing from the app meanwhile: what came with BEGIN are the first messages.
"""

import contextlib
import functools
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from broker.gate.dumps import Fds, StreamDump
from broker.gate.io.connect import Connector
from broker.gate.io.loop import Loop, Timer
from broker.gate.io.stream import SocketStream
from broker.posix.descriptors import close_fds
from broker.posix.sockets import stream_socket_from_fd
from broker.wire.errors import BrokerError, PeerProtocolError
from broker.wire.sasl import AuthClient, SaslClient, SaslServer


class BusUnreachableError(BrokerError):
    """No address of a bus accepts a connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Established:
    """Both sides of a connection, ready for messages."""

    bus_side: SocketStream
    takes_fds: bool  # both the app and the bus take descriptors
    bus_id: str
    from_app: bytes  # the beginning of the app's messages
    from_bus: bytes


class HandshakeOwner(Protocol):
    """The connection, which is told of each step."""

    def charge_read(self) -> bool:
        """Charge one read; return True if the app is not to be read until `read_on` is called."""

    def app_authenticated(self) -> None:
        """Call `connect`, now or later."""

    def established(self, both: Established) -> None:
        """Take over both streams. The handshake reads from neither any more."""

    def bus_drained(self) -> None:
        """Send and read again after the bus has read what was queued."""

    def failed(self, exc: Exception) -> None:
        """End the connection as the exception says."""


def _reports_errors(method: Callable[["Handshake"], None]) -> Callable[["Handshake"], None]:
    """Tell the owner of each error in a method that the loop calls."""

    @functools.wraps(method)
    def guarded(self: "Handshake", /) -> None:
        try:
            method(self)
        except Exception as exc:  # noqa: BLE001 - the owner knows what each means for it
            self.fail(exc)

    return guarded


class Handshake:
    """Both handshakes of one connection. The stream of the app is the owner's, that of the bus its own."""

    __slots__ = (
        "_app",
        "_bus_side",
        "_bus_sock",
        "_client",
        "_deadline",
        "_is_closed",
        "_loop",
        "_owner",
        "_seconds",
        "_server",
        "_uid",
        "app_said",
        "bus_said",
    )

    def __init__(
        self,
        loop: Loop,
        app: SocketStream,
        owner: HandshakeOwner,
        server: SaslServer,
        *,
        uid: int,
        seconds: int,
    ) -> None:
        """Begin with the app, which has `seconds` until its Hello is answered."""
        self._loop: Final = loop
        self._app: Final = app
        self._owner: Final = owner
        self._server: Final = server
        self._uid: Final = uid
        self._seconds: Final = seconds
        self._client: AuthClient | None = None
        self._bus_sock: socket.socket | None = None
        self._bus_side: SocketStream | None = None
        # All that was said so far. The next gate repeats it to a server and a client of its own.
        self.app_said = self.bus_said = b""
        self._is_closed = False
        self._deadline: Timer | None = loop.call_later(seconds, self._too_slow)
        app.readable = self._read_app

    @property
    def waits_for_connect(self) -> bool:
        """Return whether the app has authenticated and there is no connection to the bus yet."""
        return self._server.done and self._bus_sock is None

    @property
    def deadline(self) -> float | None:
        """The time by which Hello must be answered; None: it was."""
        return self._deadline.when if self._deadline is not None else None

    def read_on(self) -> None:
        """Read the app again, unless its next bytes are messages."""
        self._app.pause(reading=not self._server.done)

    def said_hello(self) -> None:
        """Cancel the deadline."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def connect(self, connector: Connector, address: str) -> None:
        """Connect to the bus, and authenticate there as the app's user."""
        connector.connect(
            self._loop, address, self._uid, functools.partial(self._connected, connector)
        )

    def fail(self, exc: Exception) -> None:
        """Tell the owner of an error."""
        self._owner.failed(exc)

    def close(self) -> None:
        """Cancel the deadline, and close the connection to the bus if it is not the owner's by now."""
        self._is_closed = True
        self.said_hello()
        if self._bus_side is not None:
            self._bus_side.close()
        elif self._bus_sock is not None and self._client is None:
            self._bus_sock.close()

    def leave(self) -> None:
        """Leave the loop, and close nothing."""
        self._is_closed = True
        self.said_hello()
        if self._bus_side is not None:
            self._bus_side.leave()
        elif self._bus_sock is not None and self._client is None:
            self._bus_sock.detach()

    # -- the app -----------------------------------------------------------------------------------

    @_reports_errors
    def _read_app(self) -> None:
        data, fds = self._app.read()
        if fds:
            close_fds(fds)
            raise PeerProtocolError("file descriptors during authentication")
        self.app_said += data
        answer = self._server.feed(data)
        if answer:
            self._app.write([answer])
        is_throttled = self._owner.charge_read()
        self._app.pause(reading=not (self._server.done or is_throttled))
        if self._server.done:
            self._owner.app_authenticated()

    def _too_slow(self) -> None:
        self.fail(PeerProtocolError(f"no Hello in handshake_seconds={self._seconds}"))

    # -- the bus -----------------------------------------------------------------------------------

    def _connected(self, connector: Connector, sock: socket.socket | None) -> None:
        # A second attempt may have been begun, for the address of a container server that was made again.
        if self._is_closed or self._bus_sock is not None:
            if sock is not None:
                sock.close()
            return
        if sock is None:
            self.fail(BusUnreachableError("the bus cannot be reached"))
            return
        self._bus_sock = sock
        try:
            self._bus_side = self._make_stream(sock)
            self._client = connector.make_client(sock, self._uid)
            self._bus_side.write([self._client.start()])
        except Exception as exc:  # noqa: BLE001 - as above
            self.fail(exc)

    def _make_stream(self, sock: socket.socket) -> SocketStream:
        return SocketStream(self._loop, sock, self._read_bus, self._owner.bus_drained)

    @_reports_errors
    def _read_bus(self) -> None:
        bus_side, client = self._bus_side, self._client
        assert bus_side is not None
        assert client is not None
        data, fds = bus_side.read()
        close_fds(fds)
        self.bus_said += data
        if answer := client.feed(data):
            bus_side.write([answer])
        if not client.done:
            return
        self.app_said = self.bus_said = b""
        self._bus_side = None
        self._owner.established(
            Established(
                bus_side=bus_side,
                takes_fds=self._server.unix_fds and client.unix_fds,
                bus_id=client.guid,
                from_app=self._server.leftover,
                from_bus=client.leftover,
            )
        )

    # -- handing over ------------------------------------------------------------------------------

    def dump_bus_side(self, fds: Fds) -> StreamDump | None:
        """Return the connection to the bus, if it is not the owner's by now."""
        return self._bus_side.dump(fds) if self._bus_side is not None else None

    def load(
        self, app_said: bytes, bus_side: StreamDump | None, bus_said: bytes, fds: Sequence[int]
    ) -> None:
        """Repeat what was said to the former gate."""
        self.app_said, self.bus_said = app_said, bus_said
        if bus_side is not None:
            self._bus_sock = stream_socket_from_fd(fds[bus_side.fd])
            self._bus_side = self._make_stream(self._bus_sock)
            self._bus_side.load(bus_side, fds)
            self._client = SaslClient(self._uid)
            self._client.feed(bus_said)
        with contextlib.suppress(PeerProtocolError):  # the former gate took it
            self._server.feed(app_said)

    def load_deadline(self, when: float | None) -> None:
        """Set the deadline to that time of the loop's clock; None: cancel it."""
        self.said_hello()
        if when is not None:
            self._deadline = self._loop.call_at(when, self._too_slow)
