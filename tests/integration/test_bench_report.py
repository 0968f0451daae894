"""What `make bench` prints and writes: medians, ratios, goals, the table, the rows."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, strategies as st

from integration.bench.client import BenchError
from integration.bench.containers1 import measure_labelled_adding
from integration.bench.goals import GOALS, Goal, describe
from integration.bench.measure import QUICK, Result, Row, Series, format_figure, make_result
from integration.bench.parties import Scene
from integration.bench.report import HEADINGS, make_cells, make_markdown, print_table

RESULT = make_result("us", 1e6, [[2e-6, 4e-6, 3e-6], [4e-6, 4e-6, 6e-6], [1e-6, 1e-6, 2e-6]])
ALONE = make_result("KiB", 1, [[1234.5]])


def test_ratio_is_of_blocks_of_the_same_turn() -> None:
    ratio = RESULT.ratio_peer
    assert ratio is not None
    assert ratio.values == pytest.approx([0.5, 1.0, 0.5])
    assert (ratio.median, ratio.spread) == pytest.approx((0.5, 0.0))


def test_row_has_the_fields_that_others_read() -> None:
    row = RESULT.make_row("roundtrip")
    assert msgspec.to_builtins(row) == {
        "name": "roundtrip",
        "gate": 3.0,
        "peer": 4.0,
        "bus": 1.0,
        "unit": "us",
        "ratio_peer": 0.5,
        "ratio_bus": 2.0,
    }
    assert ALONE.make_row("x") == Row(
        name="x", gate=1234.5, peer=None, bus=None, unit="KiB", ratio_peer=None, ratio_bus=None
    )


@pytest.mark.parametrize(
    ("value", "text"), [(0.1234, "0.12"), (5.126, "5.13"), (41.26, "41.3"), (6759.2, "6759")]
)
def test_figures_have_the_digits_that_count(value: float, text: str) -> None:
    assert format_figure(value) == text


@pytest.mark.parametrize(
    ("goal", "is_met"),
    [
        (Goal(peer=0.5), True),
        (Goal(peer=0.49), False),
        (Goal(peer=0.5, bus=1.9), False),
        (Goal(gate=3.0), True),
        (Goal(gate=2.9), False),
        (Goal(), True),
    ],
)
def test_goal_is_met_by_medians(goal: Goal, is_met: bool) -> None:
    assert goal.is_met(RESULT) is is_met


def test_goal_in_terms_of_nothing_is_missed() -> None:
    assert not Goal(peer=1.0).is_met(ALONE)


def test_goal_is_told_with_its_outcome() -> None:
    assert describe("roundtrip", RESULT) == f"≤ {GOALS['roundtrip'].peer:.2f} met"
    assert describe("pss-100", ALONE).endswith("MISSED")
    assert describe("pipelined-1k", RESULT) == ""


def test_every_goal_is_of_a_row_there_is() -> None:
    from integration.bench.__main__ import NAMES  # noqa: PLC0415 - starts nothing, but imports much

    assert not GOALS.keys() - set(NAMES)
    assert len(set(NAMES)) == len(NAMES)


def test_a_bus_that_is_not_built_is_a_row_that_could_not_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("integration.bench.containers1.CONTAINERS1_DAEMON", tmp_path / "none")
    scene = Scene(folder=tmp_path, bus=tmp_path / "bus")
    with pytest.raises(BenchError, match="dbus-daemon with Containers1"):
        measure_labelled_adding(scene, QUICK)


def test_markdown_has_a_line_a_row() -> None:
    lines = make_markdown({"roundtrip": RESULT, "x": ALONE}).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {len(HEADINGS) + 1}
    assert lines[2].startswith("| `roundtrip` | µs | 3.00 ± 1.00 | 4.00 ± 0.00 | 1.00 ± 0.00 |")
    assert lines[3].startswith("| `x` | KiB | 1234 | - | - | - | - |")


def test_table_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    print_table({"roundtrip": RESULT, "x": ALONE})
    out = capsys.readouterr().out
    for cell in (*make_cells("roundtrip", RESULT), *make_cells("x", ALONE)):
        assert cell in out


@given(st.lists(st.floats(1e-6, 1e6), min_size=1), st.floats(1e-3, 1e3))
def test_scaling_changes_no_ratio(values: list[float], scale: float) -> None:
    result: Result = make_result("us", scale, [values, values])
    ratio = result.ratio_peer
    assert ratio is not None
    assert ratio.median == pytest.approx(1.0)
    assert result.gate.median == pytest.approx(Series(values).median * scale)
