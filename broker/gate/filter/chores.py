"""Long work of a connection, done in slices: looks at all followed names. No I/O.

Other programs may own thousands of names. A walk over all followed names is a chore. The first slice is done at once, and
nearly always no other is needed. The rest is done a slice a turn of the loop, and meanwhile nothing is read on the
connection. Chores of a connection are done one after the other.
"""

from collections.abc import Generator
from typing import Final

# The work of some milliseconds on a slow machine. `policy.match` counts work: 4 take the time of one step.
SLICE: Final = 50_000
# The work of a look at a name, beside the steps of the rules, as `policy.match` counts work.
NAME_WORK: Final = 128
# The work of one step of the rules (0.4 µs).
STEP_WORK: Final = 4


# Yields the amount of work done since the last time. Raises CallRefusedError if the work is refused.
Work = Generator[int, None, None]


class Chores:
    """The chores of a connection."""

    def __init__(self) -> None:
        self._works: Final[list[Work]] = []
        self._is_working = False
        self.room = SLICE  # of a turn

    def __bool__(self) -> bool:
        return bool(self._works)

    def begin(self, work: Work) -> None:
        """Add a chore, and begin with it if no other is waiting. Raises the errors of the chores."""
        self._works.append(work)
        if len(self._works) == 1 and not self._is_working:
            self.do_slice()

    def do_slice(self) -> None:
        """Do as much work as a turn has room for. Raises the errors of the chores."""
        done = 0
        self._is_working = True
        try:
            while self._works and done < self.room:
                try:
                    done += next(self._works[0])
                except StopIteration:
                    del self._works[0]
        finally:
            self._is_working = False

    def finish(self) -> None:
        """Do all chores now: a connection that is about to be handed over has no turns left."""
        while self._works:
            self.do_slice()
