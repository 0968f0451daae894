"""Talking to buses that have Containers1 themselves: what they understand, and the servers that they make.

Nothing of it is remembered but what each bus understands, and for a while that it did not say so. One that
fails is asked again after a pause that grows; who wants something of it before is told at once what was wrong.
"""

import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import msgspec
import trio

from broker.bus.values import pack
from broker.control_protocol.messages import CallBus, Called, ContainerServer, SandboxSpec
from broker.engines.base import EngineLostError
from broker.engines.containers1_dialect import (
    ACCESS_TAKES,
    ADD_TAKES,
    Dialect,
    describe,
    make_access_body,
    make_add_body,
    parse_dialect,
    read_address,
    read_arguments,
    read_instance,
    read_values,
)
from broker.wire.address import parse_address
from broker.wire.errors import (
    DISCONNECTED,
    FAILED,
    NO_REPLY,
    UNKNOWN_INTERFACE,
    UNKNOWN_METHOD,
    CallRefusedError,
    ConfigError,
)
from broker.wire.interfaces import CONTAINERS1, INTROSPECTABLE, PEER, PROPERTIES

LOGGER: Final = logging.getLogger(__name__)
UNDO_TIMEOUT: Final = 2.0  # seconds
# Before a bus that did not answer is asked again: each time is CALL_SECONDS for who waits for it.
FIRST_PAUSE: Final = 5.0  # seconds; it doubles
LONGEST_PAUSE: Final = 300.0


@dataclass(slots=True)
class _Known:
    """What is known of a bus, for one user."""

    dialect: Dialect | None = None
    is_asked: bool = False
    why: CallRefusedError | None = None  # it did not answer, or not as it should
    until: float = 0.0
    pause: float = FIRST_PAUSE

    @property
    def is_pausing(self) -> bool:
        """Whether it is not to be asked for anything now."""
        return self.why is not None and trio.current_time() < self.until

    def check(self) -> None:
        """Raise what went wrong, as long as it is not to be asked again."""
        if self.why is not None and self.is_pausing:
            raise CallRefusedError(self.why.dbus_name, str(self.why))

    def went_wrong(self, exc: CallRefusedError) -> None:
        """Wait before it is asked again."""
        if not self.is_pausing:  # else others were waiting at the same time
            self.why, self.until = exc, trio.current_time() + self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE)

    def went_well(self) -> None:
        """Ask as often as there is something to ask."""
        self.why, self.pause = None, FIRST_PAUSE


