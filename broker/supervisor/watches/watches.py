"""What ends sandboxes, but for pipes and connections, which are the gate's to watch: creators, processes, cgroups, time.

A sandbox that has nothing to end with follows its creator: it stops listening when the connection that created it
leaves its bus, unless it was told to outlive it. The rest is watched whether or not it listens.
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

# trio's clock stands still while the machine sleeps, and ours does not: a time limit is over at most so late.
LONGEST_SLEEP: Final = 60.0  # seconds
Happen = Callable[[SandboxId, Event], None]


class Watch(Protocol):
    """What is needed of a watch over one bus's names."""

    def __contains__(self, name: str) -> bool:
        """Say whether it is watched, and there."""

    def add(self, name: str) -> None:
        """Watch a name."""

    def discard(self, name: str) -> None:
        """Undo one `add`."""


def boot_time() -> float:
    """Return the seconds since boot, those in which the machine slept included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def follows_creator(record: Record) -> bool:
    """Say whether it stops listening when its creator leaves."""
    ends_otherwise = record.close_notify or record.process or record.cgroup
    return not ends_otherwise and not record.keep_after_creator


class SandboxWatches:
    """The watch over all sandboxes. `happen` is told what happened, and may be so within each call."""

    def __init__(
        self,
        watches: Mapping[str, Watch],
        happen: Happen,
        *,
        processes: Processes,
        cgroups: Cgroups,
        now: Callable[[], float] = boot_time,
    ) -> None:
        self.processes: Final = processes
        self.cgroups: Final = cgroups
        self._watches: Final = watches
        self._happen: Final = happen
        self._creators: Final = CreatorWatch()
        self._limits: Final = TimeLimits(now)
        self._now: Final = now

    def begin(self, record: Record, *, again: bool = False) -> None:
        """Watch what this sandbox ends with. `again`: it is an earlier supervisor's."""
        id_ = record.id
        if again:  # it may be watched already, by another record of it
            self.end(record)
        if self._creators.add(record):
            watch = self._watches.get(record.creator_bus)
            if watch is not None and (again or record.creator in watch):
                watch.add(record.creator)
            else:  # it left while its sandbox was made, or its bus is configured no more: nobody will tell us
                self._creators.remove(record)
                self._happen(id_, Event.CREATOR_LEFT)
        if record.expires:
            self._limits.add(id_, record.expires)
        if record.process is not None:
            self.processes.watch(
                id_, record.process, lambda: self._happen(id_, Event.PROCESS_ENDED)
            )
        if record.cgroup is not None:
            self.cgroups.watch(id_, record.cgroup, lambda: self._happen(id_, Event.CGROUP_EMPTY))

    def end(self, record: Record) -> None:
        """Watch for it no more. Fine if it was not watched."""
        if self._creators.remove(record):
            self._watches[record.creator_bus].discard(record.creator)
        self._limits.discard(record.id)
        if record.process is not None:
            self.processes.forget(record.id, record.process)
        if record.cgroup is not None:
            self.cgroups.forget(record.id, record.cgroup)

    def time_left(self, record: Record) -> int:
        """Return the seconds until its time limit; 0 if it has none, or that is over."""
        return max(0, math.ceil(record.expires - self._now())) if record.expires else 0

    def describe(self) -> dict[str, str]:
        """Return how many are watched, and how."""
        processes, cgroups = self.processes, self.cgroups
        return {
            "processes": f"{len(processes)} by {processes.way}",
            "cgroups": f"{len(cgroups)} by {cgroups.way}",
        }

    def name_gone(self, bus: str, unique_name: str) -> None:
        """A connection left its bus."""
        for id_ in self._creators.left(bus, unique_name):
            self._happen(id_, Event.CREATOR_LEFT)

    def bus_back(self, bus: str, *, is_same: bool) -> None:
        """There is a new connection to a bus, with a watch over nobody; or all have left it."""
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
                    self._happen(id_, Event.TIME_OVER)


class TimeLimits:
    """When which sandbox's time is over."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now: Final = now
        self._at: Final[dict[SandboxId, float]] = {}
        self._next: Final[
            list[tuple[float, SandboxId]]
        ] = []  # a heap, with some that were discarded
        self._changed = trio.Event()

    def __len__(self) -> int:
        return len(self._at)

    def add(self, id_: SandboxId, at: float) -> None:
        """Its time is over then."""
        self._at[id_] = at
        heapq.heappush(self._next, (at, id_))
        self._changed.set()

    def discard(self, id_: SandboxId) -> None:
        """It has ended."""
        if self._at.pop(id_, None) is not None and len(self._next) > 2 * len(self._at) + 8:
            # A heap forgets only from its top: those of long limits would pile up.
            self._next[:] = [entry for entry in self._next if entry[1] in self._at]
            heapq.heapify(self._next)

    async def wait(self) -> list[SandboxId]:
        """Wait for the next that are over, and return them, once."""
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
    """The sandboxes that follow somebody: (bus, unique name) -> their ids."""

    def __init__(self) -> None:
        self._followers: Final[dict[tuple[str, str], dict[SandboxId, None]]] = {}

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(list(self._followers))

    def add(self, record: Record) -> bool:
        """Note a sandbox; say whether it follows its creator."""
        if not follows_creator(record):
            return False
        self._followers.setdefault((record.creator_bus, record.creator), {})[record.id] = None
        return True

    def remove(self, record: Record) -> bool:
        """Forget a sandbox; say whether it was noted."""
        key = (record.creator_bus, record.creator)
        followers = self._followers.get(key, {})
        if record.id not in followers:
            return False
        del followers[record.id]
        if not followers:
            del self._followers[key]
        return True

    def count(self, bus: str, unique_name: str) -> int:
        """Return how many follow this connection."""
        return len(self._followers.get((bus, unique_name), ()))

    def left(self, bus: str, unique_name: str) -> tuple[SandboxId, ...]:
        """Return, once, who followed this connection."""
        return tuple(self._followers.pop((bus, unique_name), ()))
