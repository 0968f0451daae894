"""The handshakes of a connection: SASL with the app, SASL with the bus, and Hello.

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
     |                       | cancel_deadline()                 |

Between `app_authenticated` and `connect` the owner may compile rules, or wait for the address of a
container server. The gate reads nothing from the app meanwhile. Bytes that came with BEGIN are the
first messages.
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
    takes_fds: bool  # both the app and the bus accept descriptors
    bus_id: str
    from_app: bytes  # the beginning of the app's messages
    from_bus: bytes


class HandshakeOwner(Protocol):
    """The connection of a handshake."""

    def charge_read(self) -> bool:
        """Charge a read. Return whether the app has to wait until `read_on` is called."""

    def app_authenticated(self) -> None:
        """Call `connect`, now or later."""

    def established(self, both: Established) -> None:
        """Take over both streams, which the handshake does not read any more."""

    def bus_drained(self) -> None:
        """Send and read again, after the bus has read all queued data."""

    def failed(self, exc: Exception) -> None:
        """End the connection because of an error."""


def _reports_errors(method: Callable[["Handshake"], None]) -> Callable[["Handshake"], None]:
    """Report each error in `method`, which the loop calls, to the owner."""

    @functools.wraps(method)
    def guarded(self: "Handshake", /) -> None:
        try:
            method(self)
        except Exception as exc:  # noqa: BLE001 - the owner handles each error
            self.fail(exc)

    return guarded


class Handshake:
    """Both handshakes of a connection.

    The stream of the app belongs to the owner. The stream of the bus belongs to the handshake until
    `established`.
    """

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
        """Begin with the app, which has `seconds` until the answer to Hello."""
        self._loop: Final = loop
        self._app: Final = app
        self._owner: Final = owner
        self._server: Final = server
        self._uid: Final = uid
        self._seconds: Final = seconds
        self._client: AuthClient | None = None
        self._bus_sock: socket.socket | None = None
        self._bus_side: SocketStream | None = None
        # All data received so far. The next gate feeds the same data to a new server and a new
        # client.
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
        """The time by which Hello must be answered, or None after the answer."""
        return self._deadline.when if self._deadline is not None else None

    def read_on(self) -> None:
        """Read the app again, unless the next bytes are messages."""
        self._app.pause(reading=not self._server.done)

    def cancel_deadline(self) -> None:
        """Let the app take its time, because Hello was answered or the handshake is over."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def connect(self, connector: Connector, address: str) -> None:
        """Connect to the bus, and authenticate there as the app's user."""
        connector.connect(
            self._loop, address, self._uid, functools.partial(self._connected, connector)
        )

    def fail(self, exc: Exception) -> None:
        """Report an error to the owner."""
        self._owner.failed(exc)

    def close(self) -> None:
        """Cancel the deadline, and close the bus side unless the owner has taken over."""
        self._is_closed = True
        self.cancel_deadline()
        if self._bus_side is not None:
            self._bus_side.close()
        elif self._bus_sock is not None and self._client is None:
            self._bus_sock.close()

    def leave(self) -> None:
        """Leave the loop, and close nothing."""
        self._is_closed = True
        self.cancel_deadline()
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
        # A recreated container server has a new address, for which a second attempt may have begun.
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
        except Exception as exc:  # noqa: BLE001 - the owner handles each error
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
        """Return the bus side, unless the owner has taken over."""
        return self._bus_side.dump(fds) if self._bus_side is not None else None

    def load(
        self, app_said: bytes, bus_side: StreamDump | None, bus_said: bytes, fds: Sequence[int]
    ) -> None:
        """Repeat the handshakes from the data that the former gate received."""
        self.app_said, self.bus_said = app_said, bus_said
        if bus_side is not None:
            self._bus_sock = stream_socket_from_fd(fds[bus_side.fd])
            self._bus_side = self._make_stream(self._bus_sock)
            self._bus_side.load(bus_side, fds)
            self._client = SaslClient(self._uid)
            self._client.feed(bus_said)
        with contextlib.suppress(PeerProtocolError):  # The former gate accepted the same data.
            self._server.feed(app_said)

    def load_deadline(self, when: float | None) -> None:
        """Set the deadline to a time of the loop's clock. None cancels the deadline."""
        self.cancel_deadline()
        if when is not None:
            self._deadline = self._loop.call_at(when, self._too_slow)
