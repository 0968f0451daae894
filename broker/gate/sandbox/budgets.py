"""Budgets of a sandbox: messages, lines in the log, and bytes that apps have not read.

The log is the only I/O.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Final, Protocol, TypeVar

from broker.gate.dumps import BudgetDump, RateLimitedLogDump
from broker.wire.errors import PeerQuotaError

LOGGER: Final = logging.getLogger(__name__)

# The costs of connections, as filter/costs.py counts them. A connection with both handshakes takes
# some milliseconds, in the gate, in the bus and in the supervisor.
CONNECTION_COST: Final = 250
# A read in a handshake, which sasl.py bounds. After the handshake, meter.py charges the messages of
# a read.
READ_COST: Final = 1
# Messages without a remembered verdict that a connection gets judged before the next connection has
# a turn.
JUDGED_A_TURN: Final = 8
# Seconds' worth of messages that may come at once, because apps send many at the start.
BURST: Final = 1.0
# Seconds' worth of debt that are kept. A debt arises because the bill comes after the bus has
# delivered the message.
MOST_OWED: Final = 10
# Seconds; the least pause of a throttled sandbox. With shorter pauses, each timer would be for a
# handful of messages.
SHORTEST_PAUSE: Final = 0.005

Clock = Callable[[], float]


class MessageBudget:
    """A token bucket of messages.

    Callers subtract the cost from `left`. When `left` is below 0, callers ask for a `pause`.

    The bucket is filled only then, so a sandbox that never empties the bucket costs no look at the
    clock.
    """

    def __init__(self, a_second: int, clock: Clock = time.monotonic) -> None:
        self._rate: Final = max(1, a_second)
        self._full: Final = max(1, int(self._rate * BURST))
        self._least: Final = -self._rate * MOST_OWED
        self.clock: Final = clock
        self._filled = clock()
        self.left = self._full
        self.caused = 0  # the part of all charges, so far, that is for messages from the bus

    def fill(self) -> None:
        """Add the messages earned since the last time."""
        now = self.clock()
        earned = int((now - self._filled) * self._rate)
        # A fraction of a message counts the next time.
        self._filled += earned / self._rate
        self.left = min(self._full, self.left + earned)

    def charge(self, cost: int) -> None:
        """Charge messages that the bus delivered to any sandbox because of this sandbox.

        The debt is limited.
        """
        if self.left > self._least:
            self.left = max(self.left - cost, self._least)
        self.caused += cost

    def take_more(self, cost: int) -> None:
        """Charge a cost beyond the counted messages.

        The debt grows at most to the earnings of one second.
        """
        self.fill()
        self.left = min(self.left, max(self.left - cost, -self._rate))

    def pause(self) -> float:
        """Return the seconds for which the sandbox must not be read."""
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
    """Warnings about a sandbox, up to a number per second.

    Further warnings are counted, and the count is logged later.
    """

    def __init__(self, about: str, lines_a_second: int, clock: Clock = time.monotonic) -> None:
        self._about: Final = about
        self._most: Final = max(1, lines_a_second)
        self._clock: Final = clock
        self._second = clock()
        self.used = 0
        self.suppressed = 0  # since the last log of the number
        self.suppressed_ever = 0

    def warning(self, what: str, detail: str = "", *, traceback: bool = False) -> None:
        """Log a line, or only count the line after too many lines in this second."""
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
        # The detail may come from a peer. A line break would forge a line of the log.
        text = detail if detail.isprintable() else ascii(detail)
        LOGGER.warning("%s sandbox=%s: %s", what, self._about, text, exc_info=traceback)

    def flush(self) -> None:
        """Log the number of suppressed lines, if there are any."""
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
    """A connection with bytes that the app has not read."""

    @property
    def queued(self) -> int:
        """Bytes that wait for the app."""

    @property
    def behind(self) -> int:
        """The number of waiting bytes if more than one message waits, or else 0."""

    def failed(self, exc: Exception) -> None:
        """End the connection because of an error."""


AnyReader = TypeVar("AnyReader", bound=Reader)


def find_slowest_reader(readers: Iterable[AnyReader], most: int) -> AnyReader | None:
    """Return the reader with the most waiting bytes, if all readers have more than `most`.

    A single message may be of any size. So among the readers with a single message waiting, the
    reader with the largest message does not count.
    """
    waiting = {reader: reader.queued for reader in readers}
    alone = [reader for reader in waiting if not reader.behind]
    if alone:
        del waiting[max(alone, key=waiting.__getitem__)]
    return max(waiting, key=waiting.__getitem__) if sum(waiting.values()) > most else None


def end_slowest_reader(reader: Reader, readers: Iterable[Reader], most: int) -> None:
    """End the connection of the slowest reader, if the limit is exceeded.

    Raises PeerQuotaError if the slowest reader is `reader`.
    """
    worst = find_slowest_reader(readers, most)
    if worst is not None:
        exc = PeerQuotaError("does not read what it is sent")
        if worst is reader:
            raise exc
        worst.failed(exc)
