"""Watch a sandbox's end conditions: creator, process, cgroup and time limit.

The gate watches the others, pipes and connections. A sandbox without any other end condition follows the creator: the sandbox
stops listening when the connection that created it leaves the bus, unless KeepAfterCreator was given. Process,
cgroup and time limit are watched whether or not the sandbox listens.
"""

import heapq
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Protocol

import trio

from broker.supervisor.sandboxes.lifecycle import Event
from broker.supervisor.sandboxes.registry import Record, SandboxId
from broker.supervisor.watches.cgroups import Cgroups
from broker.supervisor.watches.processes import Processes

# The longest delay of a time limit after the machine was suspended, because trio's clock stands still meanwhile.
LONGEST_SLEEP: Final = 60.0  # seconds
OnEvent = Callable[[SandboxId, Event], None]


class NameWatch(Protocol):
    """A watch over the names on a bus."""

    def __contains__(self, name: str) -> bool:
        """Return whether a name is watched and has an owner."""

    def add(self, name: str) -> None:
        """Watch a name."""

    def discard(self, name: str) -> None:
        """Undo an `add`."""


def boot_time() -> float:
    """Return the seconds since boot, including time in which the machine slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def follows_creator(record: Record) -> bool:
    """Return whether a sandbox stops listening when the creator leaves."""
    ends_otherwise = record.close_notify or record.process or record.cgroup
    return not ends_otherwise and not record.keep_after_creator


class SandboxWatches:
    """A watch over all sandboxes. Any call may call `on_event` before it returns."""

    def __init__(
        self,
        watches: Mapping[str, NameWatch],
        on_event: OnEvent,
        *,
        processes: Processes,
        cgroups: Cgroups,
        now: Callable[[], float] = boot_time,
    ) -> None:
        self.processes: Final = processes
        self.cgroups: Final = cgroups
        self._watches: Final = watches
        self._on_event: Final = on_event
        self._creators: Final = CreatorWatch()
        self._limits: Final = TimeLimits(now)
        self._now: Final = now

    def begin(self, record: Record, *, again: bool = False) -> None:
        """Watch the end conditions of a sandbox.

        `again` marks a sandbox of an earlier supervisor.
        """
        id_ = record.id
        if again:  # an earlier record of the sandbox may be watched already
            self.end(record)
        if self._creators.add(record):
            watch = self._watches.get(record.creator_bus)
            if watch is not None and (again or record.creator in watch):
                watch.add(record.creator)
            else:  # the creator left during AddServer, or the bus is no longer configured: no event will come
                self._creators.remove(record)
                self._on_event(id_, Event.CREATOR_LEFT)
        if record.expires:
            self._limits.add(id_, record.expires)
        if record.process is not None:
            self.processes.watch(
                id_, record.process, lambda: self._on_event(id_, Event.PROCESS_ENDED)
            )
        if record.cgroup is not None:
            self.cgroups.watch(id_, record.cgroup, lambda: self._on_event(id_, Event.CGROUP_EMPTY))

    def end(self, record: Record) -> None:
        """Stop watching a sandbox. Harmless for an unwatched sandbox."""
        if self._creators.remove(record):
            self._watches[record.creator_bus].discard(record.creator)
        self._limits.discard(record.id)
        if record.process is not None:
            self.processes.forget(record.id, record.process)
        if record.cgroup is not None:
            self.cgroups.forget(record.id, record.cgroup)

    def time_left(self, record: Record) -> int:
        """Return the seconds until a sandbox's time limit; 0 without any left."""
        return max(0, math.ceil(record.expires - self._now())) if record.expires else 0

    def describe(self) -> dict[str, str]:
        """Return how many processes and cgroups are watched, and by which method."""
        processes, cgroups = self.processes, self.cgroups
        return {
            "processes": f"{len(processes)} by {processes.method}",
            "cgroups": f"{len(cgroups)} by {cgroups.method}",
        }

    def name_gone(self, bus: str, unique_name: str) -> None:
        """Take note that a connection left the bus."""
        for id_ in self._creators.left(bus, unique_name):
            self._on_event(id_, Event.CREATOR_LEFT)

    def bus_back(self, bus: str, *, is_same: bool) -> None:
        """Watch all creators again on a reconnected bus; on another bus, all have left."""
        for its_bus, creator in self._creators:
            if its_bus == bus and is_same:
                for _ in range(self._creators.count(bus, creator)):
                    self._watches[bus].add(creator)
            elif its_bus == bus:
                self.name_gone(bus, creator)

    async def run(self) -> None:
        """Watch until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.processes.run)
            nursery.start_soon(self.cgroups.run)
            while True:
                for id_ in await self._limits.wait():
                    self._on_event(id_, Event.TIME_OVER)


class TimeLimits:
    """The time limits of sandboxes, soonest first."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now: Final = now
        self._at: Final[dict[SandboxId, float]] = {}
        # A heap, which also contains some discarded entries.
        self._next: Final[list[tuple[float, SandboxId]]] = []
        self._changed = trio.Event()

    def __len__(self) -> int:
        return len(self._at)

    def add(self, id_: SandboxId, at: float) -> None:
        """Add the time at which a sandbox ends."""
        self._at[id_] = at
        heapq.heappush(self._next, (at, id_))
        self._changed.set()

    def discard(self, id_: SandboxId) -> None:
        """Remove the time limit of a sandbox. Harmless without a limit."""
        if self._at.pop(id_, None) is not None and len(self._next) > 2 * len(self._at) + 8:
            # A heap drops entries only from the top, so discarded entries with long limits would pile up.
            self._next[:] = [entry for entry in self._next if entry[1] in self._at]
            heapq.heapify(self._next)

    async def wait(self) -> list[SandboxId]:
        """Wait until time limits are over, and return the sandboxes, each once."""
        while not (over := list(self._take())):
            self._changed = trio.Event()
            left = self._next[0][0] - self._now() if self._next else LONGEST_SLEEP
            with trio.move_on_after(min(max(left, 0.0), LONGEST_SLEEP)) as scope:
                if not self._next:
                    scope.deadline = float("inf")
                await self._changed.wait()
        return over

    def _take(self) -> Iterator[SandboxId]:
        now = self._now()
        while self._next and (self._next[0][0] <= now or self._next[0][1] not in self._at):
            at, id_ = heapq.heappop(self._next)
            if at <= now and self._at.pop(id_, None) is not None:
                yield id_


class CreatorWatch:
    """The sandboxes that follow creators: (bus, unique name) -> ids."""

    def __init__(self) -> None:
        self._followers: Final[dict[tuple[str, str], dict[SandboxId, None]]] = {}

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(list(self._followers))

    def add(self, record: Record) -> bool:
        """Add a sandbox that follows the creator; return False for others."""
        if not follows_creator(record):
            return False
        self._followers.setdefault((record.creator_bus, record.creator), {})[record.id] = None
        return True

    def remove(self, record: Record) -> bool:
        """Remove a sandbox, and return whether there was one."""
        key = (record.creator_bus, record.creator)
        followers = self._followers.get(key, {})
        if record.id not in followers:
            return False
        del followers[record.id]
        if not followers:
            del self._followers[key]
        return True

    def count(self, bus: str, unique_name: str) -> int:
        """Return the number of sandboxes that follow a connection."""
        return len(self._followers.get((bus, unique_name), ()))

    def left(self, bus: str, unique_name: str) -> tuple[SandboxId, ...]:
        """Remove and return the sandboxes that followed a connection."""
        return tuple(self._followers.pop((bus, unique_name), ()))
