"""Throttling of a sandbox, whose readers wait in order until the budget has filled up.

budget  1    charge(5, A)         -4: throttled, A waits
             charge(2, B)         -6: B waits behind A
timer        filled up: A reads,  charge(3, A): A waits behind B
next turn    B reads              charge(1, B): B waits behind A
...          no reader waits: not throttled any more
"""

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Final

from broker.gate.io.loop import Loop
from broker.gate.sandbox.budgets import MessageBudget

# A function that resumes a reader. The function also identifies the reader, which waits only once.
ReadOn = Callable[[], None]


class Throttle:
    """The waiting readers of a sandbox."""

    def __init__(
        self, loop: Loop, budget: MessageBudget, failed: Callable[[Exception], None]
    ) -> None:
        """Throttle readers by a budget.

        `failed` is called with the error of a reader that was resumed.
        """
        self._loop: Final = loop
        self._budget: Final = budget
        self._failed = failed
        self._waiting: Final[OrderedDict[ReadOn, None]] = OrderedDict()
        self.is_throttled = False
        self.count = 0  # how often throttling began
        self._is_stopped = False

    @property
    def waiting(self) -> Collection[ReadOn]:
        """The readers that wait, in order."""
        return self._waiting

    def charge(self, cost: int, read_on: ReadOn, *, goes_first: bool = False) -> bool:
        """Charge messages. Return whether the reader has to wait until `read_on` is called.

        Meanwhile every other reader has one read, so that no reader starves the others. A reader
        with an unfinished message `goes_first`. Otherwise many large messages would be complete,
        and sent to the bus, at the same time.
        """
        self._budget.left -= cost
        if self._budget.left < 0 and not self.is_throttled and (wait := self._budget.pause()):
            self.count += 1
            self.is_throttled = True
            self._loop.call_later(wait, self._wake_next)
        if self.is_throttled:
            self._waiting[read_on] = None
            if goes_first:
                self._waiting.move_to_end(read_on, last=False)
        return self.is_throttled

    def forget(self, read_on: ReadOn) -> None:
        """Remove a reader."""
        self._waiting.pop(read_on, None)

    def stop(self) -> None:
        """Resume no reader any more, and let go of the sandbox.

        The callbacks are methods of the sandbox. Kept, they would be a circle, and a thousand ended
        sandboxes would wait for the garbage collector.
        """
        self._is_stopped = True
        self._failed = _ignore
        self._waiting.clear()

    def _wake_next(self) -> None:
        """Resume the reader that has waited longest. The next reader follows after the charge.

        Resuming all readers at once would be a burst of reads, and delay all other sandboxes.
        """
        if self._is_stopped:
            return
        if wait := self._budget.pause():
            self._loop.call_later(wait, self._wake_next)
        elif self._waiting:
            read_on, _ = self._waiting.popitem(last=False)
            try:
                read_on()
            except Exception as exc:  # noqa: BLE001 - the sandbox handles the error
                self._failed(exc)
            self._loop.next_turn(self._wake_next)
        else:
            self.is_throttled = False

    def load(self, waiting: Collection[ReadOn], count: int, *, is_throttled: bool) -> None:
        """Restore the state from a dump. `resume` continues."""
        self._waiting.update(dict.fromkeys(waiting))
        self.count, self.is_throttled = count, is_throttled

    def resume(self) -> None:
        """Continue after `load`."""
        if self.is_throttled:
            self._loop.next_turn(self._wake_next)


def _ignore(_exc: Exception) -> None:
    pass
