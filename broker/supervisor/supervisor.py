"""The supervisor: registry, stored state and engine kept in step, whoever asks.

Theory of operation. The engine is right about what there is, and tells us by `take_event` and `take_snapshot`, which
never wait; what they give to do goes to `run_jobs`. A change is made at the engine, then stored, then
answered: so what was answered is in force and survives us, and of a change that was not answered either
may be true. There is no checkpoint between the last look at the registry and what follows from it.
"""

import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import msgspec
import trio

from broker.engines.base import Engine, EngineLostError
from broker.gate.control import (
    Connected,
    Denied,
    Ended,
    Event,
    Gone,
    Snapshot,
)
from broker.supervisor.config import Limits
from broker.supervisor.lifetime import Creators, follows_creator
from broker.supervisor.policy import Policy
from broker.supervisor.registry import Record, Registry, Removed, Sandbox, SandboxId
from broker.supervisor.snaps import Snaps, is_snap, load_own_library
from broker.supervisor.sockets import Bound, bound_socket, given_socket, notify, sweep
from broker.supervisor.spec import check_rules, make_spec
from broker.supervisor.state import State
from broker.wire.errors import (
    ACCESS_DENIED,
    CallRefusedError,
)
from policy.library import Library
from policy.rules import AccessList, Rule

LOGGER: Final = logging.getLogger(__name__)
_Job = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks: a connection to a bus, outside all sandboxes. Credentials are a marshalled `a{sv}`."""

    bus: str
    unique_name: str
    uid: int
    credentials: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddRequest:
    """What AddServer is asked for. The descriptors are the caller's, and only lent."""

    type: str
    app: str
    component: str | None = None
    metadata: bytes
    buses: tuple[str, ...]  # the first one's socket is answered
    access: AccessList
    plugs: tuple[str, ...] = ()
    portals_as_host: bool = False
    keep_after_creator: bool = False
    close_notify: int | None = None
    ready_notify: int | None = None
    socket: int | None = None  # to listen on for the first bus


class Watch(Protocol):
    """What is needed of a watch over one bus's names."""

    def __contains__(self, name: str) -> bool:
        """Say whether it is watched, and there."""

    def add(self, name: str) -> None:
        """Watch a name."""

    def discard(self, name: str) -> None:
        """Undo one `add`."""


class Announcer(Protocol):
    """Who is told what becomes of sandboxes."""

    def removed(self, record: Record) -> None:
        """It is no more."""

    def denied(self, record: Record, event: Denied) -> None:
        """A message was refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What surrounds a supervisor."""

    engine: Engine
    state: State
    announcer: Announcer
    watches: Mapping[str, Watch]  # by bus
    folder: Path  # of the sandboxes' sockets
    now: Callable[[], float] = time.time
    load_library: Callable[[], Library] = load_own_library


