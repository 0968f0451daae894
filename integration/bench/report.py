"""The table for people."""

from collections.abc import Mapping
from typing import Final

from rich.console import Console
from rich.table import Table

from integration.bench.measure import Result, Series

# In gate / peer.
GOALS: Final[Mapping[str, float]] = {
    "roundtrip": 1.05,
    "pipelined-0": 1.0,
    "cpu-roundtrip": 1.05,
    "cpu-pipelined": 0.90,
    "roundtrip-1000-rules": 1.05,
    "pss-100": 1.25,
}


def print_table(results: Mapping[str, Result]) -> None:
    """Print medians, spreads and ratios."""
    table = Table(title="median ± median absolute deviation of the blocks")
    table.add_column("row", no_wrap=True)
    for heading in ("unit", "gate", "peer", "bus", "gate/peer", "goal", "gate/bus"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        goal = GOALS.get(name)
        table.add_row(
            name,
            result.unit,
            _text(result.gate),
            _text(result.peer),
            _text(result.bus),
            _text(result.ratio_peer),
            "" if goal is None else f"<= {goal:.2f}",
            _text(result.ratio_bus),
        )
    # A pipe has no width of its own; a table cut at 80 columns would be of no use.
    Console(width=None if Console().is_terminal else 120).print(table)


def _text(series: Series | None) -> str:
    if series is None:
        return "-"
    digits = max(0, 3 - len(str(int(series.median))))  # three that count
    if len(series.values) == 1:
        return f"{series.median:.{digits}f}"
    return f"{series.median:.{digits}f} ± {series.spread:.{digits}f}"
