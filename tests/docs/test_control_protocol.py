"""docs/control-protocol.md has the messages of the control socket and of a hand-over, with their fields."""

import re
from pathlib import Path
from types import UnionType
from typing import Final, get_args

import msgspec
import pytest

from broker.control_protocol import messages
from broker.gate import dumps
from broker.gate.handover import channel

PAGE: Final = Path(__file__).parents[2] / "docs" / "control-protocol.md"
TEXT: Final = PAGE.read_text(encoding="utf-8")


def section(title: str) -> str:
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def shown(title: str, column: int) -> dict[str, str]:
    """Return the messages in a column of a table: their fields by their names."""
    rows = [line.split(" | ") for line in section(title).splitlines() if line.startswith("| ")]
    return dict(re.findall(r"`(\w+)\(([^)]*)\)`", "\n".join(row[column] for row in rows)))


def by_name(union: UnionType) -> dict[str, type[msgspec.Struct]]:
    return {one.__name__: one for one in get_args(union)}


def check_fields(text: str, message: type[msgspec.Struct]) -> None:
    named = [one.removesuffix(" or nil") for one in text.split(", ") if one]
    if named[-1:] == ["..."]:  # the page leaves the others out
        assert set(named[:-1]) < set(message.__struct_fields__)
    else:
        assert named == list(message.__struct_fields__)


@pytest.mark.parametrize(
    ("title", "union"), [("Requests", messages.Request), ("Events", messages.Event)]
)
def test_requests_and_events_are_those_of_the_code(title: str, union: UnionType) -> None:
    on_page, types = shown(title, 0), by_name(union)
    assert set(on_page) == set(types)
    for name, fields in on_page.items():
        check_fields(fields, types[name])


def test_every_answer_is_named() -> None:
    for name in by_name(messages.Answer):
        assert re.search(rf"`{name}\b", section("Requests")), name


def test_frames_of_a_hand_over_are_those_of_the_code() -> None:
    types = {
        **by_name(channel.Word),
        **{one.__name__: one for one in (dumps.HandoverHeader, dumps.SandboxDump)},
    }
    on_page = shown("From gate to gate", 1)
    assert set(on_page) == set(types)
    for name, fields in on_page.items():
        check_fields(fields, types[name])
