"""What one sandbox may take of the gate's time: messages, and lines in the log. No I/O but the log."""

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
# A read, in a handshake: what it says is bounded in sasl.py. Elsewhere meter.py looks at what it brought.
READ_COST: Final = 1
# Messages to be judged anew that one connection gets done before the others have their turn.
JUDGED_A_TURN: Final = 8
# Seconds' worth of messages that may come at once: apps ask for much when they start.
BURST: Final = 1.0
# Seconds' worth of debt that are kept: the bill comes when the bus has delivered the message.
MOST_OWED: Final = 10
# Whoever has taken too much waits at least so long, or each timer would be for a handful of messages.
SHORTEST_PAUSE: Final = 0.005

Clock = Callable[[], float]


class MessageBudget:
    """A token bucket. `left` is charged by whoever handles messages; below 0 ask for a `pause`.

    It is filled up only then, so that those who never empty it cost no look at the clock.
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
        """Put in what has come together since the last time."""
        now = self._clock()
        earned = int((now - self._filled) * self._rate)
        # What is less than one message is kept for the next time.
        self._filled += earned / self._rate
        self.left = min(self._full, self.left + earned)

    def charge(self, cost: int) -> None:
        """Take away what the bus brought to anybody because of this sandbox; what it owes has a bound."""
        if self.left > self._least:
            self.left = max(self.left - cost, self._least)
        self.caused += cost

    def take_more(self, cost: int) -> None:
        """Take away what things cost beyond what was counted; never so much that it lasts over a second."""
        self.fill()
        self.left = min(self.left, max(self.left - cost, -self._rate))

    def pause(self) -> float:
        """Return for how many seconds nothing more may be taken; 0 if some may."""
        self.fill()
        return max(SHORTEST_PAUSE, (1 - self.left) / self._rate) if self.left < 0 else 0.0

    @property
    def used(self) -> int:
        """How much of it is used up now."""
        self.fill()
        return self._full - self.left

    def dump(self) -> BudgetDump:
        """Return what is left, and since when."""
        return BudgetDump(left=self.left, filled=self._filled, caused=self.caused)

    def load(self, dump: BudgetDump) -> None:
        """Have left what the one had that made the dump."""
        self.left, self._filled, self.caused = dump.left, dump.filled, dump.caused


class RateLimitedLog:
    """The lines that one sandbox may cause, each second; how many more there were is told later."""

    def __init__(self, about: str, lines_a_second: int, clock: Clock = time.monotonic) -> None:
        self._about: Final = about
        self._most: Final = max(1, lines_a_second)
        self._clock: Final = clock
        self._second = clock()
        self.used = 0
        self.suppressed = 0  # since the last line that told
        self.suppressed_ever = 0

    def warning(self, what: str, detail: str = "", *, traceback: bool = False) -> None:
        """Log a line, or count it."""
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
        # What a peer sent may be in it: no line of the log is to be made by an app.
        text = detail if detail.isprintable() else ascii(detail)
        LOGGER.warning("%s sandbox=%s: %s", what, self._about, text, exc_info=traceback)

    def flush(self) -> None:
        """Say how many lines were left out, if any were."""
        if self.suppressed:
            count, self.suppressed = self.suppressed, 0
            LOGGER.warning("log sandbox=%s: %d suppressed", self._about, count)

    def dump(self) -> RateLimitedLogDump:
        """Return what was counted."""
        return RateLimitedLogDump(
            second=self._second,
            used=self.used,
            suppressed=self.suppressed,
            suppressed_ever=self.suppressed_ever,
        )

    def load(self, dump: RateLimitedLogDump) -> None:
        """Count on from there."""
        self._second, self.used = dump.second, dump.used
        self.suppressed, self.suppressed_ever = dump.suppressed, dump.suppressed_ever


class Reader(Protocol):
    """A connection, by what its app has not read."""

    @property
    def queued(self) -> int:
        """Bytes that wait for it."""

    @property
    def behind(self) -> int:
        """The same, if they are of more than one message."""

    def failed(self, exc: Exception) -> None:
        """End as the exception says."""


AnyReader = TypeVar("AnyReader", bound=Reader)


def find_slowest_reader(readers: Iterable[AnyReader], most: int) -> AnyReader | None:
    """Return the one that is most behind if more than `most` bytes wait for all together.

    One message of any size may always wait, for one of them: of those that only one waits for the largest does not count.
    """
    waiting = {reader: reader.queued for reader in readers}
    alone = [reader for reader in waiting if not reader.behind]
    if alone:
        del waiting[max(alone, key=waiting.__getitem__)]
    return max(waiting, key=waiting.__getitem__) if sum(waiting.values()) > most else None


def end_slowest_reader(reader: Reader, readers: Iterable[Reader], most: int) -> None:
    """End that one, if there is one. Raises PeerQuotaError if it is `reader`."""
    worst = find_slowest_reader(readers, most)
    if worst is not None:
        exc = PeerQuotaError("does not read what it is sent")
        if worst is reader:
            raise exc
        worst.failed(exc)
