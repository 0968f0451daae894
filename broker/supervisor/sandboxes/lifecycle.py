"""The life of a sandbox as a table: what can happen to it, what it is then, and what follows. Pure.

Theory of operation. TABLE has a row for each thing that means something in a phase; what has no row there means
nothing: the gate and the watches may be late, and tell of what ended already. The first event that ends a
sandbox gives the reason: no row out of STOPPING or ENDED has one of its own. What closes it (its creator
left, somebody asked for it) is the reason only if the last connection ends it, not if something else comes before.
Only ANNOUNCED leads out of STARTING and ENDED to anything that is told, so nothing is told of a
sandbox before its creator knows of it. docs/lifetime.md has the table and a picture, both made from it by
`python -m tests.helpers.lifetime_picture`.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec


class Phase(enum.Enum):
    """Where a sandbox is in its life."""

    STARTING = enum.auto()  # its creator does not know of it yet
    RUNNING = enum.auto()
    CLOSING = enum.auto()  # takes no more connections, and ends with the last
    STOPPING = enum.auto()  # its end is decided, and the gate has to do it
    ENDED = enum.auto()  # before its creator knew of it
    GONE = enum.auto()  # told, and forgotten


class Event(enum.Enum):
    """What happens to a sandbox. The value is how docs/lifetime.md says it."""

    ANNOUNCED = "the creator is answered"
    WITHDRAWN = "adding it fails"
    PIPE_CLOSED = "gate: the pipe is closed"
    LAST_CONNECTION = "gate: the last connection closes"
    STOPPED = "gate: it is stopped"
    REMOVED = "the bus removes its own instance"
    GATE_LOST = "the gate has lost it"
    CLOSE_ASKED = "StopListening"
    CREATOR_LEFT = "the creator leaves the bus"
    STOP_ASKED = "StopInstance"
    PROCESS_ENDED = "the process ends"
    CGROUP_EMPTY = "the cgroup is empty"
    TIME_OVER = "the time is over"
    BUS_GONE = "the bus is gone for good"


class Effect(enum.Enum):
    """What follows."""

    WATCH = "watch process, cgroup, time and creator"
    CLOSE = "the gate stops listening"
    STOP = "the gate stops it"
    TELL = "signals; the record is deleted"
    FORGET = "the record is deleted"


# The reasons, as SandboxEnded tells them.
CLOSE_NOTIFY: Final = "close-notify"
LAST_CONNECTION: Final = "last-connection"
STOPPED: Final = "stopped"
CREATOR_GONE: Final = "creator-gone"
PROCESS_ENDED: Final = "process-ended"
CGROUP_EMPTY: Final = "cgroup-empty"
TIME_LIMIT: Final = "time-limit"
BUS_GONE: Final = "bus-gone"
INSTANCE_REMOVED: Final = "instance-removed"
GATE_LOST: Final = "gate-lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """What an event means in a phase. Without a reason the one that was noted stays."""

    to: Phase
    reason: str | None = None
    effects: tuple[Effect, ...] = ()


# What the watches and callers decide, with its reason: the gate is told, and the end follows.
_DECIDED: Final = {
    Event.STOP_ASKED: STOPPED,
    Event.PROCESS_ENDED: PROCESS_ENDED,
    Event.CGROUP_EMPTY: CGROUP_EMPTY,
    Event.TIME_OVER: TIME_LIMIT,
    Event.BUS_GONE: BUS_GONE,
}
# What the gate did, with its reason.
_DONE: Final = {
    Event.PIPE_CLOSED: CLOSE_NOTIFY,
    Event.LAST_CONNECTION: LAST_CONNECTION,
    Event.STOPPED: STOPPED,
    Event.REMOVED: INSTANCE_REMOVED,
    Event.GATE_LOST: GATE_LOST,
}
_LIVING: Final = (Phase.RUNNING, Phase.CLOSING)


def _make_table() -> dict[tuple[Phase, Event], Transition]:
    starting, running, closing = Phase.STARTING, Phase.RUNNING, Phase.CLOSING
    stopping, ended, gone = Phase.STOPPING, Phase.ENDED, Phase.GONE
    tell, forget = (Effect.TELL,), (Effect.FORGET,)
    stop, close = (Effect.STOP,), (Effect.CLOSE,)
    table = {
        (starting, Event.ANNOUNCED): Transition(to=running, effects=(Effect.WATCH,)),
        (starting, Event.WITHDRAWN): Transition(to=gone, effects=forget),
        # Somebody saw it in the list: what the gate says then is its end.
        (starting, Event.STOP_ASKED): Transition(to=starting, effects=stop),
        (starting, Event.CLOSE_ASKED): Transition(to=starting, effects=close),
        (ended, Event.ANNOUNCED): Transition(to=gone, effects=tell),
        (ended, Event.WITHDRAWN): Transition(to=gone, effects=forget),
        (running, Event.CLOSE_ASKED): Transition(to=closing, reason=LAST_CONNECTION, effects=close),
        (running, Event.CREATOR_LEFT): Transition(to=closing, reason=CREATOR_GONE, effects=close),
        (closing, Event.CLOSE_ASKED): Transition(to=closing, effects=close),
    }
    for event, reason in _DONE.items():
        if event is not Event.GATE_LOST:  # which may not have had it yet
            table[starting, event] = Transition(to=ended, reason=reason)
        for phase in _LIVING:
            table[phase, event] = Transition(to=gone, reason=reason, effects=tell)
        table[stopping, event] = Transition(to=gone, effects=tell)
    # What closed it is why its last connection was the last; a gate that went took that one along.
    for event in (Event.LAST_CONNECTION, Event.GATE_LOST):
        table[closing, event] = Transition(to=gone, effects=tell)
    for event, reason in _DECIDED.items():
        for phase in _LIVING:
            table[phase, event] = Transition(to=stopping, reason=reason, effects=stop)
    # Once more: the first time may have been asked of a gate that is no more.
    table[stopping, Event.STOP_ASKED] = Transition(to=stopping, effects=stop)
    return table


TRANSITIONS: Final[Mapping[tuple[Phase, Event], Transition]] = _make_table()
# What the gate gives as the reason of an end, and what that is to us.
FROM_GATE: Final[Mapping[str, Event]] = {
    reason: event for event, reason in _DONE.items() if event is not Event.GATE_LOST
}
# And what had been decided, if the gate stopped it for that reason: perhaps by a supervisor that is no more.
DECIDED: Final[Mapping[str, Event]] = {
    reason: event for event, reason in _DECIDED.items() if reason not in FROM_GATE
}


class Process(msgspec.Struct, frozen=True):
    """A process that a sandbox ends with. Pids are used again; the two together are not."""

    pid: int
    start: int  # clock ticks since boot, as /proc/PID/stat has it


class Cgroup(msgspec.Struct, frozen=True):
    """A cgroup that a sandbox ends with. One of the same path made later has another inode."""

    path: str
    inode: int
