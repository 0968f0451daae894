"""What one connection costs: the messages that its filter counts, or the time that they really took if it is more.

The counts in budgets.py are those of a machine with nothing else to do. On a slower or busier one the same messages
take more of the gate's time, and of the bus's. So the gate looks at the clock around each judgement of what was read;
and behind every few hundred messages it asks the bus something, since until the answer comes the bus has been at
work on them. Thus whoever floods has a share of the time, on a slow machine as on a fast one.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final

from broker.gate.budgets import BYTES_A_MESSAGE, Clock, MessageBudget
from broker.gate.filter import Filter
from broker.gate.handover import Then
from broker.wire.header import Header

# Messages, as budgets.py counts them, from one question to the next: a question costs the bus as much as two.
EVERY: Final = 256
# Messages that a second counts for, of the gate's time or of the bus's: the default budget is 40 % of it.
BUSY_SECOND: Final = 62_500
KIND: Final = "meter"


class Meter:
    """Feeds the filter, and sets its `spent` to what that cost."""

    def __init__(
        self, judging: Filter, budget: MessageBudget, clock: Clock = time.monotonic
    ) -> None:
        self._judging: Final = judging
        self._budget: Final = budget
        self._clock: Final = clock
        self._counted = 0  # since the last question
        self._asked: tuple[float, int] | None = None  # when, and what had been counted
        # Who has none passes all answers on, those to calls of the gate's own as well.
        self._asks: Final = bool(judging.core.finishers)
        judging.core.finishers[KIND] = self._answered

    def feed_app(self, data: bytes, fds: Sequence[int]) -> None:
        """Have judged what the app sent. Raises as the filter does."""
        self._measure(lambda: self._judging.feed_app(data, fds), len(data))

    def go_on(self) -> None:
        """Have judged what waits for its turn. Raises as the filter does."""
        self._measure(self._judging.go_on, 0)

    def _measure(self, judge: Callable[[], None], size: int) -> None:
        judging = self._judging
        start = self._clock()
        judge()
        took = int((self._clock() - start) * BUSY_SECOND)
        judging.spent = max(judging.spent + size // BYTES_A_MESSAGE, took)
        self._counted += judging.spent
        core = judging.core
        if not (self._asks and core.unique_name):
            return
        # Half of a message is not on its way to the bus yet.
        if self._counted >= EVERY and self._asked is None and core.to_bus:
            self._asked = (self._clock(), self._counted)
            self._counted = 0
            core.call_driver("GetId", "", (), Then(KIND))

    def _answered(self, _then: Then, _reply: Header, _data: bytes, _fds: tuple[int, ...]) -> None:
        if self._asked is None:
            return  # another gate had asked
        when, counted = self._asked
        self._asked = None
        more = int((self._clock() - when) * BUSY_SECOND) - counted
        if more > 0:
            self._budget.take_more(more)
