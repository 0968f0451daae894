import pytest

from broker.supervisor.sandboxes.lifecycle import (
    DECIDED,
    FROM_GATE,
    TRANSITIONS,
    Effect,
    Event,
    Phase,
)
from tests.helpers import lifetime_picture

KNOWN = (Phase.RUNNING, Phase.CLOSING, Phase.STOPPING)
ROWS = [
    pytest.param(*key, row, id=f"{key[0].name}-{key[1].name}") for key, row in TRANSITIONS.items()
]


def test_what_is_gone_stays_gone() -> None:
    assert not [event for phase, event in TRANSITIONS if phase is Phase.GONE]


@pytest.mark.parametrize(("phase", "event", "row"), ROWS)
def test_each_row_keeps_the_laws(phase: Phase, event: Event, row: object) -> None:
    row = TRANSITIONS[phase, event]
    # Told once: when it goes, and only of what its creator knows of.
    assert (Effect.TELL in row.effects) == (row.to is Phase.GONE and event is not Event.WITHDRAWN)
    assert (row.to is Phase.GONE) == bool({Effect.TELL, Effect.FORGET} & set(row.effects))
    # The first reason stays: nothing that is decided or over gets another.
    if phase in {Phase.STOPPING, Phase.ENDED}:
        assert row.reason is None
    # No way back.
    order = [Phase.STARTING, Phase.RUNNING, Phase.CLOSING, Phase.STOPPING, Phase.ENDED, Phase.GONE]
    assert order.index(row.to) >= order.index(phase)
    # What is decided is asked for.
    if row.to is Phase.STOPPING:
        assert Effect.STOP in row.effects
    if row.to is Phase.CLOSING:
        assert Effect.CLOSE in row.effects


@pytest.mark.parametrize("phase", KNOWN)
def test_whatever_the_gate_says_of_an_end_is_one(phase: Phase) -> None:
    for event in (*FROM_GATE.values(), Event.GATE_LOST):
        assert TRANSITIONS[phase, event].to is Phase.GONE


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.GONE])
def test_from_everywhere_there_is_a_way_out(phase: Phase) -> None:
    reached = {phase}
    for _ in Phase:
        reached |= {row.to for (before, _), row in TRANSITIONS.items() if before in reached}
    assert Phase.GONE in reached


def test_the_gates_reasons_are_ours() -> None:
    for reason, event in FROM_GATE.items():
        assert TRANSITIONS[Phase.RUNNING, event].reason == reason
    assert set(FROM_GATE) == {"close-notify", "last-connection", "stopped", "instance-removed"}


def test_what_the_gate_was_told_to_say_is_what_was_decided() -> None:
    assert set(DECIDED) == {"process-ended", "cgroup-empty", "time-limit", "bus-gone"}
    for reason, event in DECIDED.items():
        assert TRANSITIONS[Phase.RUNNING, event].reason == reason


def test_the_page_has_the_table_and_the_picture_of_today() -> None:
    page = lifetime_picture.PAGE.read_text(encoding="utf-8")
    assert page == lifetime_picture.make_page(page), (
        "run .venv/bin/python -m tests.helpers.lifetime_picture"
    )
    picture = lifetime_picture.PICTURE.read_text(encoding="utf-8")
    assert picture == lifetime_picture.make_svg(), (
        "run .venv/bin/python -m tests.helpers.lifetime_picture"
    )


def test_the_picture_has_an_arrow_for_each_way() -> None:
    ways = {(phase, row.to) for (phase, _), row in TRANSITIONS.items() if row.to is not phase}
    assert ways == set(lifetime_picture.ARROWS)


def test_the_page_names_each_reason() -> None:
    page = lifetime_picture.PAGE.read_text(encoding="utf-8")
    _, _, what_ends = page.partition("## What ends a sandbox\n")
    for row in TRANSITIONS.values():
        assert row.reason is None or f"`{row.reason}`" in what_ends
