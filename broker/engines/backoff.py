"""Pauses between tries, twice as long each time, up to a limit."""

from collections.abc import Callable
from typing import Final

# More doublings than any pause needs to reach its limit, few enough for a float.
_MAX_DOUBLINGS: Final = 32


class ExponentialBackoff:
    """Pauses that double.

    `chance` (0 to 1) makes each shorter, by up to half, so that many do not try at once.
    """

    def __init__(
        self, first: float, longest: float, *, chance: Callable[[], float] | None = None
    ) -> None:
        self._first: Final = first
        self._longest: Final = longest
        self._chance: Final = chance
        self._failures = 0

    @property
    def is_first(self) -> bool:
        """Return whether no pause was taken since the last success."""
        return self._failures == 0

    def next(self) -> float:
        """Return the seconds to wait now, and count one more failure."""
        pause = min(self._first * 2.0**self._failures, self._longest)
        self._failures = min(self._failures + 1, _MAX_DOUBLINGS)
        return pause if self._chance is None else pause * (0.5 + self._chance() / 2)

    def reset(self) -> None:
        """Begin with the first pause again, after a success."""
        self._failures = 0
