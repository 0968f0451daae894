"""Draws the pictures of docs/ from their descriptions, docs/pictures/*.toml: `python -m tests.helpers.pictures`.

A description is of one of three kinds:

- `boxes`: boxes with text at given places, and arrows between them;
- `sequence`: actors side by side, and messages between them from top to bottom;
- `grid`: a table of marks, for example what survives which event.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

FOLDER: Final = Path(__file__).resolve().parents[2] / "docs" / "pictures"
LINE: Final = 16  # px from one line of text to the next
# Of a sequence: px from one actor to the next, from one step to the next, and of the heads.
ACTOR_WIDTH, STEP_HEIGHT, HEAD_HEIGHT = 190, 34, 56
# Of a grid: px of the first column, of the others, of a row and of the headings.
NAME_WIDTH, CELL_WIDTH, ROW_HEIGHT, HEADING_HEIGHT = 300, 120, 30, 56
MARKS: Final = {"yes": ("●", "#2a7"), "no": ("○", "#b33"), "part": ("◐", "#b80")}

# Of the copy below a text that lines may cross.
HALO: Final = ' stroke="white" stroke-width="4"'

Table = Mapping[str, Any]
Point = tuple[int, int]


def draw(description: Table) -> str:
    """Return the picture of a description as SVG. Raises KeyError for an unknown kind or a missing key."""
    kinds = {"boxes": _draw_boxes, "sequence": _draw_sequence, "grid": _draw_grid}
    width, height, parts = kinds[description["kind"]](description)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' font-family="sans-serif" font-size="13">\n<title>{escape(description["title"])}</title>\n'
        '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8"'
        ' orient="auto-start-reverse"><path d="M0 0L8 4L0 8z"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" fill="white"/>'
    )
    return "\n".join((head, *parts, "</svg>")) + "\n"


def _text(at: Point, text: str, *, anchor: str = "middle", style: str = "") -> str:
    x, y = at
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _haloed(at: Point, text: str, *, anchor: str = "middle") -> str:
    """Return a text that stays readable where a line crosses."""
    below = _text(at, text, anchor=anchor, style=HALO)
    return f"{below}\n{_text(at, text, anchor=anchor)}"


def _lines(at: Point, lines: Sequence[str], *, bold: bool = True) -> Iterator[str]:
    """Yield text around a point; the first line may be bold."""
    x, y = at
    top = y - (len(lines) - 1) * LINE // 2 + 5
    for number, line in enumerate(lines):
        style = ' font-weight="bold"' if bold and number == 0 else ' fill="#333"'
        yield _text((x, top + number * LINE), line, style=style)


def _box(at: Point, size: Point, fill: str) -> str:
    (x, y), (width, height) = at, size
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}"'
        ' stroke="#333"/>'
    )


def _arrow(points: Sequence[Point], *, both: bool = False, dashed: bool = False) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    start = ' marker-start="url(#a)"' if both else ""
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="#333"{dashes}{start} marker-end="url(#a)"/>'
    )


def _draw_boxes(description: Table) -> tuple[int, int, list[str]]:
    parts = []
    for box in description["box"]:
        (x, y), (width, height) = box["at"], box["size"]
        parts.append(_box((x, y), (width, height), box.get("fill", "#eef")))
        # A frame around other boxes has its title at its top.
        middle = y + 16 if box.get("frame", False) else y + height // 2
        parts += _lines((x + width // 2, middle), box["text"])
    for arrow in description["arrow"]:
        points = [(x, y) for x, y in arrow["points"]]
        both, dashed = arrow.get("both", False), arrow.get("dashed", False)
        parts.append(_arrow(points, both=both, dashed=dashed))
        if "text" in arrow:
            x, y = arrow["text_at"]
            for number, line in enumerate(arrow["text"]):
                parts.append(_haloed((x, y + number * LINE), line, anchor="start"))
    width, height = description["size"]
    return width, height, parts


def _draw_sequence(description: Table) -> tuple[int, int, list[str]]:
    actors = list(description["actors"])
    places = {actor: ACTOR_WIDTH // 2 + ACTOR_WIDTH * at for at, actor in enumerate(actors)}
    steps = description["step"]
    width = ACTOR_WIDTH * len(actors)
    height = HEAD_HEIGHT + STEP_HEIGHT * (len(steps) + 1)
    parts = []
    for actor, x in places.items():
        parts.append(
            f'<line x1="{x}" y1="{HEAD_HEIGHT}" x2="{x}" y2="{height - 12}" stroke="#aaa"/>'
        )
        parts.append(_box((x - 80, 10), (160, 38), "#eef"))
        parts += _lines((x, 29), actor.split("\n"))
    for number, step in enumerate(steps):
        y = HEAD_HEIGHT + STEP_HEIGHT * (number + 1)
        parts += _draw_step(step, places, y)
    return width, height, parts


def _draw_step(step: Table, places: Mapping[str, int], y: int) -> Iterator[str]:
    start = places[step["from"]]
    end = places[step.get("to", step["from"])]
    text = step["text"]
    if start == end:  # work within one actor
        is_last = start == max(places.values())  # there is no room to the right
        yield f'<circle cx="{start}" cy="{y - 4}" r="3.5" fill="#333"/>'
        yield _haloed(
            (start - 10 if is_last else start + 10, y), text, anchor="end" if is_last else "start"
        )
        return
    towards = 4 if end > start else -4
    yield _arrow([(start, y), (end - towards, y)], dashed=step.get("dashed", False))
    yield _haloed(((start + end) // 2, y - 5), text)


def _draw_grid(description: Table) -> tuple[int, int, list[str]]:
    columns, rows = description["columns"], description["row"]
    width = NAME_WIDTH + CELL_WIDTH * len(columns)
    height = HEADING_HEIGHT + ROW_HEIGHT * len(rows) + 10
    parts: list[str] = []
    for at, column in enumerate(columns):
        x = NAME_WIDTH + CELL_WIDTH * at + CELL_WIDTH // 2
        parts += _lines((x, HEADING_HEIGHT // 2), column.split("\n"), bold=False)
    for number, row in enumerate(rows):
        y = HEADING_HEIGHT + ROW_HEIGHT * number
        fill = "#f6f6fb" if number % 2 == 0 else "white"
        parts.append(f'<rect x="0" y="{y}" width="{width}" height="{ROW_HEIGHT}" fill="{fill}"/>')
        parts.append(_text((12, y + 20), row["name"], anchor="start"))
        for at, mark in enumerate(row["marks"]):
            sign, colour = MARKS[mark]
            x = NAME_WIDTH + CELL_WIDTH * at + CELL_WIDTH // 2
            parts.append(_text((x, y + 20), sign, style=f' fill="{colour}" font-weight="bold"'))
    return width, height, parts


def pictures() -> Iterator[tuple[Path, str]]:
    """Yield the path of each picture, and the picture as its description has it."""
    for path in sorted(FOLDER.glob("*.toml")):
        yield path.with_suffix(".svg"), draw(tomllib.loads(path.read_text(encoding="utf-8")))


def main() -> None:
    """Draw all pictures."""
    for path, picture in pictures():
        path.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
