import re
from pathlib import Path

from policy.snaps.usos_coverage import NO_RULE, count, report
from tests.helpers.snapworlds import library

DOCS = Path(__file__).parents[3] / "docs" / "policy.md"


def test_every_entry_is_counted_once() -> None:
    counted = count(library())
    assert counted.total() == 866
    assert counted[NO_RULE] == 3
    assert counted[""] > 500


def test_the_documentation_has_these_numbers() -> None:
    written = DOCS.read_text()
    lines = report(count(library())).splitlines()
    assert re.fullmatch(r"a\(usos\) suffices for \d+ of 866 entries of the catalogue\.", lines[0])
    for line in lines:
        assert line in written
