"""docs/budgets.md has every limit of a sandbox and every cost of a message."""

from pathlib import Path
from typing import Final

import msgspec

from broker.control_protocol.messages import MAX_DENIAL_TEXT, SandboxLimits
from broker.gate.containers1 import bus_client
from broker.gate.filter import costs
from broker.gate.sandbox import budgets, denial_reports, meter
from broker.supervisor.config import ConfiguredLimits
from broker.wire.sasl import MAX_LINES
from policy import match, tables
from tests.helpers.dbus_page import Row, read_sections

PAGE: Final = Path(__file__).parents[2] / "docs" / "budgets.md"
TEXT: Final = PAGE.read_text(encoding="utf-8")
WORDS: Final = " ".join(TEXT.split())
MIB: Final = 1024 * 1024
UNIT: Final = {"MiB": MIB}


def rows(first: str) -> dict[str, Row]:
    """Return the rows of the table whose head begins with a word, by their first column."""
    return {row[0]: row[1:] for part in read_sections(PAGE) for row in part.rows(first)}


def number(text: str) -> int:
    """Return a number as the page writes numbers: with spaces, and perhaps a unit."""
    digits, _, unit = text.rpartition(" ") if text[-1].isalpha() else (text, "", "")
    return int(digits.replace(" ", "")) * UNIT.get(unit, 1)


def test_every_limit_is_there_with_its_default() -> None:
    shown = {key: number(row[0]) for key, row in rows("key").items()}
    limits = msgspec.structs.asdict(SandboxLimits())
    limits["max_connections_per_container"] = limits.pop("connections")
    assert shown == limits
    assert set(shown) <= set(ConfiguredLimits.__struct_fields__)


def test_costs_are_those_of_the_code() -> None:
    shown = {key: row[0] for key, row in rows("work").items()}
    expected = {
        "a message whose header was judged before": 1,
        "a message that must be judged anew": costs.JUDGED_COST,
        "a read with less than one whole message": budgets.READ_COST,
        "the same without a remembered verdict": costs.HEARD_COST,
        "a question of the gate to the bus": costs.QUESTION_COST,
        "the reply to the app's own call to the bus": costs.ANSWER_COST,
        "a new connection": budgets.CONNECTION_COST,
    }
    for begin, cost in expected.items():
        (said,) = [value for key, value in shown.items() if key.startswith(begin)]
        assert said.split(maxsplit=1)[0].strip(",;") == str(cost), begin
    assert f"each {costs.BYTES_A_MESSAGE // 1024} KiB of a message, on arrival" in shown
    assert f"{costs.BUSY_SECOND:,} messages".replace(",", " ") in WORDS
    assert f"behind every {meter.EVERY} counted messages" in WORDS
    assert f"at most {MAX_LINES} lines" in WORDS
    assert f"{SandboxLimits().messages_per_second // budgets.CONNECTION_COST} a second" in WORDS


def test_other_limits_are_those_of_the_code() -> None:
    assert f"a path of {tables.MAX_PATH} characters" in WORDS
    assert f"an owner of {tables.MAX_NAMES} names with {tables.MAX_TEXT} characters" in WORDS
    assert f"at most {match.PIECES_A_STEP} times as many pieces" in WORDS
    assert f"up to {denial_reports.REPORTS_PER_SECOND} a second for each sandbox" in WORDS
    assert f"has at most {MAX_DENIAL_TEXT} characters" in WORDS
    assert f"At most {budgets.JUDGED_A_TURN} messages of a connection are judged anew" in WORDS
    assert f"A debt of at most {budgets.MOST_OWED} seconds is kept" in WORDS


def test_limits_of_the_gates_own_connections_are_those_of_the_code() -> None:
    assert f"a call may take {bus_client.CALL_SECONDS:.0f} s" in WORDS
    assert f"{bus_client.MAX_WAITING} calls may wait" in WORDS
    assert f"no message may exceed {bus_client.MAX_BYTES // MIB} MiB" in WORDS
