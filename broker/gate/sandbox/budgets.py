"""Budgets of one sandbox: messages, lines in the log, and bytes that its apps have not read. No I/O but the log."""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Final, Protocol, TypeVar

from broker.gate.dumps import BudgetDump, RateLimitedLogDump
from broker.wire.errors import PeerQuotaError

LOGGER: Final = logging.getLogger(__name__)

# The costs of connections, as filter/costs.py counts them. A connection with both of its handshakes takes some
# milliseconds, in the gate, in the bus and in the supervisor.
CONNECTION_COST: Final = 250
# A read in a handshake, whose length sasl.py bounds. After the handshake, meter.py charges what a read brought.
READ_COST: Final = 1
# Messages without a remembered verdict that one connection gets judged before the others have their turn.
JUDGED_A_TURN: Final = 8
# Seconds' worth of messages that may come at once, because apps send many when they start.
BURST: Final = 1.0
# Seconds' worth of debt that are kept. A debt arises because the bill comes after the bus has delivered the message.
MOST_OWED: Final = 10
# Seconds; the least pause of a throttled sandbox. With shorter ones, each timer would be for a handful of messages.
SHORTEST_PAUSE: Final = 0.005

Clock = Callable[[], float]


class MessageBudget:
    """A token bucket of messages. Callers subtract from `left`; below 0 they ask for a `pause`.

    The bucket is filled only then, so a sandbox that never empties it costs no look at the clock.
    """

    def __init__(self, a_second: int, clock: Clock = time.monotonic) -> None:
        self._rate: Final = max(1, a_second)
        self._full: Final = max(1, int(self._rate * BURST))
        self._least: Final = -self._rate * MOST_OWED
        self._clock: Final = clock
        self._filled = clock()
        self.left = self._full
        self.caused = 0  # the part of all charges, so far, that is for messages from the bus

    def fill(self) -> None:
        """Add what was earned since the last time."""
        now = self._clock()
        earned = int((now - self._filled) * self._rate)
        # A fraction of a message counts the next time.
        self._filled += earned / self._rate
        self.left = min(self._full, self.left + earned)

    def charge(self, cost: int) -> None:
        """Charge messages that the bus delivered, to any sandbox, because of this one. The debt is bounded."""
        if self.left > self._least:
            self.left = max(self.left - cost, self._least)
        self.caused += cost

    def take_more(self, cost: int) -> None:
        """Charge a cost beyond what was counted, but no more debt than a second earns."""
        self.fill()
        self.left = min(self.left, max(self.left - cost, -self._rate))

    def pause(self) -> float:
        """Return for how many seconds the sandbox is not to be read; 0: it may be read now."""
        self.fill()
        return max(SHORTEST_PAUSE, (1 - self.left) / self._rate) if self.left < 0 else 0.0

    @property
    def used(self) -> int:
        """The part of the budget that is used up now."""
        self.fill()
        return self._full - self.left

    def dump(self) -> BudgetDump:
        """Return the state."""
        return BudgetDump(left=self.left, filled=self._filled, caused=self.caused)

    def load(self, dump: BudgetDump) -> None:
        """Restore the state from `dump`."""
        self.left, self._filled, self.caused = dump.left, dump.filled, dump.caused


class RateLimitedLog:
    """Warnings about one sandbox, so many a second. Those beyond are counted, and their number is logged later."""

    def __init__(self, about: str, lines_a_second: int, clock: Clock = time.monotonic) -> None:
        self._about: Final = about
        self._most: Final = max(1, lines_a_second)
        self._clock: Final = clock
        self._second = clock()
        self.used = 0
        self.suppressed = 0  # since the number was last logged
        self.suppressed_ever = 0

    def warning(self, what: str, detail: str = "", *, traceback: bool = False) -> None:
        """Log a line, or count it if there were too many in this second."""
        now = self._clock()
        if now - self._second >= 1.0:
            self._second = now
            self.used = 0
            self.flush()
        if self.used >= self._most:
            self.suppressed += 1
            self.suppressed_ever += 1
            return
        self.used += 1
        # The detail may be what a peer sent. A line break in it would forge a line of the log.
        text = detail if detail.isprintable() else ascii(detail)
        LOGGER.warning("%s sandbox=%s: %s", what, self._about, text, exc_info=traceback)

    def flush(self) -> None:
        """Log how many lines were left out, if any were."""
        if self.suppressed:
            count, self.suppressed = self.suppressed, 0
            LOGGER.warning("log sandbox=%s: %d suppressed", self._about, count)

    def dump(self) -> RateLimitedLogDump:
        """Return the state."""
        return RateLimitedLogDump(
            second=self._second,
            used=self.used,
            suppressed=self.suppressed,
            suppressed_ever=self.suppressed_ever,
        )

    def load(self, dump: RateLimitedLogDump) -> None:
        """Restore the state from `dump`."""
        self._second, self.used = dump.second, dump.used
        self.suppressed, self.suppressed_ever = dump.suppressed, dump.suppressed_ever


class Reader(Protocol):
    """A connection, seen by the bytes that its app has not read."""

    @property
    def queued(self) -> int:
        """Bytes that wait for the app."""

    @property
    def behind(self) -> int:
        """The same, if more than one message waits; else 0."""

    def failed(self, exc: Exception) -> None:
        """End the connection as the exception says."""


AnyReader = TypeVar("AnyReader", bound=Reader)


def find_slowest_reader(readers: Iterable[AnyReader], most: int) -> AnyReader | None:
    """Return the reader with the most bytes waiting, if more than `most` wait for all readers together.

    A single message may be of any size. So among the readers for whom only one message waits, the one with the largest
    does not count.
    """
    waiting = {reader: reader.queued for reader in readers}
    alone = [reader for reader in waiting if not reader.behind]
    if alone:
        del waiting[max(alone, key=waiting.__getitem__)]
    return max(waiting, key=waiting.__getitem__) if sum(waiting.values()) > most else None


def end_slowest_reader(reader: Reader, readers: Iterable[Reader], most: int) -> None:
    """End the slowest reader, if there is one. Raises PeerQuotaError if it is `reader`."""
    worst = find_slowest_reader(readers, most)
    if worst is not None:
        exc = PeerQuotaError("does not read what it is sent")
        if worst is reader:
            raise exc
        worst.failed(exc)
