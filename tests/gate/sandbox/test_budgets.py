"""The budgets of time: messages, and lines in the log."""

import logging

import pytest

from broker.gate.sandbox.budgets import BURST, SHORTEST_PAUSE, MessageBudget, RateLimitedLog


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_bucket_gives_what_was_promised_a_second(clock: Clock) -> None:
    budget = MessageBudget(1000, clock)
    taken = 0
    for _ in range(100_000):
        budget.left -= 1
        taken += 1
        if budget.left < 0:
            clock.now += budget.pause()
        if clock.now >= 110:
            break
    assert 10_000 <= taken <= 10_000 + 1000 * BURST + 2


def test_who_takes_little_is_never_paused(clock: Clock) -> None:
    budget = MessageBudget(1000, clock)
    for _ in range(1000):
        clock.now += 1
        budget.left -= int(1000 * BURST)
        assert not (budget.left < 0 and budget.pause())


def test_rest_earns_no_more_than_the_burst(clock: Clock) -> None:
    budget = MessageBudget(1000, clock)
    budget.left -= 10
    assert budget.used == 10
    clock.now += 3600
    assert budget.used == 0


def test_who_took_much_at_once_waits_until_it_is_made_up_for(clock: Clock) -> None:
    budget = MessageBudget(1000, clock)
    budget.left -= int(1000 * BURST) + 5000
    wait = budget.pause()
    assert wait == pytest.approx(5.001)
    clock.now += wait
    assert budget.pause() == 0
    budget.left -= 2
    assert budget.pause() == SHORTEST_PAUSE


def test_small_steps_of_the_clock_are_not_lost(clock: Clock) -> None:
    budget = MessageBudget(10, clock)
    budget.left = -10
    for _ in range(1101):
        clock.now += 0.001
        budget.fill()
    assert budget.left >= 0


def test_lines_are_counted_when_there_are_too_many(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    complaints = RateLimitedLog("c7", 3, clock)
    for index in range(10):
        complaints.warning("what", str(index))
    assert [record.getMessage() for record in caplog.records] == [
        "what sandbox=c7: 0",
        "what sandbox=c7: 1",
        "what sandbox=c7: 2",
    ]
    assert (complaints.used, complaints.suppressed_ever) == (3, 7)
    caplog.clear()
    clock.now += 1
    complaints.warning("what", "next")
    complaints.flush()
    assert [record.getMessage() for record in caplog.records] == [
        "log sandbox=c7: 7 suppressed",
        "what sandbox=c7: next",
    ]


def test_no_line_is_of_an_apps_making(caplog: pytest.LogCaptureFixture) -> None:
    RateLimitedLog("c7", 3).warning("what", "a\nERROR gate all is well\x1b[2J\u202e")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().isprintable()
