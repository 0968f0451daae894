"""A group of the proxy in terms of the gate: a sandbox with a separate bus.

All peers are treated as hosts, also other clients of the same socket, because xdg-dbus-proxy knows
nothing of peers except names.
"""

import os
import socket
import time
from collections.abc import Sequence
from pathlib import PurePath
from typing import Final

from broker.control_protocol.messages import Event, Listener, SandboxLimits, SandboxSpec
from broker.gate.filter.bus_state import BusState, make_absent_name
from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.denials import Denial
from broker.gate.filter.filter import Filter
from broker.gate.io.connect import OnConnected, UnixConnector
from broker.gate.io.loop import Loop
from broker.gate.name_ledger import NameLedger
from broker.gate.sandbox.budgets import JUDGED_A_TURN
from broker.gate.sandbox.mediator import Mediator
from broker.gate.sandbox.sandbox import Sandbox
from broker.proxy.arguments import Group
from broker.proxy.connect import Place, dial
from broker.proxy.judge import ProxyJudge, copy_judge
from broker.proxy.keyring import fetch_cookie
from broker.proxy.log import Printer, Tap
from broker.proxy.passthrough import PassthroughFilter
from broker.wire.address import UnixAddress, make_unix_address
from broker.wire.header import MAX_MESSAGE
from broker.wire.sasl import AuthClient
from broker.wire.sasl_steps import MultiMechanismSaslClient
from policy.rules import Identity

# A process has one sandbox. So the limits protect the bus alone, and no other sandbox. The
# reference configuration of the system bus accepts as many connections of a user.
LIMITS: Final = SandboxLimits(
    connections=256,
    # A message of any legal size passes, as through xdg-dbus-proxy.
    bytes_held=MAX_MESSAGE + 1024 * 1024,
    bytes_queued=MAX_MESSAGE + 1024 * 1024,
    match_rules=4096,
    names=1024,
    # More than any well-behaved app sends, and few enough for a bus to serve other clients.
    messages_per_second=100_000,
)
# Bytes. The cookies have the same size.
CHALLENGE_SIZE: Final = 24


class ProxyConnector:
    """A connector to the bus of one group.

    The bus may be on TCP, as for xdg-dbus-proxy. The buses of a gate are always on unix sockets.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places: Final = tuple(places)
        self._unix: Final = UnixConnector()
        self._is_unix: Final = all(isinstance(place, UnixAddress) for place in places)

    def connect(self, loop: Loop, address: str, uid: int, done: OnConnected) -> None:
        """Connect to the first place that answers."""
        if self._is_unix:
            self._unix.connect(loop, address, uid, done)
        else:
            dial(loop, self._places, uid, LIMITS.handshake_seconds, done)

    def make_client(self, sock: socket.socket, uid: int) -> AuthClient:
        """Return the client side of the handshake.

        A TCP socket does not tell the bus the user. So the client there also offers cookies.
        """
        if sock.family == socket.AF_UNIX:
            return self._unix.make_client(sock, uid)
        return MultiMechanismSaslClient(uid, os.urandom(CHALLENGE_SIZE), fetch_cookie)


class ProxyBus(BusState):
    """The state of the bus of one group. All peers are hosts."""

    def __init__(self, name: str, places: Sequence[Place], *, sloppy_names: bool) -> None:
        unix = [place for place in places if isinstance(place, UnixAddress)]
        address = ";".join(make_unix_address(one.path, one.guid) for one in unix)
        super().__init__(name, address, NameLedger(), make_absent_name(os.urandom(16)))
        self.places: Final = tuple(places)
        self.takes_fds = bool(unix)
        self.tells_unique_names = sloppy_names
        self.judges_names_alone = True
        self.gives_instance_field = False

    def connected(self, unique_name: str, sandbox: str, identity: Identity) -> None:
        """Do nothing, because the sandbox behind a unique name has no meaning in a proxy."""


class ProxySandbox(Sandbox):
    """A group: a socket, and all connections through that socket."""

    def __init__(
        self,
        loop: Loop,
        group: Group,
        listener: Listener,
        uid: int,
        *,
        bus: ProxyBus,
        printer: Printer,
    ) -> None:
        spec = SandboxSpec(
            id=group.path,
            identity=Identity(type="org.freedesktop.xdg-dbus-proxy", app=group.path),
            uid=uid,
            listeners=(listener,),
            access=group.imported.access,
            limits=LIMITS,
        )
        super().__init__(
            loop, spec, {listener.bus: bus}, _ignore_event, _ignore_end, ProxyConnector(bus.places)
        )
        self._group: Final = group
        self._printer: Final = printer
        self._judge: Final = ProxyJudge(spec.access, bus=listener.bus, me=spec.identity)

    def make_filter(self, bus: BusState, *, app_takes_fds: bool) -> Mediator:
        """Return the filter of a new connection."""
        mediator = self._make_filter(bus, copy_judge(self._judge), app_takes_fds=app_takes_fds)
        if isinstance(mediator, LoggedFilter | LoggedPassthroughFilter):
            mediator.tap = Tap(mediator.state, PurePath(self._group.path).name, self._printer)
        return mediator

    def _make_filter(self, bus: BusState, judge: ProxyJudge, *, app_takes_fds: bool) -> Mediator:
        if not self._group.filter:
            passing = LoggedPassthroughFilter if self._group.log else PassthroughFilter
            return passing(bus, self, judge, app_takes_fds=app_takes_fds)
        return (LoggedFilter if self._group.log else Filter)(
            bus,
            self,
            judge,
            app_takes_fds=app_takes_fds,
            judged_a_turn=JUDGED_A_TURN,
            clock=time.monotonic,
        )

    def said_hello(self, state: ConnectionState) -> None:
        """Register a connection, before the app can use the connection."""
        assert isinstance(state.judge, ProxyJudge)
        state.judge.unique_name = state.unique_name
        super().said_hello(state)

    def denied(self, state: ConnectionState, denial: Denial) -> None:
        """Count a refusal, and print the refusal if --log was given."""
        self.denied_count += 1
        for link in self.connections:
            judging = link.filter
            if not isinstance(judging, LoggedFilter | LoggedPassthroughFilter):
                continue
            if judging.state is state:
                judging.tap.denied(denial)


class LoggedFilter(Filter):
    """A Filter that prints every message."""

    tap: Tap

    def feed_app(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes from the app.

        Raises PeerProtocolError or PeerQuotaError: end the connection.
        """
        super().feed_app(data, fds)
        self._look()

    def feed_bus(self, arrived: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes from the bus.

        Raises PeerProtocolError or PeerQuotaError: end the connection.
        """
        super().feed_bus(arrived, fds)
        self._look()

    def _look(self) -> None:
        self.tap.look()
        # Otherwise the fast path would pass known messages without printing.
        self.state.verdicts.forget_all()
        self.state.verdicts.bus_reply_at.clear()


class LoggedPassthroughFilter(PassthroughFilter):
    """A PassthroughFilter that prints every message."""

    tap: Tap

    def feed_app(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes from the app.

        Raises PeerProtocolError or PeerQuotaError: end the connection.
        """
        super().feed_app(data, fds)
        self.tap.look()

    def feed_bus(self, arrived: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes from the bus.

        Raises PeerProtocolError or PeerQuotaError: end the connection.
        """
        super().feed_bus(arrived, fds)
        self.tap.look()


def _ignore_event(_event: Event) -> None:
    """Drop an event, because a proxy has no supervisor."""


def _ignore_end(_sandbox: Sandbox) -> None:
    """Do nothing at the end of a sandbox, because the proxy itself ends all sandboxes."""
