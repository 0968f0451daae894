"""What fuzzing found stays found: every harness is given its seeds and its kept inputs. See docs/development.md."""

from pathlib import Path
from typing import Final

import pytest

from integration.fuzz.harnesses import CORPUS, SHARES, invariant_of, load

MAX_FILES: Final = 64
MAX_BYTES: Final = 100 * 1024

KEPT: Final = [(name, path) for name in SHARES for path in sorted((CORPUS / name).glob("*"))]


@pytest.mark.parametrize("name", SHARES)
def test_seeds_break_nothing(name: str) -> None:
    harness = load(name)
    for seed in harness.seeds():
        harness.check(seed)


@pytest.mark.parametrize("name", SHARES)
def test_a_harness_says_its_invariant_and_takes_anything(name: str) -> None:
    harness = load(name)
    assert len(invariant_of(name)) > 40
    for data in (b"", b"\0", b"\xff" * 40, bytes(range(256))):
        harness.check(data)


@pytest.mark.parametrize(("name", "path"), KEPT, ids=[f"{n}-{p.name[:12]}" for n, p in KEPT])
def test_kept_inputs_break_nothing(name: str, path: Path) -> None:
    load(name).check(path.read_bytes())


def test_the_corpus_is_small_and_of_harnesses_that_are_there() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} <= set(SHARES)
    assert len(KEPT) <= MAX_FILES
    assert sum(path.stat().st_size for _, path in KEPT) <= MAX_BYTES
