"""Metering of a connection, by the count of messages or by the time for the messages.

The higher of the two is the cost. The counts in filter/costs.py are those of a machine with nothing
else to do. On a slower or busier machine the same messages take more time, of the gate and of the
bus. So the gate looks at the clock around each judgement. The gate also asks the bus a question
behind every few hundred messages or replies. Until the answer comes, the bus is at work on those
messages. So a flood gets the same share of the time on any machine.

    app            gate                            bus
     | 512 messages | -- 512 messages, GetId --->   |
     | -----------> | clock: 0 ms, paid: 8 ms       | at work
     |              | <-- answer to GetId --------- |
     |              | clock: 30 ms: charge 22 more  |
"""

import sys
from collections.abc import Callable, Sequence
from typing import Final

from broker.gate.dumps import ReplyAction
from broker.gate.filter.costs import BUSY_SECOND, BYTES_A_MESSAGE
from broker.gate.sandbox.budgets import Clock, MessageBudget
from broker.gate.sandbox.mediator import Mediator
from broker.wire.header import Header

# Messages from one question to the next. A question costs the bus as much as two messages.
EVERY: Final = 512
# An app with more than this part of `bytes_queued` unread pays for each reply as well.
BEHIND: Final = 16
KIND: Final = "meter"


class Meter:
    """The meter of a filter, which feeds the filter and corrects `spent`.

    The fast path passes messages on without the meter, and adds their cost to `counted`. Once
    `counted` has reached `ask_from`, the meter gets the next message. A reply is free, because the
    price of a call includes the reply. So the fast path adds replies to `answered` as well.
    """

    def __init__(
        self, judging: Mediator, budget: MessageBudget, clock: Clock | None = None
    ) -> None:
        self._judging: Final = judging
        self._budget: Final = budget
        self._clock: Final = clock or budget.clock
        self._asked: tuple[float, int] | None = None  # time, and the charges until then
        # A mediator without handlers passes all replies on, also those to calls of the gate.
        self._asks: Final = bool(judging.state.reply_handlers)
        judging.state.reply_handlers[KIND] = self._answered
        self.counted = self.answered = 0  # since the last question
        self.ask_from = EVERY if self._asks else sys.maxsize

    def feed_app(self, data: bytes, fds: Sequence[int]) -> None:
        """Feed the filter bytes from the app. Raises as the filter does."""
        self._measure_app(lambda: self._judging.feed_app(data, fds), len(data))

    def resume_reading(self) -> None:
        """Let the filter judge the messages that wait for a turn. Raises as the filter does."""
        self._measure_app(self._judging.resume_reading, 0)

    def feed_bus(self, data: bytes, fds: Sequence[int], *, pays: bool) -> None:
        """Feed the filter bytes from the bus. Raises as the filter does.

        The app pays for the time that known replies take, and with `pays`, for each reply. All
        other messages have been charged to the sandboxes that caused the messages.
        """
        judging = self._judging
        judging.billed = 0.0
        start = self._clock()
        judging.feed_bus(data, fds)
        if judging.answered:
            if pays:
                judging.spent, judging.answered = judging.spent + judging.answered, 0
            self._spend(start + judging.billed, judging.answered)
            self._ask_if_due()

    def _measure_app(self, judge: Callable[[], None], size: int) -> None:
        judging = self._judging
        start = self._clock()
        try:
            judge()
        finally:  # A message that ends the connection also has a cost.
            # A read without a whole message costs as well, so an app that sends byte by byte pays
            # for each read.
            least = 1 if size else 0
            judging.spent = max(judging.spent + size // BYTES_A_MESSAGE, least)
            self._spend(start, 0)
        # The bus has no work yet if all messages are unfinished.
        if judging.state.to_bus:
            self._ask_if_due()

    def _spend(self, start: float, answered: int) -> None:
        judging = self._judging
        took = int((self._clock() - start) * BUSY_SECOND)
        judging.spent = max(judging.spent, took - answered)
        judging.answered = 0
        self.counted += judging.spent + answered
        self.answered += answered

    def _ask_if_due(self) -> None:
        state = self._judging.state
        if self.counted >= self.ask_from and state.unique_name:
            self._asked = (self._clock(), self.counted - self.answered)
            self.counted = self.answered = 0
            self.ask_from = sys.maxsize
            state.call_driver("GetId", "", (), ReplyAction(KIND))

    def _answered(
        self, _then: ReplyAction, _reply: Header, _data: bytes, _fds: tuple[int, ...]
    ) -> None:
        if self._asked is None:
            return  # The question is that of a former gate.
        when, paid = self._asked
        self._asked = None
        self.ask_from = EVERY
        more = int((self._clock() - when) * BUSY_SECOND) - paid
        if more > 0:
            self._budget.take_more(more)
