"""Long work of the whole gate, such as compiling rules, cut into slices.

Each turn of the loop does a slice, so that apps do not wait for the whole work.
"""

from collections.abc import Callable
from typing import Final

from broker.gate.filter.chores import SLICE, Work
from broker.gate.io.loop import Loop
from broker.wire.errors import CallRefusedError


class Sliced:
    """A piece of work that is done in slices.

    `ended` is called with the error, or with None.
    """

    def __init__(
        self, loop: Loop, work: Work, ended: Callable[[CallRefusedError | None], None]
    ) -> None:
        self._loop: Final = loop
        self._work: Final = work
        self._ended: Final = ended
        self._later: Callable[[], None] | None = None

    def begin(self, later: Callable[[], None]) -> bool:
        """Do the first slice. Return whether the work is complete.

        Otherwise the rest follows in later turns of the loop, and `later` is called after the last
        slice.
        """
        if self._slice():
            return True
        self._later = later
        self._loop.next_turn(self._do_next_slice)
        return False

    def _do_next_slice(self) -> None:
        if not self._slice():
            self._loop.next_turn(self._do_next_slice)
        elif self._later is not None:
            self._later()

    def _slice(self) -> bool:
        done = 0
        try:
            while done < SLICE:
                done += next(self._work)
        except StopIteration:
            self._ended(None)
        except CallRefusedError as exc:
            self._ended(exc)
        else:
            return False
        return True
