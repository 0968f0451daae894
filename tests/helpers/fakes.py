"""Stand-ins for what surrounds the supervisor. They satisfy its Protocols and keep what they were told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from broker.bus.connection import Call, Destination
from broker.bus.values import Variant, unpack
from broker.control_protocol.messages import Connected, Denied, Ended, SandboxSpec, Usage
from broker.engines.base import EngineLostError, Listener
from broker.engines.held_sockets import HeldSockets
from broker.supervisor.sandboxes.registry import Record
from broker.wire.errors import NAME_HAS_NO_OWNER, NOT_CONTAINER, CallRefusedError
from policy.rules import AccessList


@dataclass
class FakeEngine:
    """A gate that does at once what it is asked for, unless a test says otherwise."""

    name: str = "fake"
    pid: int = 4711
    listener: Listener | None = None
    held: HeldSockets = field(default_factory=HeldSockets)
    last_crash: str = ""
    labelled: tuple[str, ...] = ()  # buses that have Containers1
    awaited: tuple[str, ...] = ()  # those that are not there now
    specs: dict[str, SandboxSpec] = field(default_factory=dict)
    access: dict[str, AccessList] = field(default_factory=dict)
    connections: dict[tuple[str, str], str] = field(default_factory=dict)
    done: list[tuple[str, ...]] = field(default_factory=list)
    refuse: Exception | None = None  # what the next request answers
    cannot_tell: bool = False  # what is used
    before_answer: trio.Event | None = None  # requests wait for it

    def serving(self, bus: str) -> str:
        return "containers1" if bus in self.labelled else self.name

    def instances(self, sandbox: str) -> Mapping[str, str]:
        return {bus: "" if bus in self.awaited else f"/bus/{sandbox}" for bus in self.labelled}

    def bus_restarted(self, bus: str) -> None:
        self.done.append(("bus_restarted", bus))

    async def add(self, spec: SandboxSpec, fds: Sequence[int]) -> None:
        await self._do("add", spec.id, str(len(fds)))
        self.specs[spec.id] = spec
        self.access[spec.id] = spec.access

    async def set_access(self, sandbox: str, access: AccessList) -> None:
        await self._do("set_access", self._known(sandbox))
        self.access[sandbox] = access

    async def stop_listening(self, sandbox: str) -> None:
        await self._do("stop_listening", self._known(sandbox))
        if sandbox not in self.connections.values():
            self.end(sandbox, "last-connection")

    async def stop(self, sandbox: str, reason: str = "stopped") -> None:
        await self._do("stop", self._known(sandbox))
        self.end(sandbox, reason)

    async def who(self, bus: str, unique_name: str) -> str | None:
        await self._do("who", unique_name)
        return self.connections.get((bus, unique_name))

    async def use(self, sandbox: str | None = None) -> Usage:
        await self._do("use")
        if self.cannot_tell:
            raise EngineLostError("gone")
        return Usage(connections=len(self.connections), pending_calls=3)

    async def request_instance_field(
        self, bus: str, unique_name: str, *, wanted: bool = True
    ) -> None:
        await self._do("request_instance_field" if wanted else "untag_headers", bus, unique_name)

    async def upgrade(self) -> tuple[int, int]:
        await self._do("upgrade")
        old, self.pid = self.pid, self.pid + 1
        return old, self.pid

    def connect(self, sandbox: str, unique_name: str, bus: str = "session") -> None:
        """An app of the sandbox says Hello."""
        assert self.listener is not None
        self.connections[bus, unique_name] = sandbox
        self.listener.take_event(Connected(sandbox, bus, unique_name))

    def end(self, sandbox: str, reason: str) -> None:
        """A sandbox ends."""
        assert self.listener is not None
        self.specs.pop(sandbox, None)
        self.connections = {k: v for k, v in self.connections.items() if v != sandbox}
        self.listener.take_event(Ended(sandbox, reason))

    async def _do(self, *what: str) -> None:
        self.done.append(what)
        await trio.lowlevel.checkpoint()
        if self.before_answer is not None:
            await self.before_answer.wait()
        if self.refuse is not None:
            error, self.refuse = self.refuse, None
            raise error

    def _known(self, sandbox: str) -> str:
        if sandbox not in self.specs:
            raise CallRefusedError(NOT_CONTAINER, sandbox)
        return sandbox


@dataclass
class FakeWatch:
    """A watch over the names of one bus."""

    names: list[str] = field(default_factory=list)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def add(self, name: str) -> None:
        self.names.append(name)

    def discard(self, name: str) -> None:
        if name in self.names:
            self.names.remove(name)


@dataclass
class FakeAnnouncer:
    """Keeps what would be signals."""

    ended: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)  # of the ends
    refused: list[Denied] = field(default_factory=list)

    def removed(self, record: Record, reason: str) -> None:
        self.ended.append(record.id)
        self.reasons[record.id] = reason

    def denied(self, _record: Record, event: Denied) -> None:
        self.refused.append(event)


@dataclass
class FakeBus:
    """A bus as the interfaces see it: asked for credentials and owners, and answered through."""

    users: dict[str, int] = field(default_factory=dict)  # unique name -> uid
    owners: dict[str, str] = field(default_factory=dict)  # well-known name -> unique name
    forwards: bool = True
    sent: list[tuple[str, str]] = field(default_factory=list)  # (member, argument) without reply
    answers: list[tuple[str, tuple[object, ...]]] = field(default_factory=list)
    errors: list[tuple[str, str]] = field(default_factory=list)

    async def call(
        self, _target: Destination, member: str, _signature: str = "", values: Sequence[object] = ()
    ) -> list[Any]:

        await trio.lowlevel.checkpoint()
        (name,) = values
        assert isinstance(name, str)
        owner = self.owners.get(name, name if name in self.users else None)
        if member == "NameHasOwner":
            return [owner is not None]
        if owner is None:
            raise CallRefusedError(NAME_HAS_NO_OWNER, f"nobody is {name}")
        if member == "GetNameOwner":
            return [owner]
        assert member == "GetConnectionCredentials"
        uid = Variant("u", self.users[owner])
        return [{"UnixUserID": uid, "ProcessFD": Variant("h", 0)}]

    def send(
        self, _target: Destination, member: str, _signature: str = "", values: Sequence[object] = ()
    ) -> None:
        self.sent.append((member, str(values[0])))

    async def forwards_instance_field(self) -> bool:
        await trio.lowlevel.checkpoint()
        return self.forwards

    def answer_body(self, _call: Call, signature: str, body: bytes) -> None:

        self.answers.append((signature, tuple(unpack(signature, body))))

    def refuse(self, _call: Call, name: str, text: str) -> None:
        self.errors.append((name, text))


def lost() -> EngineLostError:
    """Return what an engine raises that went away."""
    return EngineLostError("the gate went away")


def make_call(member: str, signature: str = "", *values: Any, **fields: Any) -> Call:
    """Return a call to us."""
    defaults: dict[str, Any] = {
        "sender": ":1.1",
        "path": "/org/freedesktop/DBus",
        "interface": None,
    }
    return Call(member=member, signature=signature, values=list(values), **{**defaults, **fields})
