"""The figures drawn: a file for each group, whose bars are as long as what they show."""

import re
from pathlib import Path
from xml.etree import ElementTree as ET

from hypothesis import given, strategies as st

from integration.bench.__main__ import NAMES
from integration.bench.measure import Result, Series
from integration.bench.plot import COLOURS, GROUPS, LEFT, RIGHT, WIDTH, draw, write_plots

SVG = "{http://www.w3.org/2000/svg}"


def make(gate: float, peer: float | None = None, bus: float | None = None) -> Result:
    one = [None if value is None else Series([value]) for value in (peer, bus)]
    return Result(unit="us", gate=Series([gate]), peer=one[0], bus=one[1])


def widths(text: str, kind: str) -> list[float]:
    """Return the lengths of the bars of a kind; the first is that of the legend."""
    root = ET.fromstring(text)
    return [
        float(each.attrib["width"])
        for each in root.iter(f"{SVG}rect")
        if each.attrib["fill"] == COLOURS[kind]
    ][1:]


def test_bars_are_to_scale_and_fit() -> None:
    text = draw("A <b> & c", {"one": make(50, 100, 25), "two": make(20)})
    room = WIDTH - LEFT - RIGHT
    assert widths(text, "gate") == [room / 2, room / 5]
    assert widths(text, "peer") == [room]
    assert widths(text, "bus") == [room / 4]
    labels = {each.text for each in ET.fromstring(text).iter(f"{SVG}text")}
    assert labels >= {"A <b> & c (µs)", "one", "two", "50.0", "100", "25.0", "20.0"}


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=5))
def test_any_figures_give_a_picture_whose_bars_stay_inside(values: list[float]) -> None:
    text = draw("x", {f"row{n}": make(value) for n, value in enumerate(values)})
    assert len(widths(text, "gate")) == len(values)
    assert max(widths(text, "gate")) <= WIDTH - LEFT - RIGHT + 0.1


def test_groups_that_were_not_measured_have_no_file(tmp_path: Path) -> None:
    written = write_plots({"roundtrip": make(1, 2, 3), "pss-1": make(1, 2)}, tmp_path / "new")
    assert {path.name for path in written} == {"roundtrip.svg", "memory.svg"}
    for path in written:
        assert re.match("<svg ", path.read_text())


def test_groups_are_of_rows_there_are() -> None:
    grouped = [name for _, names in GROUPS.values() for name in names]
    assert set(grouped) <= set(NAMES)
    assert len(set(grouped)) == len(grouped)