class Containers1Client:
    """All buses, asked by way of `call`, which raises CallRefusedError and EngineLostError."""

    def __init__(self, call: Callable[[CallBus], Awaitable[Called]]) -> None:
        self._call: Final = call
        self._known: Final[dict[tuple[str, int], _Known]] = {}  # by bus and user

    def supports(self, bus: str) -> bool:
        """Say whether that bus labels, by what it said last."""
        return any(
            known.dialect is not None and not known.is_pausing
            for (name, _), known in self._known.items()
            if name == bus
        )

    def may_label(self, bus: str, uid: int) -> bool:
        """Say whether it does, or is to be asked."""
        known = self._known.get((bus, uid), _Known())
        return not known.is_pausing and (known.dialect is not None or not known.is_asked)

    def forget(self, bus: str, uid: int | None = None) -> None:
        """It may be another bus now, for that user or for all."""
        for (name, user), known in self._known.items():
            if name == bus and uid in (None, user):
                known.is_asked = False
                known.went_well()

    async def dialect(self, bus: str, uid: int) -> Dialect | None:
        """Return how the bus is talked to, asked once a connection; None: it has no Containers1. Raises CallRefusedError."""
        known = self._known.setdefault((bus, uid), _Known())
        if not known.is_asked:
            known.check()
            try:
                known.dialect = await self._ask_dialect(bus, uid)
            except CallRefusedError as exc:
                # A bus that is not there will be another, and keeps nobody waiting.
                if exc.dbus_name != DISCONNECTED:
                    known.dialect = None
                    known.went_wrong(exc)
                raise
            known.is_asked = True
            known.went_well()
            if known.dialect is None:
                LOGGER.info("bus %s has no %s for user %d", bus, CONTAINERS1, uid)
        return known.dialect

    async def _ask_dialect(self, bus: str, uid: int) -> Dialect | None:
        called = await self._call(
            CallBus(bus=bus, uid=uid, interface=INTROSPECTABLE, member="Introspect")
        )
        (xml,) = read_values(called, "s")
        if (dialect := parse_dialect(str(xml), ())) is None:
            # Nothing more is wanted of it: the gate need not stay there.
            await self._call(CallBus(bus=bus, uid=uid, interface=PEER, member="Ping", leave=True))
            return None
        called = await self._call(
            CallBus(
                bus=bus,
                uid=uid,
                interface=PROPERTIES,
                member="Get",
                signature="ss",
                body=pack("ss", [CONTAINERS1, "SupportedArguments"]),
            )
        )
        return msgspec.structs.replace(dialect, arguments=frozenset(read_arguments(called)))

    async def add_server(self, spec: SandboxSpec, bus: str) -> ContainerServer | None:
        """Have the bus make a server; None: it has none to give. Raises CallRefusedError."""
        dialect = await self.dialect(bus, spec.uid)
        if dialect is None:
            return None
        known = self._known[bus, spec.uid]
        known.check()
        request = CallBus(
            bus=bus,
            uid=spec.uid,
            interface=CONTAINERS1,
            member=dialect.add,
            signature=ADD_TAKES,
            body=make_add_body(spec, bus, dialect),
            undo=dialect.stop,
        )
        try:
            called = await self._call(request)
        except CallRefusedError as exc:
            if exc.dbus_name == NO_REPLY:
                known.went_wrong(exc)
            elif exc.dbus_name in (UNKNOWN_METHOD, UNKNOWN_INTERFACE):  # it started anew
                self.forget(bus, spec.uid)
            raise
        known.went_well()
        instance = read_instance(called)
        try:
            address = read_address(called)
            _check_reachable(address)
        except CallRefusedError as exc:
            is_gone = False
            if instance:
                with trio.move_on_after(UNDO_TIMEOUT, shield=True):
                    made = dialect.upstream(instance, "")
                    is_gone = await self.stop_server(spec.uid, bus, made)
            if is_gone:
                # It went away meanwhile, and is to be waited for: there is nothing wrong with what it makes.
                raise CallRefusedError(DISCONNECTED, str(exc)) from exc
            raise
        return dialect.upstream(instance, address)

    async def stop_server(self, uid: int, bus: str, upstream: ContainerServer) -> bool:
        """End what was made and is not used; say whether that bus is gone. If we cannot, the gate does."""
        request = CallBus(
            bus=bus,
            uid=uid,
            interface=CONTAINERS1,
            member=upstream.stop,
            signature="o",
            body=pack("o", [upstream.instance]),
        )
        try:
            await self._call(request)
        except CallRefusedError as exc:
            return exc.dbus_name == DISCONNECTED
        except EngineLostError:
            pass
        return False

    async def set_access(self, spec: SandboxSpec, bus: str, instance: str) -> None:
        """Tell a bus that has rules of its own that they have changed."""
        try:
            dialect = await self.dialect(bus, spec.uid)
            if dialect is None or not dialect.takes_rules:
                return
            request = CallBus(
                bus=bus,
                uid=spec.uid,
                interface=CONTAINERS1,
                member=dialect.set_access,
                signature=ACCESS_TAKES,
                body=make_access_body(spec, bus, instance),
            )
            await self._call(request)
        except CallRefusedError as exc:
            LOGGER.warning("%s: bus %s keeps the rules that it has: %s", spec.id, bus, exc)

    async def sync(self, spec: SandboxSpec | None) -> None:
        """Wait until the buses have done what the gate told them: they go by the order of the calls."""
        if spec is None:
            return
        for bus in describe(spec.container_servers):
            with contextlib.suppress(CallRefusedError, EngineLostError):
                await self._call(CallBus(bus=bus, uid=spec.uid, interface=PEER, member="Ping"))


def _check_reachable(address: str) -> None:
    """See whether somebody listens there. Raises CallRefusedError."""
    problem = "no address"
    try:
        places = parse_address(address)
    except ConfigError as exc:
        raise CallRefusedError(FAILED, f"it gave an address that is none: {exc}") from exc
    for place in places:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.connect(place.path)
            except BlockingIOError:
                return
            except OSError as exc:
                problem = exc.strerror or str(exc)
            else:
                return
    raise CallRefusedError(FAILED, f"the socket that it made cannot be reached: {problem}")
