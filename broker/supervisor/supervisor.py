"""The supervisor: registry, stored state and engine kept in step, whoever asks.

Theory of operation. The engine is right about what there is, and tells us by `take_event` and `take_snapshot`, which
never wait; what they give to do goes to `run_jobs`. A change is made at the engine, then stored, then
answered: so what was answered is in force and survives us, and of a change that was not answered either
may be true. There is no checkpoint between the last look at the registry and what follows from it.
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
from broker.supervisor.watches.watches import SandboxWatches, Watch, boot_time
from broker.wire.errors import ACCESS_DENIED, LIMITS_EXCEEDED, NOT_CONTAINER, CallRefusedError
from policy.rules import AccessList, Rule
from policy.snaps.library import Library

LOGGER: Final = logging.getLogger(__name__)


class Announcer(Protocol):
    """Who is told what becomes of sandboxes."""

    def removed(self, record: Record, reason: str) -> None:
        """It is no more, and why."""

    def denied(self, record: Record, event: Denied) -> None:
        """A message was refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What surrounds a supervisor."""

    engine: Engine
    state: StateFile
    announcer: Announcer
    watches: Mapping[str, Watch]  # by bus
    folder: Path  # of the sandboxes' sockets
    now: Callable[[], float] = time.time
    load_library: Callable[[], Library] = load_own_library
    processes: Processes = field(default_factory=Processes)
    cgroups: Cgroups = field(default_factory=Cgroups)
    boot_time: Callable[[], float] = boot_time


class Supervisor:
    """All sandboxes and their lives."""

    def __init__(self, outside: Environment, limits: ConfiguredLimits) -> None:
        records, next_number = outside.state.load()
        self.registry: Final = Registry(limits, records, next_number)
        self._outside: Final = outside
        self.limits: Final = limits
        self.vigil: Final = SandboxWatches(
            outside.watches,
            self.apply_event,
            processes=outside.processes,
            cgroups=outside.cgroups,
            now=outside.boot_time,
        )
        self.ended: Final[dict[str, int]] = {}  # how many, by reason
        # One change of rules at a time: each one reads the list that it changes.
        self._changing: Final = trio.Lock()
        self.snaps: Final = Snaps(outside.state.load_world(), outside.load_library)
        self.policy: Final = Policy(
            outside.state,
            outside.engine,
            self.registry,
            self.snaps,
            self._changing,
            limits.rule_steps,
        )
        self._jobs: Final = EngineJobQueue()
        self._later: Final = self._jobs.add
        self.tags: Final = InstanceFieldRequests(
            outside.state, outside.engine, outside.watches, self._later
        )
        self._bus_ids: Final = BusIds(outside.state)
        self._gone_buses: Final[set[str]] = set()
        self._missing: Sequence[SandboxId] = ()
        for record in records:
            self.vigil.begin(record, again=True)

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
            if is_reserved(one.fd for one in bound.values()):
                text = "the broker has no file descriptors left"
                raise CallRefusedError(LIMITS_EXCEEDED, text)
            now = Times(created=self._outside.now(), boot=self._outside.boot_time())
            record = make_record(number, request, caller, bound, now)
            with self._registered(record):
                access = await self._checked(record)
                spec, fds = make_spec(record, access, bound, request.close_notify, self.limits)
                await self._outside.engine.add(spec, fds)
                self._store_new(record)
        if request.ready_notify is not None:
            notify(request.ready_notify)
        return record

    def _store_new(self, record: Record) -> None:
        # Once the gate has it, and not before: what is stored and at no gate would be told of as lost, and nobody
        # was told that it is there. Somebody may have seen it in the list, and changed it.
        try:
            self._outside.state.put(self.registry.present(record))
        except CallRefusedError:
            self._later(record.id, partial(self._outside.engine.stop, record.id))
            raise

    def announce(self, record: Record) -> None:
        """Tell that the creator has been answered: its end may be told from now on."""
        self.apply_event(record.id, LifeEvent.ANNOUNCED)
        if self._gone_buses.issuperset(record.sockets):  # be it that they went meanwhile
            self.apply_event(record.id, LifeEvent.BUS_GONE)

    async def stop(self, caller: Caller, id_or_path: str) -> None:
        """End a sandbox, its connections included."""
        record = self._find_for_change(caller, id_or_path)
        step = self.registry.apply(record.id, LifeEvent.STOP_ASKED)
        with ignore_ended_sandbox():
            await self._outside.engine.stop(record.id, step.reason or STOPPED)

    async def stop_listening(self, caller: Caller, id_or_path: str) -> None:
        """Take no more connections; the sandbox ends with its last one."""
        record = self._find_for_change(caller, id_or_path)
        step = self.registry.apply(record.id, LifeEvent.CLOSE_ASKED)
        if step.record is not None and step.record is not record:
            self._outside.state.put_fact(step.record)
        await self._end_listening(record.id)

    async def set_access(
        self, caller: Caller, id_or_path: str, rules: Sequence[Rule], *, replace: bool = True
    ) -> AccessList:
        """Give it these rules, or these as well, and return all once they are in force."""
        async with self._changing:
            record = self._find_for_change(caller, id_or_path)
            before = () if replace else record.access.rules
            # The same rule twice says nothing more; its origin is no part of what it says.
            meanings = {_meaning(rule): rule for rule in (*before, *rules)}
            access = msgspec.structs.replace(record.access, rules=tuple(meanings.values()))
            wanted = await self._checked(msgspec.structs.replace(record, access=access))
            await self._outside.engine.set_access(record.id, wanted)
            sandbox = self.registry.find(record.id)
            try:
                self._store(msgspec.structs.replace(sandbox.record, access=access))
            except CallRefusedError as exc:  # not stored, so it may not be in force
                refused = exc
            else:
                return access
            await self._outside.engine.set_access(record.id, self.in_force(sandbox.record))
            raise refused

    async def who(self, bus: str, unique_name: str) -> Behind:
        """Return who is behind a connection. The gate's answer cannot be out of date."""
        id_ = await self._outside.engine.who(bus, unique_name)
        sandbox = self.registry.get(id_) if id_ else None
        has_it = sandbox is not None and (bus, unique_name) in sandbox.connections
        return Behind(is_inside=id_ is not None, sandbox=sandbox, is_there=has_it)

    async def is_inside(self, bus: str, unique_name: str) -> bool:
        """Return whether a connection is or was in any sandbox, known or unknown."""
        return (await self.who(bus, unique_name)).is_inside

    async def request_instance_field(self, caller: Caller) -> None:
        """Have the caller's messages from sandboxes carry the instance path. It is watched as for `add`."""
        await self.tags.add(caller.bus, caller.unique_name)

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
            case ContainerServerLost():  # the engine's to deal with
                pass

    def take_snapshot(self, snapshot: Snapshot) -> None:
        """Take the engine's word for what there is; set right what should be otherwise."""
        self._jobs.begin_anew()
        for record in recover_from_gate(self.registry, self._outside.state, snapshot):
            self.vigil.begin(record, again=True)
        held = self._outside.engine.held
        result = self.registry.reconcile(
            snapshot, self.in_force, lambda record: is_held(record, held)
        )
        self._missing = result.missing
        for text in (*result.differences, *over_limit(snapshot, self.limits.rule_steps)):
            LOGGER.warning("%s", text)
        for record in result.changed:
            self._outside.state.put_fact(record)
        for removed in result.lost:
            self._remove(removed)
        for id_ in result.strangers:
            self._later(id_, partial(self._outside.engine.stop, id_))
        if result.strangers:  # of which the file knows nothing, and the gate neither, soon
            # If it cannot be stored, the next one that is sees to it.
            with contextlib.suppress(CallRefusedError):
                self._outside.state.skip_to(self.registry.next_number)
        for id_ in result.other_access:
            self._later(id_, partial(self._set_access_again, id_))
        self.tags.tell_again()
        self._decide_again()
        self._sweep()

    def missing(self) -> list[tuple[SandboxSpec, Sequence[int]]]:
        """Return what the engine had not by its last snapshot, and is to serve again."""
        outside = self._outside
        found = [sandbox.record for id_ in self._missing if (sandbox := self.registry.get(id_))]
        self._missing = ()
        return [
            make_again(one, self.in_force(one), outside.engine.held, self.limits, outside.folder)
            for one in found
        ]

    def instance_field_wishes(self) -> list[tuple[str, str]]:
        """Return who wants header field 10, as bus and unique name."""
        return self.tags.wishes

    def lost(self, sandbox: str) -> None:
        """Take note that the engine does not take one again."""
        if removed := self.registry.lose(SandboxId(sandbox)):
            self._remove(removed)

    def name_gone(self, bus: str, unique_name: str) -> None:
        """A connection that was watched left its bus."""
        self.tags.gone(bus, unique_name)
        self.vigil.name_gone(bus, unique_name)

    def bus_gone(self, bus: str) -> None:
        """A bus counts as gone for good, with whoever was on it: what has no other one ends."""
        self._gone_buses.add(bus)
        for sandbox in self.registry:
            if self._gone_buses.issuperset(sandbox.record.sockets):
                self.apply_event(sandbox.record.id, LifeEvent.BUS_GONE)
        self.vigil.bus_back(bus, is_same=False)

    def bus_met(self, bus: str, id_: str) -> None:
        """At the start: if it is another bus than the one of before us, all have left it."""
        if not self._bus_ids.meet(bus, id_):
            LOGGER.warning("bus %s: it started anew: whoever was on it is gone", bus)
            self.vigil.bus_back(bus, is_same=False)
            self.tags.bus_back(bus, is_same=False)

    def bus_back(self, bus: str, id_: str) -> None:
        """There is a new connection to a bus, with a watch over nobody. If it is another bus, all have left it."""
        self._gone_buses.discard(bus)
        is_same = self._bus_ids.meet(bus, id_)
        if not is_same:
            self._outside.engine.bus_restarted(bus)
        self.vigil.bus_back(bus, is_same=is_same)
        self.tags.bus_back(bus, is_same=is_same)

    def apply_event(self, id_: SandboxId, event: LifeEvent) -> None:
        """Something ends a sandbox, or closes it: see to what follows."""
        step = self.registry.apply(id_, event)
        if step.record is not None:
            LOGGER.debug("%s: %s", id_, event.value)
            self._carry_out(step, step.record)

    async def run_jobs(self) -> None:
        """Do what events gave to do, for ever."""
        await self._jobs.run()

    # -- helpers -------------------------------------------------------------------------------------------

    async def _checked(self, record: Record) -> AccessList:
        """Return the list to be in force, if it is not too long or slow. Raises CallRefusedError."""
        access, steps = self.in_force(record), self.limits.rule_steps
        return await check_list(access, record.identity, record.sockets, steps)

    def _find_for_change(self, caller: Caller, id_or_path: str) -> Record:
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

    @contextlib.contextmanager
    def _registered(self, record: Record) -> Iterator[None]:
        """Have it in the registry, unless the block fails."""
        self.registry.add(record)
        try:
            yield
        except BaseException as exc:
            if self.registry.present(record) is not record:  # what was changed was stored
                self._outside.state.delete(record)
            self.registry.withdraw(record.id)
            if not isinstance(exc, CallRefusedError):
                # The gate may have it, or come to have it.
                self._later(record.id, partial(self._outside.engine.stop, record.id))
            raise

    def _carry_out(self, step: Step, record: Record) -> None:
        for effect in step.effects:
            match effect:
                case Effect.WATCH:
                    self.vigil.begin(record)
                case Effect.CLOSE:
                    self._outside.state.put_fact(record)
                    self._later(record.id, partial(self._end_listening, record.id))
                case Effect.STOP:
                    stop = partial(self._outside.engine.stop, record.id, step.reason or STOPPED)
                    self._later(record.id, stop)
                case Effect.TELL:
                    self._remove(Removed(record=record, reason=step.reason))
                case Effect.FORGET:
                    pass  # whoever withdrew it sees to that

    def _decide_again(self) -> None:
        """What was decided may have been told to a gate that is no more."""
        for sandbox in self.registry:
            id_ = sandbox.record.id
            if sandbox.phase is Phase.STOPPING:
                self._later(id_, partial(self._outside.engine.stop, id_, sandbox.reason))
            elif sandbox.phase is Phase.CLOSING and sandbox.record.listening:
                self._later(id_, partial(self._end_listening, id_))

    def _store(self, record: Record) -> None:
        self._outside.state.put(record)
        self.registry.update(record)

    def _remove(self, removed: Removed) -> None:
        record = removed.record
        LOGGER.info("%s: ended (%s)", record.id, removed.reason)
        self._outside.state.delete(record)
        self.vigil.end(record)
        self.ended[removed.reason] = self.ended.get(removed.reason, 0) + 1
        self._outside.announcer.removed(record, removed.reason)

    def _sweep(self) -> None:
        keep = {path for sandbox in self.registry for path in sandbox.record.sockets.values()}
        for path in sweep(self._outside.folder, keep):
            LOGGER.info("%s: left behind by an earlier gate: unlinked", path)

    async def _end_listening(self, id_: SandboxId) -> None:
        with ignore_ended_sandbox():
            await self._outside.engine.stop_listening(id_)
        sandbox = self.registry.get(id_)
        if sandbox is not None:  # else that was its end
            record = msgspec.structs.replace(sandbox.record, listening=False)
            self.registry.update(record)
            self._outside.state.put_fact(record)

    async def _set_access_again(self, id_: SandboxId) -> None:
        async with self._changing:
            record = self.registry.find(id_).record
            try:
                await self._outside.engine.set_access(id_, self.in_force(record))
            except CallRefusedError as exc:
                if exc.dbus_name == NOT_CONTAINER:  # it ended by itself
                    raise
                text = "%s: the gate keeps the rules that it had: %s; %s"
                LOGGER.error(text, id_, exc, WHAT_TO_DO)  # noqa: TRY400 - no defect of ours


def _meaning(rule: Rule) -> Rule:
    return msgspec.structs.replace(rule, origin="")
