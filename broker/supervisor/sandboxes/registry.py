"""The registry of sandboxes. Pure: changes return effects.

Theory of operation. The table in lifecycle.py decides what becomes of a sandbox, and `apply` is the only way to
change a phase. A sandbox is gone when the engine reports the end, or does not have the sandbox.

A sandbox that ended while STARTING is kept as ENDED until `announce` says that the creator knows. So each
announced sandbox has an announced end, after the announcement, and no other sandbox has any:

    AddServer:                    STARTING
    gate: the pipe is closed      ENDED            (not announced, nothing to tell)
    the creator is answered       GONE             InstanceRemoved, after the answer

A number is used for a single sandbox, also across restarts: `next_number` is stored together with the records.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NewType

import msgspec

from broker.control_protocol.messages import (
    Denied,
    SandboxState,
    Snapshot,
    shorten_denial_text,
)
from broker.supervisor.config import ConfiguredLimits
from broker.supervisor.sandboxes.lifecycle import (
    DECIDED,
    FROM_GATE,
    LAST_CONNECTION,
    TRANSITIONS,
    Cgroup,
    Effect,
    Event,
    Phase,
    Process,
)
from broker.wire.errors import LIMITS_EXCEEDED, NOT_CONTAINER, CallRefusedError
from broker.wire.interfaces import INSTANCE_PREFIX
from policy.bus_calls import own_calls
from policy.rules import NO_ACCESS, Access, AccessList, Identity, Rule
from policy.wall import WALL

SandboxId = NewType("SandboxId", str)

# The last refusals of each sandbox, which are kept for Show.
MAX_DENIALS: Final = 50

# Portals identify an app by the gate's process, and so take a sandboxed app for a host's (docs/design.md, Identity).
PORTAL_RULES: Final = tuple(
    Rule(
        access=frozenset({Access.SEND}),
        deny=True,
        name=name,
        origin="built in: portals would take the sandbox for a program of the host"
        " (--portals-as-host allows it)",
    )
    for name in ("org.freedesktop.portal.*", "org.freedesktop.impl.portal.*")
)

# Rules of every sandbox, unless the creator insists on portals.
BUILT_IN: Final = (*PORTAL_RULES, *WALL)


# The origin of the rules that let an app request the names of an `own` rule.
OWN_CALLS: Final = "built in: a rule for owning a name lets it be asked for"


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The stored description of a sandbox.

    Metadata and credentials are marshalled `a{sv}`.
    """

    number: int
    type: str
    app: str
    component: str | None = None
    metadata: bytes
    uid: int  # of the creator
    creator: str  # unique name
    creator_bus: str
    credentials: bytes
    sockets: dict[str, str]  # bus -> path
    addresses: dict[str, str]  # bus -> address
    access: AccessList  # as given: without the built-in rules
    portals_as_host: bool = False
    keep_after_creator: bool = False
    close_notify: bool = False
    plugs: tuple[str, ...] = ()
    process: Process | None = None  # whose end ends the sandbox
    cgroup: Cgroup | None = None  # whose last process's end ends the sandbox
    time_limit: int = 0  # seconds; 0: none
    expires: float = 0.0  # the end of the time limit, in seconds since boot
    created: float
    listening: bool = True
    closing: str = ""  # why the sandbox shall accept no more connections
    held: AccessList | None = (
        None  # rules from connections of snaps that were lost with the state file
    )

    @property
    def id(self) -> SandboxId:
        return SandboxId(f"c{self.number}")

    @property
    def path(self) -> str:
        return f"{INSTANCE_PREFIX}{self.id}"

    @property
    def identity(self) -> Identity:
        return Identity(type=self.type, app=self.app, component=self.component)

    @property
    def access_in_force(self) -> AccessList:
        """The given rules with the built-in rules."""
        return self.in_force(None)

    @property
    def built_in(self) -> tuple[Rule, ...]:
        """The rules that no caller can take away."""
        return WALL if self.portals_as_host else BUILT_IN

    def in_force(self, compiled: AccessList | None) -> AccessList:
        """Return the given rules with those of the snaps' connections and the built-in rules.

        A default allows a message only if the defaults of both lists do.
        """
        compiled = self.held if compiled is None else compiled
        more = compiled or NO_ACCESS
        built_in = self.built_in
        if more.bus_by_rule:
            built_in += own_calls(self.access.rules, OWN_CALLS)
        return AccessList(
            rules=(*self.access.rules, *more.rules, *built_in),
            receive_from_host=self.access.receive_from_host and more.receive_from_host,
            bus_by_rule=self.access.bus_by_rule or more.bus_by_rule,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class SandboxEntry:
    """A sandbox in the registry."""

    record: Record
    phase: Phase = Phase.STARTING
    connections: dict[tuple[str, str], None] = field(default_factory=dict)  # (bus, unique name)
    denied: int = 0  # number of refused messages
    denials: deque[Denied] = field(default_factory=lambda: deque(maxlen=MAX_DENIALS))
    reason: str = ""  # why the sandbox ends, or accepts no more connections

    @property
    def is_announced(self) -> bool:
        """Return whether the creator was told of the sandbox, and the end was not announced."""
        return self.phase in {Phase.RUNNING, Phase.CLOSING, Phase.STOPPING}

    def may_be_seen_by(self, uid: int) -> bool:
        """Return whether a user may know of the sandbox."""
        return uid in {0, self.record.uid}


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """An end to be announced as InstanceRemoved and SandboxEnded."""

    record: Record
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The result of an event."""

    record: Record | None = None
    reason: str = ""
    effects: tuple[Effect, ...] = ()

    @property
    def removed(self) -> Removed | None:
        """The end to be announced, if the event led to an end."""
        if self.record is None or Effect.TELL not in self.effects:
            return None
        return Removed(record=self.record, reason=self.reason)


NOTHING: Final = Step()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciled:
    """The differences between the registry and a snapshot of the gate."""

    strangers: tuple[SandboxId, ...]  # only at the gate: to be stopped
    lost: tuple[Removed, ...]  # not at the gate, and ended by that
    missing: tuple[SandboxId, ...]  # not at the gate, which can serve them again
    changed: tuple[Record, ...]  # to be stored
    other_access: tuple[SandboxId, ...]  # under rules that were never acknowledged
    differences: tuple[str, ...]  # the same in words, for the log


class Registry:
    """All sandboxes, by id."""

    def __init__(
        self, limits: ConfiguredLimits, records: Iterable[Record] = (), next_number: int = 0
    ) -> None:
        self._limits: Final = limits
        self._sandboxes: Final[dict[SandboxId, SandboxEntry]] = {}
        self._by_uid: Final[dict[int, int]] = {}
        self.next_number = next_number
        for record in records:
            self.restore(record)

    def __iter__(self) -> Iterator[SandboxEntry]:
        return iter(list(self._sandboxes.values()))

    def __len__(self) -> int:
        return len(self._sandboxes)

    # -- looking up -----------------------------------------------------------------------------

    def get(self, id_: str) -> SandboxEntry | None:
        """Return a sandbox that has not ended; None if there is none of this id."""
        sandbox = self._sandboxes.get(SandboxId(id_))
        return sandbox if sandbox is not None and sandbox.phase is not Phase.ENDED else None

    def find(self, id_or_path: str, *, seen_by: int | None = None) -> SandboxEntry:
        """Return the sandbox of an id or path. Raises CallRefusedError NotContainer.

        The error is the same for a sandbox that the user `seen_by` may not see.
        """
        sandbox = self.get(id_or_path.removeprefix(INSTANCE_PREFIX))
        if sandbox is None or (seen_by is not None and not sandbox.may_be_seen_by(seen_by)):
            raise CallRefusedError(NOT_CONTAINER, f"there is no sandbox {id_or_path[:100]!r}")
        return sandbox

    def current(self, record: Record) -> Record:
        """Return the current record of a sandbox, also after an end before the announcement."""
        return self._sandboxes[record.id].record

    def connection_count(self) -> int:
        """Count the connections of all sandboxes."""
        return sum(len(sandbox.connections) for sandbox in self._sandboxes.values())

    # -- life -------------------------------------------------------------------------------------

    def new_number(self, uid: int, metadata_size: int) -> int:
        """Return the number for a sandbox to `add` at once. Raises CallRefusedError LimitsExceeded."""
        limits = self._limits
        _check_limit(
            "max_container_metadata_bytes", limits.max_container_metadata_bytes, metadata_size
        )
        _check_limit("max_containers", limits.max_containers, len(self._sandboxes) + 1)
        _check_limit(
            "max_containers_per_user", limits.max_containers_per_user, self._by_uid.get(uid, 0) + 1
        )
        return self.next_number

    def add(self, record: Record) -> SandboxEntry:
        """Add a new sandbox in the phase STARTING."""
        assert record.id not in self._sandboxes
        self.next_number = max(self.next_number, record.number + 1)
        self._by_uid[record.uid] = self._by_uid.get(record.uid, 0) + 1
        sandbox = self._sandboxes[record.id] = SandboxEntry(record=record)
        return sandbox

    def restore(self, record: Record) -> None:
        """Add a sandbox that an earlier supervisor announced."""
        sandbox = self.add(record)
        sandbox.phase = Phase.RUNNING
        if record.closing or not record.listening:
            sandbox.phase = Phase.CLOSING
            sandbox.reason = record.closing or LAST_CONNECTION

    def withdraw(self, id_: SandboxId) -> None:
        """Remove a sandbox that could not be made."""
        step = self.apply(id_, Event.WITHDRAWN)
        assert Effect.FORGET in step.effects

    def announce(self, id_: SandboxId) -> Removed | None:
        """Take note that the creator was answered; return the end if the sandbox ended before."""
        return self.apply(id_, Event.ANNOUNCED).removed

    def end(self, id_: str, reason: str) -> Removed | None:
        """Take note that the gate ended a sandbox.

        Unknown ids are ignored, because those sandboxes were withdrawn.
        """
        if (decided := DECIDED.get(reason)) is not None:
            self.apply(id_, decided)
        return self.apply(id_, FROM_GATE.get(reason, Event.STOPPED)).removed

    def apply(self, id_: str, event: Event) -> Step:
        """Apply an event by the table of transitions.

        An event without a transition changes nothing.
        """
        sandbox = self._sandboxes.get(SandboxId(id_))
        row = TRANSITIONS.get((sandbox.phase, event)) if sandbox is not None else None
        if sandbox is None or row is None:
            return NOTHING
        sandbox.phase = row.to
        sandbox.reason = sandbox.reason if row.reason is None else row.reason
        if row.to is Phase.CLOSING and not sandbox.record.closing:
            sandbox.record = msgspec.structs.replace(sandbox.record, closing=sandbox.reason)
        if row.to is Phase.GONE:
            self._forget(sandbox)
        return Step(record=sandbox.record, reason=sandbox.reason, effects=row.effects)

    def update(self, record: Record) -> None:
        """Replace the record of a sandbox."""
        sandbox = self._sandboxes[record.id]
        assert sandbox.record.uid == record.uid
        sandbox.record = record

    # -- connections and denials ----------------------------------------------------------------------

    def connect(self, id_: str, bus: str, unique_name: str) -> None:
        """Add a connection that has a unique name."""
        if sandbox := self.get(id_):
            sandbox.connections[bus, unique_name] = None

    def disconnect(self, id_: str, bus: str, unique_name: str) -> None:
        """Remove a connection that was closed."""
        if sandbox := self.get(id_):
            sandbox.connections.pop((bus, unique_name), None)

    def deny(self, event: Denied) -> SandboxEntry | None:
        """Keep a refusal with shortened texts, because the sandbox chose the texts."""
        sandbox = self.get(event.sandbox)
        if sandbox is not None:
            # An event without a kind is no refusal itself, and only counts those that were too many to report.
            sandbox.denied += bool(event.kind) + event.more
            sandbox.denials.append(shorten(event))
        return sandbox

    # -- after a restart of the supervisor or the gate ----------------------------------------------------

    def reconcile(
        self,
        snapshot: Snapshot,
        in_force: Callable[[Record], AccessList] = lambda record: record.access_in_force,
        is_held: Callable[[Record], bool] = lambda _record: False,
    ) -> Reconciled:
        """Compare the registry with a snapshot, which is right about what exists.

        Sandboxes that are STARTING are left to the call of AddServer that is at work.
        """
        theirs = {state.spec.id: state for state in snapshot.sandboxes}
        strangers, others = [], []
        differences: list[str] = []
        changed: list[Record] = []
        for id_, state in theirs.items():
            self._keep_number(id_)
            sandbox = self.get(id_)
            if sandbox is None:
                strangers.append(SandboxId(id_))
                differences.append(f"{id_}: stopped, because only the gate knew it")
            elif sandbox.is_announced:
                changed += self._adopt(sandbox, state, differences)
                if state.spec.access != in_force(sandbox.record):
                    others.append(sandbox.record.id)
                    differences.append(f"{id_}: rules set again, because the gate had others")
        lost, missing = [], []
        for sandbox in self:
            if not sandbox.is_announced or sandbox.record.id in theirs:
                continue
            if sandbox.phase is Phase.RUNNING and is_held(sandbox.record):
                sandbox.connections.clear()
                missing.append(sandbox.record.id)
                differences.append(f"{sandbox.record.id}: served again, because the gate lacked it")
            elif removed := self._lose(sandbox):
                lost.append(removed)
                differences.append(f"{sandbox.record.id}: ended, because the gate lacked it")
        return Reconciled(
            strangers=tuple(strangers),
            lost=tuple(lost),
            missing=tuple(missing),
            changed=tuple(changed),
            other_access=tuple(others),
            differences=tuple(differences),
        )

    def lose(self, id_: SandboxId) -> Removed | None:
        """Take note that the gate does not have a sandbox, and will not."""
        sandbox = self.get(id_)
        return self._lose(sandbox) if sandbox is not None else None

    def _lose(self, sandbox: SandboxEntry) -> Removed | None:
        # A sandbox that accepted no more connections has lost the last connection with the gate.
        closing = sandbox.phase is Phase.CLOSING
        event = Event.LAST_CONNECTION if closing else Event.GATE_LOST
        return self.apply(sandbox.record.id, event).removed

    def _adopt(
        self, sandbox: SandboxEntry, state: SandboxState, differences: list[str]
    ) -> Iterator[Record]:
        sandbox.connections = dict.fromkeys(state.connections)
        sandbox.denied = state.denied
        if sandbox.record.listening and not state.listening:
            differences.append(f"{sandbox.record.id}: the gate stopped listening")
            self.apply(sandbox.record.id, Event.CLOSE_ASKED)
            sandbox.record = msgspec.structs.replace(sandbox.record, listening=False)
            yield sandbox.record

    def _keep_number(self, id_: str) -> None:
        number = id_.removeprefix("c")
        if number.isdecimal():
            self.next_number = max(self.next_number, int(number) + 1)

    def _forget(self, sandbox: SandboxEntry) -> None:
        record = sandbox.record
        del self._sandboxes[record.id]
        self._by_uid[record.uid] -= 1
        if not self._by_uid[record.uid]:
            del self._by_uid[record.uid]


def shorten(event: Denied) -> Denied:
    """Return the event with texts of bounded length, whatever a gate sent."""
    texts: Mapping[str, str] = {
        name: shorten_denial_text(value)
        for name, value in msgspec.structs.asdict(event).items()
        if isinstance(value, str)
    }
    return msgspec.structs.replace(event, **texts)


def _check_limit(name: str, limit: int, wanted: int) -> None:
    if wanted > limit:
        raise CallRefusedError(LIMITS_EXCEEDED, f"{name}={limit} would be exceeded")
