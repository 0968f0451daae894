"""A group of the proxy as the gate sees it: a sandbox with a bus of its own.

Peers are hosts here, whoever they are, also other clients of the same socket: xdg-dbus-proxy knows
names and nothing else.
"""

import os
import socket
from collections.abc import Sequence
from pathlib import PurePath
from typing import Final

from broker.control_protocol.messages import Event, Listener, SandboxLimits, SandboxSpec
from broker.gate.filter.bus_state import BusState
from broker.gate.filter.connection_state import ConnectionState, Denial
from broker.gate.filter.filter import Filter
from broker.gate.io.connect import OnConnected
from broker.gate.io.loop import Loop
from broker.gate.sandbox.budgets import JUDGED_A_TURN
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

# There is one sandbox a process, so that nobody else's share is at stake but the bus's. The reference
# configuration of the system bus takes as many connections of a user.
LIMITS: Final = SandboxLimits(
    connections=256,
    # A message of any legal size passes, as it does through xdg-dbus-proxy.
    bytes_held=MAX_MESSAGE + 1024 * 1024,
    bytes_queued=MAX_MESSAGE + 1024 * 1024,
    match_rules=4096,
    names=1024,
    # More than any app that behaves, and less than keeps a bus from serving others.
    messages_per_second=100_000,
)
# As many bytes as the cookies themselves have.
CHALLENGE_SIZE: Final = 24


class ProxyBus(BusState):
    """The bus of one group, whose peers are nobody in particular.

    It may be behind TCP, as it may for xdg-dbus-proxy. A gate's own buses may not.
    """

    def __init__(self, name: str, places: Sequence[Place], *, sloppy_names: bool) -> None:
        unix = [place for place in places if isinstance(place, UnixAddress)]
        super().__init__(name, ";".join(make_unix_address(one.path, one.guid) for one in unix))
        self._places: Final = tuple(places)
        self._is_unix: Final = len(unix) == len(places)
        self.takes_fds = bool(unix)
        self.tells_unique_names = sloppy_names
        self.judges_names_alone = True
        self.gives_instance_field = False

    def connect(self, loop: Loop, address: str, uid: int, done: OnConnected) -> None:
        """Connect to the first place that answers."""
        if self._is_unix:
            super().connect(loop, address, uid, done)
        else:
            dial(loop, self._places, uid, LIMITS.handshake_seconds, done)

    def make_client(self, sock: socket.socket, uid: int) -> AuthClient:
        """Return who does the handshake: on TCP the socket does not say who we are."""
        if sock.family == socket.AF_UNIX:
            return super().make_client(sock, uid)
        return MultiMechanismSaslClient(uid, os.urandom(CHALLENGE_SIZE), fetch_cookie)

    def connected(self, unique_name: str, sandbox: str, identity: Identity) -> None:
        """Do not remember who is behind a unique name."""


class ProxySandbox(Sandbox):
    """One group: a socket, and all connections to it."""

    def __init__(
        self,
        loop: Loop,
        group: Group,
        listener: Listener,
        uid: int,
        *,
        bus: BusState,
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
        super().__init__(loop, spec, {listener.bus: bus}, _ignore_event, _ignore_end)
        self._group: Final = group
        self._printer: Final = printer
        self._judge: Final = ProxyJudge(spec.access, bus=listener.bus, me=spec.identity)

    def make_filter(self, bus: BusState, *, app_takes_fds: bool) -> Filter:
        """Return what judges a new connection."""
        judge = copy_judge(self._judge)
        group = self._group
        judging: Filter
        if group.filter:
            make = LoggedFilter if group.log else Filter
            judging = make(
                bus, self, judge, app_takes_fds=app_takes_fds, judged_a_turn=JUDGED_A_TURN
            )
        else:
            passing = LoggedPassage if group.log else PassthroughFilter
            judging = passing(bus, self, judge, app_takes_fds=app_takes_fds)
        if isinstance(judging, LoggedFilter):
            judging.tap = Tap(judging.core, PurePath(group.path).name, self._printer)
        return judging

    def said_hello(self, core: ConnectionState) -> None:
        """Register a connection, before its app can use it."""
        assert isinstance(core.judge, ProxyJudge)
        core.judge.unique_name = core.unique_name
        super().said_hello(core)

    def denied(self, core: ConnectionState, denial: Denial) -> None:
        """Print a refusal, if that is wanted."""
        self.denied_count += 1
        for link in self.connections:
            judging = link.filter
            if isinstance(judging, LoggedFilter) and judging.core is core:
                judging.tap.denied(denial)


class LoggedFilter(Filter):
    """A Filter of which every message is printed."""

    tap: Tap

    def feed_app(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take what the app sent. Raises PeerProtocolError or PeerQuotaError: end the connection."""
        super().feed_app(data, fds)
        self._look()

    def feed_bus(self, arrived: bytes, fds: Sequence[int] = ()) -> None:
        """Take what the bus sent. Raises PeerProtocolError or PeerQuotaError: end the connection."""
        super().feed_bus(arrived, fds)
        self._look()

    def _look(self) -> None:
        self.tap.look()
        # What is remembered would go the short way, past us.
        self.core.forget_verdicts()
        self.core.bus_reply_at.clear()


class LoggedPassage(LoggedFilter, PassthroughFilter):
    """A Passage of which every message is printed."""


def _ignore_event(_event: Event) -> None:
    """Nobody supervises a proxy."""


def _ignore_end(_sandbox: Sandbox) -> None:
    """A proxy ends its sandboxes itself."""
