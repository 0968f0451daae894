"""What one connection costs: the messages that its filter counts, or the time that they really took if it is more.

The counts in budgets.py are those of a machine with nothing else to do. On a slower or busier one the same messages
take more of the gate's time, and of the bus's. So the gate looks at the clock around each judgement of what was read;
and behind every few hundred messages, or replies to them, it asks the bus something, since until the answer comes the
bus has been at work on them. Thus whoever floods has a share of the time, on a slow machine as on a fast one.
"""

import sys
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
    """Feeds the filter, and sets its `spent` to what that cost.

    Whoever passes messages on without it adds to `counted`, and gives it the next one when that is `ask_from`.
    """

    def __init__(
        self, judging: Filter, budget: MessageBudget, clock: Clock = time.monotonic
    ) -> None:
        self._judging: Final = judging
        self._budget: Final = budget
        self._clock: Final = clock
        self._asked: tuple[float, int] | None = None  # when, and what had been counted
        # Who has none passes all answers on, those to calls of the gate's own as well.
        self._asks: Final = bool(judging.core.finishers)
        judging.core.finishers[KIND] = self._answered
        self.counted = 0  # since the last question
        self.ask_from = EVERY if self._asks else sys.maxsize

    def feed_app(self, data: bytes, fds: Sequence[int]) -> None:
        """Have judged what the app sent. Raises as the filter does."""
        self._measure_app(lambda: self._judging.feed_app(data, fds), len(data))

    def go_on(self) -> None:
        """Have judged what waits for its turn. Raises as the filter does."""
        self._measure_app(self._judging.go_on, 0)

    def feed_bus(self, data: bytes, fds: Sequence[int]) -> None:
        """Have judged what the bus sent. Raises as the filter does.

        Only replies to the app's calls cost it anything, and the time that they take: what else comes is not its doing.
        """
        judging = self._judging
        start = self._clock()
        judging.feed_bus(data, fds)
        if judging.spent:
            self._spend(start)
            self._ask_if_due()

    def _measure_app(self, judge: Callable[[], None], size: int) -> None:
        judging = self._judging
        start = self._clock()
        judge()
        judging.spent += size // BYTES_A_MESSAGE
        self._spend(start)
        # Half of a message is not on its way to the bus yet.
        if judging.core.to_bus:
            self._ask_if_due()

    def _spend(self, start: float) -> None:
        judging = self._judging
        judging.spent = max(judging.spent, int((self._clock() - start) * BUSY_SECOND))
        self.counted += judging.spent

    def _ask_if_due(self) -> None:
        core = self._judging.core
        if self.counted >= self.ask_from and core.unique_name:
            self._asked = (self._clock(), self.counted)
            self.counted = 0
            self.ask_from = sys.maxsize
            core.call_driver("GetId", "", (), Then(KIND))

    def _answered(self, _then: Then, _reply: Header, _data: bytes, _fds: tuple[int, ...]) -> None:
        if self._asked is None:
            return  # another gate had asked
        when, counted = self._asked
        self._asked = None
        self.ask_from = EVERY
        more = int((self._clock() - when) * BUSY_SECOND) - counted
        if more > 0:
            self._budget.take_more(more)
