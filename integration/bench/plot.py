"""The figures drawn: a bar for each of gate, peer and bus in each row, an SVG file for each group of rows.

Rows of a group have one scale, and are in one unit. The line at the end of a bar is the spread.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from integration.bench.fairness import NAMES as FAIR
from integration.bench.measure import Result, Series, format_figure

# A file's name -> its heading, and the rows that are comparable with one another.
GROUPS: Final[Mapping[str, tuple[str, Sequence[str]]]] = {
    "roundtrip": (
        "One call at a time",
        ("roundtrip", "rules-10", "rules-1000", "rules-10000", "changes-under-load"),
    ),
    "pipelined": ("Calls in batches, small", ("pipelined-0", "pipelined-1k")),
    "pipelined-large": ("Calls in batches, large", ("pipelined-64k", "pipelined-1m")),
    "processor": (
        "Processor time of who is in between, a call",
        ("cpu-roundtrip", "cpu-pipelined", "cpu-callers-1", "cpu-callers-10", "cpu-callers-100"),
    ),
    "callers": ("So many sandboxes call at once", ("callers-1", "callers-10", "callers-100")),
    "signals": ("A signal to so many sandboxes", ("signals-1", "signals-10", "signals-100")),
    "fairness": ("A call of others during a flood (gate), and without (peer)", FAIR),
    "sandboxes": ("A sandbox more", ("add-sandbox", "add-1000")),
    "startup": ("From start to ready", ("startup", "startup-supervisor")),
    "memory": ("Memory of so many sandboxes", ("pss-1", "pss-100", "pss-1000")),
}
COLOURS: Final = {"gate": "#2b6cb0", "peer": "#c05621", "bus": "#718096"}
# Pixels.
WIDTH: Final = 760
LEFT: Final = 170  # where the bars begin
RIGHT: Final = 130  # room for the figures behind them
TOP: Final = 60
BAR: Final = 16
GAP: Final = 12  # between rows
SHORTEST: Final = 1e-9  # what fills the width; nothing that is measured is less


def write_plots(results: Mapping[str, Result], folder: Path) -> list[Path]:
    """Draw each group of which there is a row; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for stem, (heading, names) in GROUPS.items():
        rows = {name: results[name] for name in names if name in results}
        if rows:
            path = folder / f"{stem}.svg"
            path.write_text(draw(heading, rows), encoding="utf-8")
            written.append(path)
    return written


def draw(heading: str, rows: Mapping[str, Result]) -> str:
    """Return the picture."""
    longest = max(
        series.median + series.spread for result in rows.values() for _, series in _bars(result)
    )
    scale = (WIDTH - LEFT - RIGHT) / max(longest, SHORTEST)
    (unit, *_) = {result.unit.replace("us", "µs") for result in rows.values()}
    parts = [*_text(16, 24, f"{heading} ({unit})", "title"), *_draw_legend()]
    at = TOP
    for name, result in rows.items():
        bars = list(_bars(result))
        parts += _text(LEFT - 10, at + len(bars) * BAR / 2 + 5, name, "row")
        for kind, series in bars:
            parts += _draw_bar(at, kind, series, scale)
            at += BAR
        at += GAP
    return _wrap(parts, at)


def _bars(result: Result) -> Iterator[tuple[str, Series]]:
    for kind, series in (("gate", result.gate), ("peer", result.peer), ("bus", result.bus)):
        if series is not None:
            yield kind, series


def _draw_bar(at: float, kind: str, series: Series, scale: float) -> Iterator[str]:
    length, spread = series.median * scale, series.spread * scale
    yield _rectangle(LEFT, at, length, BAR - 3, COLOURS[kind])
    yield _rectangle(LEFT + length - spread, at + BAR / 2 - 2, 2 * spread, 1, "#000")
    yield from _text(
        LEFT + length + spread + 6, at + BAR - 5, format_figure(series.median), "figure"
    )


def _draw_legend() -> Iterator[str]:
    for number, (kind, colour) in enumerate(COLOURS.items()):
        left = LEFT + number * 80
        yield _rectangle(left, 36, 12, 12, colour)
        yield from _text(left + 18, 46, kind, "figure")


def _rectangle(x: float, y: float, width: float, height: float, fill: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>'
    )


def _text(x: float, y: float, text: str, kind: str) -> Iterator[str]:
    yield f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def _wrap(parts: Sequence[str], height: float) -> str:
    style = (
        "text{font-family:sans-serif;font-size:12px}.title{font-size:15px;font-weight:bold}"
        ".row{text-anchor:end}"
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}">\n'
        f'<style>{style}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"
