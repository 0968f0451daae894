"""The life of a sandbox as a table of transitions. Pure.

Theory of operation. TRANSITIONS has a row for each event that matters in a phase. Other events change nothing,
because the gate and the watches may report late on a sandbox that has ended already.

Reasons: the first event that ends a sandbox gives the reason, so no row out of STOPPING or ENDED has a reason. An event
that closes a sandbox (the creator left, or StopListening) gives the reason only if the last connection then ends it.

Announcements: only ANNOUNCED leads from STARTING or ENDED to an effect that tells anybody. So nothing is announced
of a sandbox before the creator knows of the sandbox.

docs/lifetime.md has this table and a picture, both made from the table by `python -m tests.helpers.lifetime_picture`.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec


class Phase(enum.Enum):
    """A phase in the life of a sandbox."""

    STARTING = enum.auto()  # the creator does not know the sandbox yet
    RUNNING = enum.auto()
    CLOSING = enum.auto()  # accepts no more connections, and ends with the last connection
    STOPPING = enum.auto()  # the end is decided, and the gate is asked to carry it out
    ENDED = enum.auto()  # ended before the creator knew
    GONE = enum.auto()  # announced as ended, and removed


class Event(enum.Enum):
    """An event in the life of a sandbox. The value is the text in docs/lifetime.md."""

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
    """An effect of a transition. The value is the text in docs/lifetime.md."""

    WATCH = "watch process, cgroup, time and creator"
    CLOSE = "the gate stops listening"
    STOP = "the gate stops the sandbox"
    TELL = "the signals are sent, and the record is deleted"
    FORGET = "the record is deleted"


# Reasons of ends, as sent with SandboxEnded.
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
    """The effect of an event in a phase. Without a reason, the recorded reason stays."""

    to: Phase
    reason: str | None = None
    effects: tuple[Effect, ...] = ()


# Ends that watches and callers decide, with reasons. The gate is asked, and the end follows.
_DECIDED: Final = {
    Event.STOP_ASKED: STOPPED,
    Event.PROCESS_ENDED: PROCESS_ENDED,
    Event.CGROUP_EMPTY: CGROUP_EMPTY,
    Event.TIME_OVER: TIME_LIMIT,
    Event.BUS_GONE: BUS_GONE,
}
# Ends that the gate reports, with reasons.
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
        # A caller saw the sandbox in the list. The gate's report is then the end.
        (starting, Event.STOP_ASKED): Transition(to=starting, effects=stop),
        (starting, Event.CLOSE_ASKED): Transition(to=starting, effects=close),
        (ended, Event.ANNOUNCED): Transition(to=gone, effects=tell),
        (ended, Event.WITHDRAWN): Transition(to=gone, effects=forget),
        (running, Event.CLOSE_ASKED): Transition(to=closing, reason=LAST_CONNECTION, effects=close),
        (running, Event.CREATOR_LEFT): Transition(to=closing, reason=CREATOR_GONE, effects=close),
        (closing, Event.CLOSE_ASKED): Transition(to=closing, effects=close),
    }
    for event, reason in _DONE.items():
        if event is not Event.GATE_LOST:  # the lost gate may not have had the sandbox yet
            table[starting, event] = Transition(to=ended, reason=reason)
        for phase in _LIVING:
            table[phase, event] = Transition(to=gone, reason=reason, effects=tell)
        table[stopping, event] = Transition(to=gone, effects=tell)
    # The reason of closing stays, because closing made the last connection the last. A lost gate ended that connection.
    for event in (Event.LAST_CONNECTION, Event.GATE_LOST):
        table[closing, event] = Transition(to=gone, effects=tell)
    for event, reason in _DECIDED.items():
        for phase in _LIVING:
            table[phase, event] = Transition(to=stopping, reason=reason, effects=stop)
    # Asked again, because the gate that was asked first may be gone.
    table[stopping, Event.STOP_ASKED] = Transition(to=stopping, effects=stop)
    return table


TRANSITIONS: Final[Mapping[tuple[Phase, Event], Transition]] = _make_table()
# The event for each reason that the gate reports with an end.
FROM_GATE: Final[Mapping[str, Event]] = {
    reason: event for event, reason in _DONE.items() if event is not Event.GATE_LOST
}
# The decision behind a reason that the gate reports, which perhaps an earlier supervisor made.
DECIDED: Final[Mapping[str, Event]] = {
    reason: event for event, reason in _DECIDED.items() if reason not in FROM_GATE
}


class Process(msgspec.Struct, frozen=True):
    """A process whose end ends a sandbox.

    A pid is used again, but not with the same start time.
    """

    pid: int
    start: int  # clock ticks since boot, from /proc/PID/stat


class Cgroup(msgspec.Struct, frozen=True):
    """A cgroup whose last process's end ends a sandbox.

    A later cgroup of the same path has another inode.
    """

    path: str
    inode: int
