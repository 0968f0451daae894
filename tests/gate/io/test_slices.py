"""Long work is done a slice a turn."""

from collections.abc import Callable, Iterator

import pytest

from broker.gate.filter.chores import SLICE, Work
from broker.gate.io.loop import Loop
from broker.gate.io.slices import Sliced
from broker.wire.errors import INVALID_ARGS, CallRefusedError


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def run_to_its_end(loop: Loop, work: Work) -> tuple[list[object], int]:
    """Return what happened, and in how many turns after the first slice."""
    seen: list[object] = []
    turns = 0

    def count() -> None:
        nonlocal turns
        if "later" in seen:
            loop.stop()
        else:
            turns += 1
            loop.next_turn(count)

    def later() -> None:
        seen.append("later")

    if Sliced(loop, work, seen.append).begin(later):
        return seen, 0
    loop.next_turn(count)
    loop.run()
    return seen, turns


def steps(count: int, size: int, end: Callable[[], None] = lambda: None) -> Work:
    for _ in range(count):
        yield size
    end()


def refuse() -> None:
    raise CallRefusedError(INVALID_ARGS, "no")


def test_what_is_short_is_done_at_once(loop: Loop) -> None:
    assert run_to_its_end(loop, steps(10, SLICE // 20)) == ([None], 0)


def test_what_is_long_leaves_others_a_turn_after_each_slice(loop: Loop) -> None:
    seen, turns = run_to_its_end(loop, steps(100, SLICE // 10))
    assert seen == [None, "later"]
    assert turns >= 9


def test_a_refusal_is_told_whenever_it_comes(loop: Loop) -> None:
    for count in (1, 100):
        seen, _ = run_to_its_end(loop, steps(count, SLICE // 10, refuse))
        assert isinstance(seen[0], CallRefusedError)
        assert seen[1:] == ["later"] * (count > 1)
