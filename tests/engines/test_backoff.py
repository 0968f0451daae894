"""Pauses between tries, and the limits to starting a gate again."""

import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st

from broker.engines.backoff import ExponentialBackoff
from broker.engines.gate_process import GateError
from broker.engines.restart_limits import (
    FORGET_STARTS_AFTER,
    LONGEST_PAUSE,
    MAX_REFUSALS,
    MAX_STARTS,
    STEADY_AFTER,
    RestartLimits,
)


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 50))
def test_pauses_grow_to_a_bound(chance: float, tries: int) -> None:
    backoff = ExponentialBackoff(0.1, 5.0, chance=lambda: chance)
    pauses = [backoff.next() for _ in range(tries)]
    assert pauses == sorted(pauses)
    assert all(0 < pause <= 5.0 for pause in pauses)
    was_first = backoff.is_first
    backoff.reset()
    assert (was_first, backoff.is_first) == (False, True)
    assert backoff.next() == pauses[0]


def test_without_chance_pauses_double_exactly() -> None:
    backoff = ExponentialBackoff(0.1, 0.5)
    assert [backoff.next() for _ in range(5)] == [0.1, 0.2, 0.4, 0.5, 0.5]


async def pauses_after(limits: RestartLimits, *lifetimes: float) -> list[float]:
    found = []
    for lifetime in lifetimes:
        before = trio.current_time()
        await limits.wait_after_death(lifetime)
        found.append(round(trio.current_time() - before, 3))
    return found


async def test_a_gate_that_served_long_is_started_again_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    limits = RestartLimits()
    short, long = STEADY_AFTER, STEADY_AFTER + 1
    assert await pauses_after(limits, short, short, short, short, short) == [0, 0.1, 0.2, 0.4, 0.5]
    assert await pauses_after(limits, long, short, short) == [0, 0, 0.1]
    assert LONGEST_PAUSE == 0.5


async def test_starts_are_forgotten_after_a_while_and_when_a_gate_serves(
    autojump_clock: trio.testing.MockClock,
) -> None:
    limits = RestartLimits()
    for _ in range(MAX_STARTS):
        limits.count_start()
    await trio.sleep(FORGET_STARTS_AFTER + 1)
    for _ in range(MAX_STARTS):
        limits.count_start()
    limits.served()
    limits.count_start()
    assert limits.has_served


async def test_refusals_have_an_end(autojump_clock: trio.testing.MockClock) -> None:
    limits = RestartLimits()
    for _ in range(MAX_REFUSALS - 1):
        await limits.wait_after_refusal("why")
    limits.accepted()
    for _ in range(MAX_REFUSALS - 1):
        await limits.wait_after_refusal("why")
    with pytest.raises(GateError, match="refuses this supervisor: why"):
        await limits.wait_after_refusal("why")
