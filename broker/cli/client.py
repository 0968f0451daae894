"""Client of the broker's D-Bus service, for the commands.

The client finds the broker's bus, makes calls, and returns plain values. An error of the service is
raised as CallRefusedError with the service's own text. Nothing here prints.
"""

import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar

import msgspec
import trio

from broker.bus.connection import Destination, open_bus
from broker.bus.values import Variant, plain
from broker.cli.options import Settings
from broker.posix.files import read_small
from broker.wire.address import parse_address
from broker.wire.errors import SERVICE_UNKNOWN, BrokerError, CallRefusedError, ConfigError
from broker.wire.interfaces import (
    BROKER,
    BROKER_PATH,
    BROKER_POLICY,
    CONTAINERS1,
    DRIVER_PATH,
    INSTANCE_PREFIX,
)

MANAGER: Final = Destination(destination=BROKER, path=BROKER_PATH, interface=BROKER)
POLICY: Final = Destination(destination=BROKER, path=BROKER_PATH, interface=BROKER_POLICY)
CONTAINERS: Final = Destination(destination=BROKER, path=DRIVER_PATH, interface=CONTAINERS1)
SYSTEM_RUNTIME_DIR: Final = Path("/run/buswarden")
ADDRESS_FILE: Final = "bus-address"
# Seconds for a whole command. No answer takes that long, and no person waits longer.
TIMEOUT: Final = 30.0
_MAX_ADDRESS: Final = 64 * 1024  # bytes: several alternatives, each with a path
ConnectionChange = Literal["Connect", "Disconnect"]
T = TypeVar("T")


class NoBrokerError(BrokerError):
    """No broker runs at the address, or no address was found."""


