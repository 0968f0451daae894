"""Client of buses that have Containers1: dialects, and requests for servers.

The client remembers the dialect of each bus, and nothing else. A bus that failed is asked again after a pause that
grows. Requests during the pause are refused at once, with the error of the last try.
"""

import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec
import trio

from broker.bus.values import pack
from broker.control_protocol.messages import CallBus, Called, ContainerServer, SandboxSpec
from broker.engines.backoff import ExponentialBackoff
from broker.engines.base import EngineLostError
from broker.engines.containers1_dialect import (
    ACCESS_TAKES,
    ADD_TAKES,
    Dialect,
    instance_paths,
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
# Before a bus that did not answer is asked again. Each try costs the caller up to CALL_SECONDS.
FIRST_PAUSE: Final = 5.0  # seconds; doubles
LONGEST_PAUSE: Final = 300.0


@dataclass(slots=True)
class _Bus:
    """The dialect and the last failure of a bus, for one user."""

    dialect: Dialect | None = None
    is_asked: bool = False
    error: CallRefusedError | None = None  # of the last try, if the answer was missing or wrong
    until: float = 0.0
    backoff: ExponentialBackoff = field(
        default_factory=lambda: ExponentialBackoff(FIRST_PAUSE, LONGEST_PAUSE)
    )

    @property
    def is_pausing(self) -> bool:
        """Return whether the bus must not be asked for anything now."""
        return self.error is not None and trio.current_time() < self.until

    def check(self) -> None:
        """Raise the last error while the pause lasts."""
        if self.error is not None and self.is_pausing:
            raise CallRefusedError(self.error.dbus_name, str(self.error))

    def failed(self, exc: CallRefusedError) -> None:
        """Begin a pause."""
        if not self.is_pausing:  # else several requests failed at the same time
            self.error, self.until = exc, trio.current_time() + self.backoff.next()

    def succeeded(self) -> None:
        """End the pause, and make the next pause short again."""
        self.error = None
        self.backoff.reset()


class Containers1Client:
    """Requests to all buses, sent by `call`."""

    def __init__(self, call: Callable[[CallBus], Awaitable[Called]]) -> None:
        self._call: Final = call
        self._known: Final[dict[tuple[str, int], _Bus]] = {}  # by bus and user

    def supports(self, bus: str) -> bool:
        """Return whether a bus labels connections, by the last answer of the bus."""
        return any(
            known.dialect is not None and not known.is_pausing
            for (name, _), known in self._known.items()
            if name == bus
        )

    def may_label(self, bus: str, uid: int) -> bool:
        """Return whether a bus labels connections, or has not been asked yet."""
        known = self._known.get((bus, uid), _Bus())
        return not known.is_pausing and (known.dialect is not None or not known.is_asked)

    def forget(self, bus: str, uid: int | None = None) -> None:
        """Ask a bus again next time, for a user or for all, after a possible restart."""
        for (name, user), known in self._known.items():
            if name == bus and uid in (None, user):
                known.is_asked = False
                known.succeeded()

    async def dialect(self, bus: str, uid: int) -> Dialect | None:
        """Return the dialect of a bus; None without Containers1. Raises CallRefusedError.

        The bus is asked once for each connection.
        """
        known = self._known.setdefault((bus, uid), _Bus())
        if not known.is_asked:
            known.check()
            try:
                known.dialect = await self._ask_dialect(bus, uid)
            except CallRefusedError as exc:
                # No pause for a bus that is gone, because the refusal comes at once.
                if exc.dbus_name != DISCONNECTED:
                    known.dialect = None
                    known.failed(exc)
                raise
            known.is_asked = True
            known.succeeded()
            if known.dialect is None:
                LOGGER.info("bus %s has no %s for user %d", bus, CONTAINERS1, uid)
        return known.dialect

    async def _ask_dialect(self, bus: str, uid: int) -> Dialect | None:
        called = await self._call(
            CallBus(bus=bus, uid=uid, interface=INTROSPECTABLE, member="Introspect")
        )
        (xml,) = read_values(called, "s")
        if (dialect := parse_dialect(str(xml), ())) is None:
            # No further request follows, so the gate may close the connection to this bus.
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
        """Ask a bus to make a server for a sandbox; None without Containers1. Raises CallRefusedError."""
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
                known.failed(exc)
            elif exc.dbus_name in (UNKNOWN_METHOD, UNKNOWN_INTERFACE):  # the bus was started anew
                self.forget(bus, spec.uid)
            raise
        known.succeeded()
        instance = read_instance(called)
        try:
            address = read_address(called)
            _check_reachable(address)
        except CallRefusedError as exc:
            is_gone = False
            if instance:
                with trio.move_on_after(UNDO_TIMEOUT, shield=True):
                    made = dialect.server(instance, "")
                    is_gone = await self.stop_server(spec.uid, bus, made)
            if is_gone:
                # The bus went away meanwhile. The caller waits for the bus, because the address was not at fault.
                raise CallRefusedError(DISCONNECTED, str(exc)) from exc
            raise
        return dialect.server(instance, address)

    async def stop_server(self, uid: int, bus: str, server: ContainerServer) -> bool:
        """End an unused server; return whether the bus is gone.

        On failure the gate ends the server.
        """
        body = pack("o", [server.instance])
        try:
            await self._call_method(bus, uid, server.stop, "o", body)
        except CallRefusedError as exc:
            return exc.dbus_name == DISCONNECTED
        except EngineLostError:
            pass
        return False

    async def set_access(self, spec: SandboxSpec, bus: str, instance: str) -> None:
        """Send the changed rules of a sandbox to a bus that enforces rules."""
        try:
            dialect = await self.dialect(bus, spec.uid)
            if dialect is None or not dialect.takes_rules:
                return
            body = make_access_body(spec, bus, instance)
            await self._call_method(bus, spec.uid, dialect.set_access, ACCESS_TAKES, body)
        except CallRefusedError as exc:
            LOGGER.warning("%s: bus %s keeps the old rules: %s", spec.id, bus, exc)

    async def _call_method(
        self, bus: str, uid: int, member: str, signature: str, body: bytes
    ) -> Called:
        """Call a method of Containers1."""
        return await self._call(
            CallBus(
                bus=bus,
                uid=uid,
                interface=CONTAINERS1,
                member=member,
                signature=signature,
                body=body,
            )
        )

    async def sync(self, spec: SandboxSpec | None) -> None:
        """Wait until a sandbox's buses have carried out all earlier calls of the gate.

        A bus handles calls in order, so the answer to a Ping comes last.
        """
        if spec is None:
            return
        for bus in instance_paths(spec.container_servers):
            with contextlib.suppress(CallRefusedError, EngineLostError):
                await self._call(CallBus(bus=bus, uid=spec.uid, interface=PEER, member="Ping"))


def _check_reachable(address: str) -> None:
    """Connect to an address once, to learn whether a server listens there. Raises CallRefusedError."""
    problem = "no address"
    try:
        places = parse_address(address)
    except ConfigError as exc:
        raise CallRefusedError(FAILED, f"the bus returned an invalid address: {exc}") from exc
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
    raise CallRefusedError(FAILED, f"the socket that the bus made cannot be reached: {problem}")
