"""What the measurements are to come out at, and whether they do. A missed goal is told, and is no error."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from integration.bench.flooder import FLOODS
from integration.bench.measure import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """The most that a row may come out at; None: no goal."""

    peer: float | None = None  # gate / peer
    bus: float | None = None  # gate / bus
    gate: float | None = None  # the figure itself

    def is_met(self, result: Result) -> bool:
        """Say whether the medians are within it."""
        found = (
            (self.peer, result.ratio_peer),
            (self.bus, result.ratio_bus),
            (self.gate, result.gate),
        )
        return all(
            most is None or (series is not None and series.median <= most) for most, series in found
        )

    def __str__(self) -> str:
        parts = ((self.peer, "{:.2f}"), (self.bus, "{:.2f} of bus"), (self.gate, "gate {:g}"))
        return ", ".join(f"≤ {form.format(most)}" for most, form in parts if most is not None)


GOALS: Final[Mapping[str, Goal]] = {
    "roundtrip": Goal(peer=0.95),
    "cpu-roundtrip": Goal(peer=0.85),
    "pipelined-0": Goal(peer=0.85, bus=1.15),
    "cpu-pipelined": Goal(peer=0.60),
    "pipelined-64k": Goal(peer=1.0),
    "callers-100": Goal(peer=0.85),
    # The peer is the gate itself, with less to do: that cost does not grow with this.
    "callers-growth": Goal(peer=1.0),
    "rules-growth": Goal(peer=1.03),
    "roundtrip-1000-rules": Goal(peer=1.05),
    # A call during a flood; the peer is the same call without it.
    **{f"fair-{kind}": Goal(peer=3.0) for kind in FLOODS},
    **{f"fair-host-{kind}": Goal(peer=2.0) for kind in FLOODS},
    "pss-100": Goal(peer=1.0),
    "pss-1000": Goal(peer=0.2),
    # What a thousand sandboxes cost, which no sandbox is to cost alone.
    "upgrade-pause-hostile": Goal(gate=150),
    "compile-1000": Goal(gate=2000),
    "connect-one": Goal(gate=3),
    "judge-300-globs": Goal(gate=60),
}


def describe(name: str, result: Result) -> str:
    """Return the goal of a row and whether it is met; nothing if there is none."""
    goal = GOALS.get(name)
    if goal is None:
        return ""
    return f"{goal} {'met' if goal.is_met(result) else 'MISSED'}"