class Supervisor:
    """All sandboxes and their lives."""

    def __init__(self, outside: Outside, limits: Limits) -> None:
        records, next_number = outside.state.load()
        self.registry: Final = Registry(limits, records, next_number)
        self._outside: Final = outside
        self._limits: Final = limits
        self._creators: Final = Creators()
        # One change of rules at a time: each one reads the list that it changes.
        self._changing: Final = trio.Lock()
        self.snaps: Final = Snaps(outside.state.load_world(), outside.load_library)
        self.policy: Final = Policy(
            outside.state, outside.engine, self.registry, self.snaps, self._changing
        )
        # Cannot grow without bound: at most one job of each kind a sandbox, and a snapshot's.
        self._jobs_in, self._jobs = trio.open_memory_channel[tuple[str, _Job]](math.inf)
        self._tagged: Final[dict[tuple[str, str], None]] = {}
        for record in records:
            self._follow(record)

    # -- what callers ask ---------------------------------------------------------------------------------

    async def add(self, request: AddRequest, caller: Caller) -> Record:
        """Make a sandbox and return it once its sockets are served; then call `announce`.

        The caller's name must be watched since before its credentials were asked for, until `announce`.
        """
        check_rules(request.access)
        if not is_snap(request.type, request.component):
            return await self._add(request, caller)
        # Its rules follow the connections: between looking and having it none may change.
        async with self._changing:
            return await self._add(request, caller)

    async def _add(self, request: AddRequest, caller: Caller) -> Record:
        number = self.registry.new_number(caller.uid, len(request.metadata))
        with ExitStack() as stack:
            bound = {
                bus: stack.enter_context(self._listen(request, caller, bus))
                for bus in request.buses
            }
            record = self._make_record(number, request, caller, bound)
            with self._taken_in(record):
                access = check_rules(self.in_force(record))
                spec, fds = make_spec(record, access, bound, request.close_notify, self._limits)
                await self._outside.engine.add(spec, fds)
        if request.ready_notify is not None:
            notify(request.ready_notify)
        return record

    def announce(self, record: Record) -> None:
        """Tell that the creator has been answered: its end may be told from now on."""
        removed = self.registry.announce(record.id)
        if removed is not None:
            self._remove(removed)
        elif follows_creator(record):
            if record.creator in self._outside.watches[record.creator_bus]:
                self._follow(record)
            else:  # it left while its sandbox was made, and nobody will tell us again
                self._later(record.id, partial(self._end_listening, record.id))

    async def stop(self, caller: Caller, id_or_path: str) -> None:
        """End a sandbox, its connections included."""
        record = self._changeable(caller, id_or_path)
        await self._outside.engine.stop(record.id)

    async def stop_listening(self, caller: Caller, id_or_path: str) -> None:
        """Take no more connections; the sandbox ends with its last one."""
        record = self._changeable(caller, id_or_path)
        await self._end_listening(record.id)

    async def set_access(
        self, caller: Caller, id_or_path: str, rules: Sequence[Rule], *, replace: bool = True
    ) -> AccessList:
        """Give it these rules, or these as well, and return all once they are in force."""
        async with self._changing:
            record = self._changeable(caller, id_or_path)
            before = () if replace else record.access.rules
            # The same rule twice says nothing more; its origin is no part of what it says.
            meanings = {_meaning(rule): rule for rule in (*before, *rules)}
            access = msgspec.structs.replace(record.access, rules=tuple(meanings.values()))
            in_force = self.in_force(msgspec.structs.replace(record, access=access))
            await self._outside.engine.set_access(record.id, check_rules(in_force))
            sandbox = self.registry.find(record.id)
            self._store(msgspec.structs.replace(sandbox.record, access=access))
            return access

    async def who(self, bus: str, unique_name: str) -> Sandbox | None:
        """Return the sandbox that a connection is in. The gate's answer cannot be out of date."""
        id_ = await self._outside.engine.who(bus, unique_name)
        return self.registry.get(id_) if id_ is not None else None

    async def is_inside(self, bus: str, unique_name: str) -> bool:
        """Say whether a connection is in a sandbox, be it one that we do not know."""
        return await self._outside.engine.who(bus, unique_name) is not None

    async def tag_headers(self, caller: Caller) -> None:
        """Have the caller's messages from sandboxes carry the instance path."""
        await self._outside.engine.tag_headers(caller.bus, caller.unique_name)
        key = (caller.bus, caller.unique_name)
        if key not in self._tagged:
            self._tagged[key] = None
            self._outside.watches[caller.bus].add(caller.unique_name)

    def in_force(self, record: Record) -> AccessList:
        """Return the list that the sandbox is under: given, of its connections, and built in."""
        return record.in_force(self.snaps.compiled(record.identity, record.plugs))

    # -- what happens -----------------------------------------------------------------------------------

    def take_event(self, event: Event) -> None:
        """Take what the engine tells."""
        match event:
            case Connected():
                self.registry.connect(event.sandbox, event.bus, event.unique_name)
            case Gone():
                self.registry.disconnect(event.sandbox, event.bus, event.unique_name)
            case Denied():
                if sandbox := self.registry.deny(event):
                    self._outside.announcer.denied(sandbox.record, event)
            case Ended():
                removed = self.registry.end(event.sandbox, event.reason)
                if removed is not None:
                    self._remove(removed)

    def take_snapshot(self, snapshot: Snapshot) -> None:
        """Take the engine's word for what there is; set right what should be otherwise."""
        result = self.registry.reconcile(snapshot, self.in_force)
        for text in result.differences:
            LOGGER.warning("%s", text)
        for record in result.changed:
            self._outside.state.put(record)
        for removed in result.lost:
            self._remove(removed)
        for id_ in result.strangers:
            self._later(id_, partial(self._outside.engine.stop, id_))
        for id_ in result.other_access:
            self._later(id_, partial(self._set_access_again, id_))
        for bus, unique_name in self._tagged:
            again = partial(self._outside.engine.tag_headers, bus, unique_name)
            self._later(unique_name, again)
        self._sweep()

    def name_gone(self, bus: str, unique_name: str) -> None:
        """A connection that was watched left its bus."""
        self._tagged.pop((bus, unique_name), None)
        for id_ in self._creators.left(bus, unique_name):
            LOGGER.info("%s: its creator left the bus: listening ends", id_)
            self._later(id_, partial(self._end_listening, id_))

    async def run_jobs(self) -> None:
        """Do what events gave to do, for ever. One that fails does not keep the others from being done."""
        async for about, job in self._jobs:
            try:
                await job()
            except (CallRefusedError, EngineLostError) as exc:
                # It ended by itself, or the next snapshot will show what is left to do.
                LOGGER.info("%s: %s", about, exc)

    # -- helpers -------------------------------------------------------------------------------------------

    def _changeable(self, caller: Caller, id_or_path: str) -> Record:
        record = self.registry.find(id_or_path).record
        if caller.uid not in (0, record.uid):
            raise CallRefusedError(ACCESS_DENIED, f"{record.id} is of another user")
        return record

    def _listen(
        self, request: AddRequest, caller: Caller, bus: str
    ) -> AbstractContextManager[Bound]:
        if request.socket is not None and bus == request.buses[0]:
            return given_socket(request.socket)
        return bound_socket(self._outside.folder, caller.uid)

    def _make_record(
        self, number: int, request: AddRequest, caller: Caller, bound: Mapping[str, Bound]
    ) -> Record:
        return Record(
            number=number,
            type=request.type,
            app=request.app,
            component=request.component,
            metadata=request.metadata,
            uid=caller.uid,
            creator=caller.unique_name,
            creator_bus=caller.bus,
            credentials=caller.credentials,
            sockets={bus: one.path for bus, one in bound.items()},
            addresses={bus: one.address for bus, one in bound.items()},
            access=request.access,
            portals_as_host=request.portals_as_host,
            keep_after_creator=request.keep_after_creator,
            close_notify=request.close_notify is not None,
            plugs=request.plugs,
            created=self._outside.now(),
        )

    @contextlib.contextmanager
    def _taken_in(self, record: Record) -> Iterator[None]:
        """Have it in registry and state, unless the block fails."""
        self.registry.add(record)
        try:
            self._outside.state.put(record)
            yield
        except BaseException as exc:
            self.registry.withdraw(record.id)
            self._outside.state.delete(record)
            if not isinstance(exc, CallRefusedError):
                # The gate may have it, or come to have it.
                self._later(record.id, partial(self._outside.engine.stop, record.id))
            raise

    def _follow(self, record: Record) -> None:
        if self._creators.add(record):
            self._outside.watches[record.creator_bus].add(record.creator)

    def _later(self, about: str, job: _Job) -> None:
        self._jobs_in.send_nowait((about, job))

    def _store(self, record: Record) -> None:
        self._outside.state.put(record)
        self.registry.update(record)

    def _remove(self, removed: Removed) -> None:
        record = removed.record
        LOGGER.info("%s: ended (%s)", record.id, removed.reason)
        self._outside.state.delete(record)
        if self._creators.remove(record):
            self._outside.watches[record.creator_bus].discard(record.creator)
        self._outside.announcer.removed(record)

    def _sweep(self) -> None:
        keep = {path for sandbox in self.registry for path in sandbox.record.sockets.values()}
        for path in sweep(self._outside.folder, keep):
            LOGGER.info("%s: left behind by an earlier gate: unlinked", path)

    async def _end_listening(self, id_: SandboxId) -> None:
        await self._outside.engine.stop_listening(id_)
        sandbox = self.registry.get(id_)
        if sandbox is not None:  # else that was its end
            self._store(msgspec.structs.replace(sandbox.record, listening=False))

    async def _set_access_again(self, id_: SandboxId) -> None:
        async with self._changing:
            record = self.registry.find(id_).record
            await self._outside.engine.set_access(id_, self.in_force(record))


def _meaning(rule: Rule) -> Rule:
    return msgspec.structs.replace(rule, origin="")
