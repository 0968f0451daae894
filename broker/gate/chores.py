"""Long work of one connection, done in slices: a look at every name that it follows. No I/O.

Names are others' to take, and there may be thousands. What walks over all of them is a chore: as much as a slice holds is
done at once, which is nearly always all. The rest is done a slice a turn of the loop, and meanwhile nothing is read on
the connection. Chores of one connection are done one after the other.
"""

from collections import deque
from typing import Final

from broker.gate.slices import SLICE, Work

# How much work it is to look at a name, beside what the rules take for it: as `policy.match` counts work.
NAME_WORK: Final = 128
# How much work one step of the rules is: see `slices.SLICE`.
STEP_WORK: Final = 64


class Chores:
    """The chores of one connection."""

    def __init__(self) -> None:
        self._works: Final[deque[Work]] = deque()
        self._is_working = False
        self.room = SLICE  # of a turn

    def __bool__(self) -> bool:
        return bool(self._works)

    def begin(self, work: Work) -> None:
        """Do a chore after those that are there. Raises what it raises."""
        self._works.append(work)
        if len(self._works) == 1 and not self._is_working:
            self.do_slice()

    def do_slice(self) -> None:
        """Do as much as a turn has room for. Raises what the chores raise."""
        done = 0
        self._is_working = True
        try:
            while self._works and done < self.room:
                try:
                    done += next(self._works[0])
                except StopIteration:
                    self._works.popleft()
        finally:
            self._is_working = False

    def finish(self) -> None:
        """Do all of it now: who is about to hand the connection over has no turns left."""
        while self._works:
            self.do_slice()
