"""Writes the table and the picture of docs/lifetime.md from broker.supervisor.sandboxes.lifecycle: `python -m tests.helpers.lifetime_picture`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from broker.supervisor.sandboxes.lifecycle import TRANSITIONS, Effect, Event, Phase, Transition
from tests.helpers.pictures import draw

DOCS: Final = Path(__file__).resolve().parents[2] / "docs"
PAGE: Final = DOCS / "lifetime.md"
PICTURE: Final = DOCS / "lifetime-states.svg"
BEGIN: Final = "<!-- made by python -m tests.helpers.lifetime_picture -->\n"
END: Final = "<!-- end of what is made -->\n"

WIDTH, HEIGHT = 1180, 470
BOX_WIDTH, BOX_HEIGHT = 116, 36
# The middle of each box, and the corners of each arrow but for its ends; where its text begins.
BOXES: Final = {
    Phase.STARTING: (80, 150),
    Phase.RUNNING: (420, 150),
    Phase.ENDED: (80, 330),
    Phase.CLOSING: (420, 330),
    Phase.STOPPING: (790, 240),
    Phase.GONE: (1090, 240),
}
Point = tuple[int, int]
ARROWS: Final[dict[tuple[Phase, Phase], tuple[Sequence[Point], Point]]] = {
    (Phase.STARTING, Phase.RUNNING): (((138, 150), (362, 150)), (150, 142)),
    (Phase.STARTING, Phase.ENDED): (((80, 168), (80, 312)), (90, 200)),
    (Phase.STARTING, Phase.GONE): (((80, 132), (80, 30), (1120, 30), (1120, 222)), (90, 22)),
    (Phase.ENDED, Phase.GONE): (((80, 348), (80, 440), (1120, 440), (1120, 258)), (90, 412)),
    (Phase.RUNNING, Phase.CLOSING): (((420, 168), (420, 312)), (236, 276)),
    (Phase.RUNNING, Phase.GONE): (((420, 132), (420, 60), (1070, 60), (1070, 222)), (500, 78)),
    (Phase.RUNNING, Phase.STOPPING): (((478, 150), (740, 150), (740, 222)), (490, 166)),
    (Phase.CLOSING, Phase.STOPPING): (((478, 330), (740, 330), (740, 258)), (490, 256)),
    (Phase.CLOSING, Phase.GONE): (((420, 348), (420, 400), (1070, 400), (1070, 258)), (842, 318)),
    (Phase.STOPPING, Phase.GONE): (((848, 240), (1032, 240)), (852, 160)),
}


def make_table() -> str:
    """Return the table in Markdown: a line an event, a column a phase."""
    phases = [phase for phase in Phase if phase is not Phase.GONE]
    lines = [("event", *(phase.name for phase in phases)), ("---",) * (len(phases) + 1)]
    lines += [
        (event.value, *(_cell(TRANSITIONS.get((phase, event)), phase) for phase in phases))
        for event in Event
    ]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    legend = "".join(f"- {_letter(effect)}: {effect.value}\n" for effect in Effect)
    return f"{table}\n{legend}"


def make_svg() -> str:
    """Return the picture."""
    boxes = [
        {
            "at": (x - BOX_WIDTH // 2, y - BOX_HEIGHT // 2),
            "size": (BOX_WIDTH, BOX_HEIGHT),
            "text": [phase.name],
        }
        for phase, (x, y) in BOXES.items()
    ]
    arrows = [
        {"points": points, "text": _events(before, after), "text_at": label}
        for (before, after), (points, label) in ARROWS.items()
    ]
    return draw(
        {
            "kind": "boxes",
            "title": "The states of a sandbox",
            "size": (WIDTH, HEIGHT),
            "box": boxes,
            "arrow": arrows,
        }
    )


def make_page(page: str) -> str:
    """Return the page with the table of today."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{make_table()}{END}{after}"


def _cell(row: Transition | None, phase: Phase) -> str:
    if row is None:
        return ""
    to = "" if row.to is phase else f"{row.to.name} "
    reason = f"`{row.reason}` " if row.reason else ""
    return f"{to}{reason}{''.join(_letter(effect) for effect in row.effects)}".strip()


def _letter(effect: Effect) -> str:
    return effect.name[0]


def _events(before: Phase, after: Phase) -> list[str]:
    return [
        event.value
        for (phase, event), row in TRANSITIONS.items()
        if phase is before and row.to is after
    ]


def main() -> None:
    PICTURE.write_text(make_svg(), encoding="utf-8")
    PAGE.write_text(make_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
