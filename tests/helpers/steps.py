"""Work that is done in steps, for tests: at once, and with a look at how much each step was."""

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


def at_once(work: Generator[int, None, T]) -> T:
    """Do all of it and return what comes of it."""
    return measured(work)[0]


def measured(work: Generator[int, None, T]) -> tuple[T, list[int]]:
    """Do all of it; return what comes of it, and what each step was told to be."""
    steps = []
    while True:
        try:
            steps.append(next(work))
        except StopIteration as exc:
            result: T = exc.value
            return result, steps