class Bus(Protocol):
    """The part of a bus connection that the client uses."""

    @property
    def address(self) -> str: ...

    async def call(
        self,
        target: Destination,
        member: str,
        signature: str = "",
        values: Sequence[object] = (),
        *,
        fds: Sequence[int] = (),
    ) -> list[Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSandbox:
    """The arguments of AddServer."""

    type: str
    app: str
    component: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    buses: tuple[str, ...] = ()
    rules: tuple[tuple[bool, str], ...] = ()
    portals_as_host: bool = False
    keep_after_creator: bool = False
    receive_from_host: bool = True
    process: int | None = None  # a pid
    cgroup: str = ""
    time_limit: int = 0  # seconds; 0 for no limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """The answer of AddServer."""

    path: str
    socket: str
    address: str
    sockets: Mapping[str, str] = field(default_factory=dict)  # by bus; empty if no bus was named

    @property
    def id(self) -> str:
        return self.path.removeprefix(INSTANCE_PREFIX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """The sandbox behind a connection, as GetConnectionInstance describes the sandbox."""

    path: str
    type: str
    app: str
    component: str
    metadata: Mapping[str, Any]
    creator: Mapping[str, Any]

    @property
    def id(self) -> str:
        return self.path.removeprefix(INSTANCE_PREFIX)


class ServiceClient:
    """The broker's service on one bus.

    Every method raises CallRefusedError and BusLostError.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    @property
    def address(self) -> str:
        return self._bus.address

    async def status(self) -> dict[str, Any]:
        (status,) = await self._call(MANAGER, "Status")
        return _as_dict(status)

    async def upgrade(self) -> tuple[int, int]:
        """Replace the gate. Return the pids of the old and of the new gate."""
        old, new = await self._call(MANAGER, "Upgrade")
        return int(old), int(new)

    async def list_sandboxes(self) -> list[dict[str, Any]]:
        (sandboxes,) = await self._call(MANAGER, "List")
        return [_as_dict(sandbox) for sandbox in sandboxes]

    async def show(self, sandbox: str) -> dict[str, Any]:
        (facts,) = await self._call(MANAGER, "Show", "s", [sandbox])
        return _as_dict(facts)

    async def change_access(
        self, sandbox: str, rules: Sequence[tuple[bool, str]], *, replace: bool
    ) -> list[tuple[bool, str]]:
        """Change the rules of a sandbox. Return the rules in force as (deny, text)."""
        values = [sandbox, [list(rule) for rule in rules], replace]
        (access,) = await self._call(MANAGER, "ChangeAccess", "sa(bs)b", values)
        return [(bool(deny), str(text)) for deny, text in access]

    async def add(self, new: NewSandbox, *, close_notify: int | None = None) -> Added:
        """Add a sandbox that ends at the EOF of the pipe `close_notify`.

        The descriptor `close_notify` stays the caller's.
        """
        metadata = {key: Variant("s", value) for key, value in new.metadata.items()}
        named = _named_arguments(new)
        fds = []
        if close_notify is not None:
            named["CloseNotify"] = Variant("h", 0)
            fds = [close_notify]
        values = [new.type, new.app, metadata, named]
        with _pidfd(new.process) as pidfd:
            if pidfd is not None:
                named["ProcessFd"] = Variant("h", len(fds))
                fds.append(pidfd)
            path, socket, address = await self._call(
                CONTAINERS, "AddServer", "ssa{sv}a{sv}", values, fds=fds
            )
        first = os.fsdecode(bytes(socket).rstrip(b"\0"))
        sockets = {new.buses[0]: first} if new.buses else {}
        if len(new.buses) > 1:
            # The answer of AddServer has room for one socket.
            sockets = {name: str(at) for name, at in (await self.show(path))["sockets"].items()}
        return Added(path=path, socket=first, address=address, sockets=sockets)

    async def stop(self, path: str, *, keep_connections: bool) -> None:
        await self._call(
            CONTAINERS, "StopListening" if keep_connections else "StopInstance", "o", [path]
        )

    async def who(self, name: str, bus: str | None) -> Instance:
        """Return the sandbox behind a connection to `bus`, or to the client's own bus."""
        if bus is None:
            return await self.who_here(name)
        buses = (await self.status())["buses"]
        if bus not in buses:
            known = ", ".join(sorted(buses))
            raise ConfigError(f"the broker has no bus {bus[:80]!r}, only {known}")
        # A unique name has a meaning on one bus only. So the call goes to that bus.
        async with connect_bus(buses[bus]) as other:
            return await ServiceClient(other).who_here(name)

    async def who_here(self, name: str) -> Instance:
        answer = await self._call(CONTAINERS, "GetConnectionInstance", "s", [name])
        path, creator, type_, app, metadata = answer
        try:
            component = (await self.show(path))["component"]
        except CallRefusedError:
            # The sandbox is gone, or belongs to another user. The other facts are public.
            component = ""
        return Instance(
            path=path, type=type_, app=app, component=component, metadata=metadata, creator=creator
        )

    async def change_connection(self, change: ConnectionChange, plug: str, slot: str) -> list[str]:
        """Connect or disconnect a plug and a slot.

        Return a line for each app whose rules changed.
        """
        (changed,) = await self._call(POLICY, change, "ss", [plug, slot])
        return [str(text) for text in changed]

    async def connections(self) -> list[tuple[str, str, str]]:
        """Return plug, slot and interface of each connection."""
        (rows,) = await self._call(POLICY, "Connections")
        return [(plug, slot, interface) for plug, slot, interface in rows]

    async def snaps(self) -> dict[str, Any]:
        (text,) = await self._call(POLICY, "Snaps")
        return _as_dict(msgspec.json.decode(text))

    async def load_snaps(self, snaps: str) -> None:
        await self._call(POLICY, "LoadSnaps", "s", [snaps])

    async def explain(self, what: str, message: Mapping[str, str]) -> dict[str, Any]:
        """Return why a sandbox, or an app of a snap, may or may not exchange a message."""
        said = {key: Variant("s", text) for key, text in message.items()}
        (why,) = await self._call(POLICY, "Explain", "sa{sv}", [what, said])
        return _as_dict(why)

    async def _call(
        self,
        target: Destination,
        member: str,
        signature: str = "",
        values: Sequence[object] = (),
        *,
        fds: Sequence[int] = (),
    ) -> list[Any]:
        try:
            reply = await self._bus.call(target, member, signature, values, fds=fds)
        except CallRefusedError as exc:
            if exc.dbus_name == SERVICE_UNKNOWN:
                text = f"no broker on the bus at {self.address} (is `buswarden run` running?)"
                raise NoBrokerError(text) from exc
            raise
        return [plain(value) for value in reply]


def ask(settings: Settings, question: Callable[[ServiceClient], Awaitable[T]]) -> T:
    """Connect to the broker, run `question`, and disconnect.

    Raises CallRefusedError, NoBrokerError, ConfigError, BusLostError.
    """
    address = find_address(settings.address, os.environ)
    # A malformed address and an absent bus have different exit codes. So the address is checked
    # before the connection is made.
    parse_address(address, runtime_dir=os.environ.get("XDG_RUNTIME_DIR"))
    return trio.run(_ask, address, question)


def connect_bus(address: str) -> AbstractAsyncContextManager[Bus]:
    """Open a connection that is closed at the end of the block. Raises ConfigError."""
    return open_bus(address, runtime_dir=os.environ.get("XDG_RUNTIME_DIR"))


async def _ask(address: str, question: Callable[[ServiceClient], Awaitable[T]]) -> T:
    error: BrokerError
    with trio.move_on_after(TIMEOUT):
        try:
            async with connect_bus(address) as bus:
                # The connection's nursery would wrap the error in a group. So the error leaves
                # the block in a variable.
                try:
                    return await question(ServiceClient(bus))
                except BrokerError as exc:
                    error = exc
        except ConfigError as exc:
            raise NoBrokerError(str(exc)) from exc
        raise error
    raise NoBrokerError(f"no answer from the bus at {address}, or from the broker there")


def find_address(explicit: str | None, environ: Mapping[str, str]) -> str:
    """Return the address of the broker's bus. Raises NoBrokerError."""
    if address := explicit or environ.get("BUSWARDEN_BUS_ADDRESS"):
        return address
    for directory in (_user_runtime_dir(environ), SYSTEM_RUNTIME_DIR):
        if directory is not None and (address := _read_address(directory / ADDRESS_FILE)):
            return address
    if address := environ.get("DBUS_SESSION_BUS_ADDRESS"):
        return address
    raise NoBrokerError("no broker found (is `buswarden run` running?), and no --address given")


def instance_path(id_or_path: str) -> str:
    """Return the object path of a sandbox that is named by id or by path."""
    return id_or_path if id_or_path.startswith("/") else f"{INSTANCE_PREFIX}{id_or_path}"


def _named_arguments(new: NewSandbox) -> dict[str, Variant]:
    named: dict[str, Variant] = {}
    if new.component:
        named["Component"] = Variant("s", new.component)
    if new.buses:
        named["Buses"] = Variant("as", list(new.buses))
    if new.rules:
        named["Rules"] = Variant("a(bs)", [list(rule) for rule in new.rules])
    if new.portals_as_host:
        named["PortalsAsHost"] = Variant("b", True)
    if new.keep_after_creator:
        named["KeepAfterCreator"] = Variant("b", True)
    if not new.receive_from_host:
        named["ReceiveFromHost"] = Variant("b", False)
    if new.cgroup:
        named["Cgroup"] = Variant("s", new.cgroup)
    if new.time_limit:
        named["TimeLimit"] = Variant("t", new.time_limit)
    return named


@contextmanager
def _pidfd(pid: int | None) -> Iterator[int | None]:
    """Open a pidfd, because a pid may be reused. Raises ConfigError."""
    if pid is None:
        yield None
        return
    try:
        fd = os.pidfd_open(pid)
    except OSError as exc:
        raise ConfigError(f"process {pid}: {exc.strerror}") from exc
    try:
        yield fd
    finally:
        os.close(fd)


def _as_dict(value: object) -> dict[str, Any]:
    assert isinstance(value, dict), value
    return value


def _user_runtime_dir(environ: Mapping[str, str]) -> Path | None:
    directory = environ.get("XDG_RUNTIME_DIR")
    return Path(directory) / "buswarden" if directory else None


def _read_address(path: Path) -> str:
    try:
        return read_small(path, _MAX_ADDRESS).decode("utf-8", "surrogateescape").strip()
    except OSError:
        return ""
