"""The supervisor, which keeps registry, state file and engine in step.

Theory of operation. The engine is right about which sandboxes exist. Reports come by `take_event` and
`take_snapshot`, which never wait: work that follows from a report goes into a queue, which `run_jobs` works off.

Each change takes the same three steps:

    caller            supervisor                       engine                  state file
    SetAccess   ->    checks caller and rules
                      set_access                 ->    enforces the rules
                                                 <-    done
                      put                        ---------------------->       stores the rules
                <-    answer

So an answered change is in force, and survives the supervisor. A change that was not answered may be in force,
stored, both, or neither; the next snapshot of the engine shows any difference, and the stored rules are set again.

There is no checkpoint between the last look into the registry and the dependent step.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import msgspec
import trio

from broker.control_protocol.messages import (
    Connected,
    ContainerServerLost,
    Denied,
    Ended,
    Event,
    Gone,
    SandboxSpec,
    Snapshot,
)
from broker.engines.base import Engine, ignore_ended_sandbox
from broker.posix.reserve import is_reserved
from broker.supervisor.bus_connections import BusIds
from broker.supervisor.config import ConfiguredLimits
from broker.supervisor.engine_jobs import EngineJobQueue
from broker.supervisor.header_requests import InstanceFieldRequests
from broker.supervisor.sandboxes.lifecycle import STOPPED, Effect, Event as LifeEvent, Phase
from broker.supervisor.sandboxes.registry import Record, Registry, Removed, SandboxId, Step
from broker.supervisor.sandboxes.rule_limits import WHAT_TO_DO, check_list, check_rules, over_limit
from broker.supervisor.sandboxes.sockets import Bound, bound_socket, given_socket, notify, sweep
from broker.supervisor.sandboxes.specs import (
    AddRequest,
    Behind,
    Caller,
    Times,
    is_held,
    make_again,
    make_record,
    make_spec,
)
from broker.supervisor.snaps.catalogue import Snaps, is_snap, load_own_library
from broker.supervisor.snaps.connections import Policy
from broker.supervisor.storage.recovery import recover_from_gate
from broker.supervisor.storage.state_file import StateFile
from broker.supervisor.watches.cgroups import Cgroups
from broker.supervisor.watches.processes import Processes
from broker.supervisor.watches.watches import NameWatch, SandboxWatches, boot_time
from broker.wire.errors import ACCESS_DENIED, LIMITS_EXCEEDED, NOT_CONTAINER, CallRefusedError
from policy.rules import AccessList, Rule
from policy.snaps.library import Library

LOGGER: Final = logging.getLogger(__name__)


class Announcer(Protocol):
    """The receiver of ends and refusals."""

    def removed(self, record: Record, reason: str) -> None:
        """Announce the end of a sandbox and the reason."""

    def denied(self, record: Record, event: Denied) -> None:
        """Announce a refused message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The engine, storage, clocks and watches that a supervisor uses."""

    engine: Engine
    state: StateFile
    announcer: Announcer
    name_watches: Mapping[str, NameWatch]  # by bus
    folder: Path  # of the sandboxes' sockets
    now: Callable[[], float] = time.time
    load_library: Callable[[], Library] = load_own_library
    processes: Processes = field(default_factory=Processes)
    cgroups: Cgroups = field(default_factory=Cgroups)
    boot_time: Callable[[], float] = boot_time


class Supervisor:
    """All sandboxes, and the operations on sandboxes."""

    def __init__(self, environment: Environment, limits: ConfiguredLimits) -> None:
        records, next_number = environment.state.load()
        self.registry: Final = Registry(limits, records, next_number)
        self._environment: Final = environment
        self._engine: Final = environment.engine
        self._state: Final = environment.state
        self.limits: Final = limits
        self.watches: Final = SandboxWatches(
            environment.name_watches,
            self.apply_event,
            processes=environment.processes,
            cgroups=environment.cgroups,
            now=environment.boot_time,
        )
        self.ended: Final[dict[str, int]] = {}  # number of ends, by reason
        # Held during a change of rules, because a change first reads the present list.
        self._changing: Final = trio.Lock()
        self.snaps: Final = Snaps(self._state.load_world(), environment.load_library)
        self.policy: Final = Policy(
            self._state,
            self._engine,
            self.registry,
            self.snaps,
            self._changing,
            limits.rule_steps,
        )
        self._jobs: Final = EngineJobQueue()
        self._later: Final = self._jobs.add
        self.field_requests: Final = InstanceFieldRequests(
            self._state, self._engine, environment.name_watches, self._later
        )
        self._bus_ids: Final = BusIds(self._state)
        self._gone_buses: Final[set[str]] = set()
        self._missing: Sequence[SandboxId] = ()
        for record in records:
            self.watches.begin(record, again=True)

    # -- requests of callers ------------------------------------------------------------------------------

    async def add(self, request: AddRequest, caller: Caller) -> Record:
        """Make a sandbox, and return the record once the sockets are served.

        Call `announce` afterwards.
        The caller's name must be watched since before the credentials were read, until `announce`.
        """
        check_rules(request.access)
        if not is_snap(request.type, request.component):
            return await self._add(request, caller)
        # The rules follow the connections of snaps, so no connection may change until the sandbox has the rules.
        async with self._changing:
            return await self._add(request, caller)

    async def _add(self, request: AddRequest, caller: Caller) -> Record:
        number = self.registry.new_number(caller.uid, len(request.metadata))
        with ExitStack() as stack:
            bound = {
                bus: stack.enter_context(self._listen(request, caller, bus))
                for bus in request.buses
            }
            if is_reserved(one.fd for one in bound.values()):
                text = "the broker has no file descriptors left"
                raise CallRefusedError(LIMITS_EXCEEDED, text)
            now = Times(created=self._environment.now(), boot=self._environment.boot_time())
            record = make_record(number, request, caller, bound, now)
            with self._registered(record):
                access = await self._checked(record)
                spec, fds = make_spec(record, access, bound, request.close_notify, self.limits)
                await self._engine.add(spec, fds)
                self._store_new(record)
        if request.ready_notify is not None:
            notify(request.ready_notify)
        return record

    def _store_new(self, record: Record) -> None:
        # Stored only once the gate has the sandbox: a stored sandbox that no gate has would be announced as lost, though its
        # creator was never told. The record may have changed since, because callers see it in the list.
        try:
            self._state.put(self.registry.current(record))
        except CallRefusedError:
            self._later(record.id, partial(self._engine.stop, record.id))
            raise

    def announce(self, record: Record) -> None:
        """Take note that the creator was answered, and allow to announce the end."""
        self.apply_event(record.id, LifeEvent.ANNOUNCED)
        if self._gone_buses.issuperset(record.sockets):  # perhaps since `add` began
            self.apply_event(record.id, LifeEvent.BUS_GONE)

    async def stop(self, caller: Caller, id_or_path: str) -> None:
        """End a sandbox with all connections."""
        record = self._find_for_change(caller, id_or_path)
        step = self.registry.apply(record.id, LifeEvent.STOP_ASKED)
        with ignore_ended_sandbox():
            await self._engine.stop(record.id, step.reason or STOPPED)

    async def stop_listening(self, caller: Caller, id_or_path: str) -> None:
        """Accept no more connections, so that the last one ends the sandbox."""
        record = self._find_for_change(caller, id_or_path)
        step = self.registry.apply(record.id, LifeEvent.CLOSE_ASKED)
        if step.record is not None and step.record is not record:
            self._state.put_fact(step.record)
        await self._end_listening(record.id)

    async def set_access(
        self, caller: Caller, id_or_path: str, rules: Sequence[Rule], *, replace: bool = True
    ) -> AccessList:
        """Replace the rules of a sandbox, or add rules; return all rules once in force."""
        async with self._changing:
            record = self._find_for_change(caller, id_or_path)
            before = () if replace else record.access.rules
            # Two rules that differ only in the origin mean the same, and the later is kept.
            meanings = {_meaning(rule): rule for rule in (*before, *rules)}
            access = msgspec.structs.replace(record.access, rules=tuple(meanings.values()))
            wanted = await self._checked(msgspec.structs.replace(record, access=access))
            await self._engine.set_access(record.id, wanted)
            sandbox = self.registry.find(record.id)
            try:
                self._store(msgspec.structs.replace(sandbox.record, access=access))
            except CallRefusedError as exc:  # not stored, so the rules must not be in force
                refused = exc
            else:
                return access
            await self._engine.set_access(record.id, self.in_force(sandbox.record))
            raise refused

    async def who(self, bus: str, unique_name: str) -> Behind:
        """Return the origin of a connection. The gate's answer cannot be out of date."""
        id_ = await self._engine.who(bus, unique_name)
        sandbox = self.registry.get(id_) if id_ else None
        has_it = sandbox is not None and (bus, unique_name) in sandbox.connections
        return Behind(is_inside=id_ is not None, sandbox=sandbox, is_there=has_it)

    async def is_inside(self, bus: str, unique_name: str) -> bool:
        """Return whether a connection is or was in any sandbox, known or unknown."""
        return (await self.who(bus, unique_name)).is_inside

    async def request_instance_field(self, caller: Caller) -> None:
        """Add the instance field to messages to the caller, watched as for `add`."""
        await self.field_requests.add(caller.bus, caller.unique_name)

    def in_force(self, record: Record) -> AccessList:
        """Return a sandbox's list in force: given, from snaps' connections, built in."""
        return record.in_force(self.snaps.compiled(record.identity, record.plugs))

    # -- events ---------------------------------------------------------------------------------------------

    def take_event(self, event: Event) -> None:
        """Take note of an event of the engine."""
        match event:
            case Connected():
                self.registry.connect(event.sandbox, event.bus, event.unique_name)
            case Gone():
                self.registry.disconnect(event.sandbox, event.bus, event.unique_name)
            case Denied():
                if sandbox := self.registry.deny(event):
                    self._environment.announcer.denied(sandbox.record, event)
            case Ended():
                removed = self.registry.end(event.sandbox, event.reason)
                if removed is not None:
                    self._remove(removed)
            case ContainerServerLost():  # handled by the engine
                pass

    def take_snapshot(self, snapshot: Snapshot) -> None:
        """Compare the registry with a snapshot, and queue jobs that make both equal."""
        self._jobs.begin_anew()
        for record in recover_from_gate(self.registry, self._state, snapshot):
            self.watches.begin(record, again=True)
        held = self._engine.held
        result = self.registry.reconcile(
            snapshot, self.in_force, lambda record: is_held(record, held)
        )
        self._missing = result.missing
        for text in (*result.differences, *over_limit(snapshot, self.limits.rule_steps)):
            LOGGER.warning("%s", text)
        for record in result.changed:
            self._state.put_fact(record)
        for removed in result.lost:
            self._remove(removed)
        for id_ in result.strangers:
            self._later(id_, partial(self._engine.stop, id_))
        if result.strangers:  # the numbers are not in the file, and soon not at the gate
            # If the number cannot be stored now, the next stored record skips the number as well.
            with contextlib.suppress(CallRefusedError):
                self._state.skip_to(self.registry.next_number)
        for id_ in result.other_access:
            self._later(id_, partial(self._set_access_again, id_))
        self.field_requests.request_again()
        self._repeat_decisions()
        self._sweep()

    def missing(self) -> list[tuple[SandboxSpec, Sequence[int]]]:
        """Return the sandboxes to serve that the last snapshot lacked."""
        folder = self._environment.folder
        found = [sandbox.record for id_ in self._missing if (sandbox := self.registry.get(id_))]
        self._missing = ()
        return [
            make_again(one, self.in_force(one), self._engine.held, self.limits, folder)
            for one in found
        ]

    def instance_field_wishes(self) -> list[tuple[str, str]]:
        """Return the connections, as bus and unique name, that requested the instance field."""
        return self.field_requests.connections

    def lost(self, sandbox: str) -> None:
        """Take note that the engine refuses to serve a missing sandbox."""
        if removed := self.registry.lose(SandboxId(sandbox)):
            self._remove(removed)

    def name_gone(self, bus: str, unique_name: str) -> None:
        """Take note that a watched connection left the bus."""
        self.field_requests.gone(bus, unique_name)
        self.watches.name_gone(bus, unique_name)

    def bus_gone(self, bus: str) -> None:
        """Treat a bus as gone for good: end the sandboxes that have no other bus."""
        self._gone_buses.add(bus)
        for sandbox in self.registry:
            if self._gone_buses.issuperset(sandbox.record.sockets):
                self.apply_event(sandbox.record.id, LifeEvent.BUS_GONE)
        self.watches.bus_back(bus, is_same=False)

    def bus_met(self, bus: str, id_: str) -> None:
        """Take note of a bus at the start.

        If the bus restarted since the last supervisor, all have left it.
        """
        if not self._bus_ids.meet(bus, id_):
            LOGGER.warning("bus %s was restarted: all its connections are gone", bus)
            self.watches.bus_back(bus, is_same=False)
            self.field_requests.bus_back(bus, is_same=False)

    def bus_back(self, bus: str, id_: str) -> None:
        """Take note of a new connection to a bus, which watches no names yet.

        If the bus restarted, all have left it.
        """
        self._gone_buses.discard(bus)
        is_same = self._bus_ids.meet(bus, id_)
        if not is_same:
            self._engine.bus_restarted(bus)
        self.watches.bus_back(bus, is_same=is_same)
        self.field_requests.bus_back(bus, is_same=is_same)

    def apply_event(self, id_: SandboxId, event: LifeEvent) -> None:
        """Apply an event of a sandbox's life, and carry out its effects."""
        step = self.registry.apply(id_, event)
        if step.record is not None:
            LOGGER.debug("%s: %s", id_, event.value)
            self._carry_out(step, step.record)

    async def run_jobs(self) -> None:
        """Carry out the queued engine calls, for ever."""
        await self._jobs.run()

    # -- helpers -------------------------------------------------------------------------------------------

    async def _checked(self, record: Record) -> AccessList:
        """Return the list in force for a record. Raises CallRefusedError if too long or too costly."""
        access, steps = self.in_force(record), self.limits.rule_steps
        return await check_list(access, record.identity, record.sockets, steps)

    def _find_for_change(self, caller: Caller, id_or_path: str) -> Record:
        record = self.registry.find(id_or_path).record
        if caller.uid not in (0, record.uid):
            raise CallRefusedError(ACCESS_DENIED, f"{record.id} belongs to another user")
        return record

    def _listen(
        self, request: AddRequest, caller: Caller, bus: str
    ) -> AbstractContextManager[Bound]:
        if request.socket is not None and bus == request.buses[0]:
            return given_socket(request.socket)
        return bound_socket(self._environment.folder, caller.uid)

    @contextlib.contextmanager
    def _registered(self, record: Record) -> Iterator[None]:
        """Add a record to the registry, and remove the record if the block fails."""
        self.registry.add(record)
        try:
            yield
        except BaseException as exc:
            if self.registry.current(record) is not record:  # a changed record was stored
                self._state.delete(record)
            self.registry.withdraw(record.id)
            if not isinstance(exc, CallRefusedError):
                # The gate may have the sandbox, or may still get the request.
                self._later(record.id, partial(self._engine.stop, record.id))
            raise

    def _carry_out(self, step: Step, record: Record) -> None:
        for effect in step.effects:
            match effect:
                case Effect.WATCH:
                    self.watches.begin(record)
                case Effect.CLOSE:
                    self._state.put_fact(record)
                    self._later(record.id, partial(self._end_listening, record.id))
                case Effect.STOP:
                    stop = partial(self._engine.stop, record.id, step.reason or STOPPED)
                    self._later(record.id, stop)
                case Effect.TELL:
                    self._remove(Removed(record=record, reason=step.reason))
                case Effect.FORGET:
                    pass  # `_registered` does the rest

    def _repeat_decisions(self) -> None:
        """Queue the decided ends again, because the gate that was told may be gone."""
        for sandbox in self.registry:
            id_ = sandbox.record.id
            if sandbox.phase is Phase.STOPPING:
                self._later(id_, partial(self._engine.stop, id_, sandbox.reason))
            elif sandbox.phase is Phase.CLOSING and sandbox.record.listening:
                self._later(id_, partial(self._end_listening, id_))

    def _store(self, record: Record) -> None:
        self._state.put(record)
        self.registry.update(record)

    def _remove(self, removed: Removed) -> None:
        record = removed.record
        LOGGER.info("%s: ended (%s)", record.id, removed.reason)
        self._state.delete(record)
        self.watches.end(record)
        self.ended[removed.reason] = self.ended.get(removed.reason, 0) + 1
        self._environment.announcer.removed(record, removed.reason)

    def _sweep(self) -> None:
        keep = {path for sandbox in self.registry for path in sandbox.record.sockets.values()}
        for path in sweep(self._environment.folder, keep):
            LOGGER.info("%s: unlinked a socket that an earlier gate left behind", path)

    async def _end_listening(self, id_: SandboxId) -> None:
        with ignore_ended_sandbox():
            await self._engine.stop_listening(id_)
        sandbox = self.registry.get(id_)
        if sandbox is not None:  # else the sandbox has ended
            record = msgspec.structs.replace(sandbox.record, listening=False)
            self.registry.update(record)
            self._state.put_fact(record)

    async def _set_access_again(self, id_: SandboxId) -> None:
        async with self._changing:
            record = self.registry.find(id_).record
            try:
                await self._engine.set_access(id_, self.in_force(record))
            except CallRefusedError as exc:
                if exc.dbus_name == NOT_CONTAINER:  # the sandbox has ended
                    raise
                text = "%s: the gate keeps the old rules: %s; %s"
                LOGGER.error(text, id_, exc, WHAT_TO_DO)  # noqa: TRY400 - no defect of ours


def _meaning(rule: Rule) -> Rule:
    return msgspec.structs.replace(rule, origin="")
