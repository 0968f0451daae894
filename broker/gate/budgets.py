"""What one sandbox may take of the gate's time: messages, and lines in the log. No I/O but the log."""

import logging
import time
from collections.abc import Callable
from typing import Final

LOGGER: Final = logging.getLogger(__name__)

# What things cost, in messages. One whose header was judged before takes about 4 µs, one that is new
# or refused 50 to 100 µs, and a connection with both of its handshakes about 1 ms.
JUDGED_COST: Final = 20
CONNECTION_COST: Final = 200
# Messages to be judged anew that one connection gets done before the others have their turn.
JUDGED_A_TURN: Final = 8
# Seconds' worth of messages that may come at once: apps ask for much when they start.
BURST: Final = 0.25
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
        self._clock: Final = clock
        self._filled = clock()
        self.left = self._full

    def fill(self) -> None:
        """Put in what has come together since the last time."""
        now = self._clock()
        earned = int((now - self._filled) * self._rate)
        # What is less than one message is kept for the next time.
        self._filled += earned / self._rate
        self.left = min(self._full, self.left + earned)

    def pause(self) -> float:
        """Return for how many seconds nothing more may be taken; 0 if some may."""
        self.fill()
        return max(SHORTEST_PAUSE, (1 - self.left) / self._rate) if self.left < 0 else 0.0

    @property
    def used(self) -> int:
        """How much of it is used up now."""
        self.fill()
        return self._full - self.left


class Complaints:
    """The lines that one sandbox may cause, each second; how many more there were is told later."""

    def __init__(self, about: str, lines_a_second: int, clock: Clock = time.monotonic) -> None:
        self._about: Final = about
        self._most: Final = max(1, lines_a_second)
        self._clock: Final = clock
        self._second = clock()
        self.used = 0
        self.suppressed = 0  # since the last line that told
        self.suppressed_ever = 0

    def add(self, what: str, detail: str = "", *, traceback: bool = False) -> None:
        """Log a line, or count it."""
        now = self._clock()
        if now - self._second >= 1.0:
            self._second = now
            self.used = 0
            self.tell()
        if self.used >= self._most:
            self.suppressed += 1
            self.suppressed_ever += 1
            return
        self.used += 1
        # What a peer sent may be in it: no line of the log is to be made by an app.
        text = detail if detail.isprintable() else ascii(detail)
        LOGGER.warning("%s sandbox=%s: %s", what, self._about, text, exc_info=traceback)

    def tell(self) -> None:
        """Say how many lines were left out, if any were."""
        if self.suppressed:
            count, self.suppressed = self.suppressed, 0
            LOGGER.warning("log sandbox=%s: %d suppressed", self._about, count)
