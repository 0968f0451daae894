"""Interleaved blocks of work, and what is said of them: medians and how far they spread."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the result. None: there is no such thing."""

    name: str
    gate: float
    peer: float | None
    bus: float | None
    unit: str
    ratio_peer: float | None
    ratio_bus: float | None


@dataclass(frozen=True, slots=True)
class Series:
    """The figures of one column: one a block."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Return the median absolute deviation."""
        middle = self.median
        return statistics.median(abs(value - middle) for value in self.values)

    def over(self, other: "Series | None") -> "Series | None":
        """Return the ratio of each block to the other's block of the same turn.

        A slow spell that lasts for some turns falls out of these, but not out of the ratio of the medians:
        of a program to itself, with a busy machine, they were up to 3 % and 7 % off.
        """
        if other is None:
            return None
        pairs = zip(self.values, other.values, strict=True)
        return Series([mine / theirs for mine, theirs in pairs])


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A row before rounding, with its spreads."""

    unit: str
    gate: Series
    peer: Series | None = None
    bus: Series | None = None

    @property
    def ratio_peer(self) -> Series | None:
        return self.gate.over(self.peer)

    @property
    def ratio_bus(self) -> Series | None:
        return self.gate.over(self.bus)

    def make_row(self, name: str) -> Row:
        """Return the row."""
        return Row(
            name=name,
            gate=round(self.gate.median, 3),
            peer=_median(self.peer),
            bus=_median(self.bus),
            unit=self.unit,
            ratio_peer=_median(self.ratio_peer),
            ratio_bus=_median(self.ratio_bus),
        )


@dataclass(slots=True, kw_only=True)
class Column:
    """Somebody to measure."""

    run: Callable[[int], float]  # does it that many times, returns the seconds
    check: Callable[[], object] = lambda: None  # raises if what was measured did not work
    pids: Sequence[int] = ()  # whose processor time counts; none: no mediator
    step: int = 1  # a block is a multiple of so many
    count: int = 0  # times a block; 0: as many as fill it
    wall: list[float] = field(default_factory=list)  # seconds each time, one figure a block
    cpu: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure."""

    blocks: int = 41  # a column
    seconds: float = 0.1  # a block


QUICK: Final = Effort(blocks=5, seconds=0.05)


def interleave(columns: Sequence[Column], effort: Effort) -> None:
    """Measure the columns in turns, a block each, so that a slow spell of the machine hits all."""
    for column in columns:
        _warm_up(column, effort.seconds)
    gc.collect()
    gc.disable()
    try:
        for number in range(effort.blocks):
            first = number % len(columns)  # nobody always comes after the same other
            for column in (*columns[first:], *columns[:first]):
                _run_block(column)
    finally:
        gc.enable()


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the user and system time of processes so far, in nanosecond steps."""
    # The kernel's number for the processor clock of a process (CPUCLOCK_SCHED). What /proc says
    # counts in ticks of 10 ms.
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def _warm_up(column: Column, seconds: float) -> None:
    if column.count:
        column.run(1)
        return
    column.run(column.step)
    calls = column.step * 8
    while (taken := column.run(calls)) < seconds / 4:
        calls *= 2
    column.count = max(1, round(calls * seconds / taken / column.step)) * column.step


def _run_block(column: Column) -> None:
    before = cpu_seconds(column.pids)
    taken = column.run(column.count)
    used = cpu_seconds(column.pids) - before
    column.check()
    column.wall.append(taken / column.count)
    column.cpu.append(used / column.count)


def format_figure(value: float) -> str:
    """Return a figure with the three digits that count."""
    return f"{value:.{digits_of(value)}f}"


def digits_of(value: float) -> int:
    """Return how many digits behind the point count."""
    return max(0, 3 - len(str(int(value))))


def make_result(unit: str, scale: float, columns: Sequence[Sequence[float] | None]) -> Result:
    """Return a row from the figures of its columns: gate, peer and bus, as far as there are any."""
    gate, peer, bus = (
        None if values is None else Series([value * scale for value in values])
        for values in (*columns, None, None)[:3]
    )
    assert gate is not None
    return Result(unit=unit, gate=gate, peer=peer, bus=bus)


def _median(series: Series | None) -> float | None:
    return None if series is None else round(series.median, 3)
