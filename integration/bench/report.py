"""The table: for people, and in Markdown for docs/performance.md."""

from collections.abc import Mapping
from typing import Final

from rich.console import Console
from rich.table import Table

from integration.bench.goals import describe
from integration.bench.measure import Result, Series, digits_of, format_figure

HEADINGS: Final = ("row", "unit", "gate", "peer", "bus", "gate/peer", "gate/bus", "goal")


def print_table(results: Mapping[str, Result]) -> None:
    """Print medians, spreads and ratios."""
    table = Table(title="median ± median absolute deviation of the blocks")
    for heading in HEADINGS:
        justify = "left" if heading in {"row", "goal"} else "right"
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name, result in results.items():
        table.add_row(*make_cells(name, result))
    # A pipe has no width of its own; a table cut at 80 columns would be of no use.
    Console(width=None if Console().is_terminal else 140).print(table)


def make_markdown(results: Mapping[str, Result]) -> str:
    """Return the same table in Markdown."""
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for name, result in results.items():
        first, *others = make_cells(name, result)
        lines.append((f"`{first}`", *others))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def make_cells(name: str, result: Result) -> tuple[str, ...]:
    """Return a line of the table, as text."""
    return (
        name,
        result.unit.replace("us", "µs"),
        _text(result.gate),
        _text(result.peer),
        _text(result.bus),
        _text(result.ratio_peer),
        _text(result.ratio_bus),
        describe(name, result),
    )


def _text(series: Series | None) -> str:
    if series is None:
        return "-"
    if len(series.values) == 1:
        return format_figure(series.median)
    return f"{format_figure(series.median)} ± {series.spread:.{digits_of(series.median)}f}"
