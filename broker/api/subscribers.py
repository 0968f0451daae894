"""Subscribers to `Denied`: the connections that receive refusals as signals.

`Denied` is sent to subscribers alone. A broadcast would be offered to every sandbox that listens to
all signals, would be refused there, and so would cause the next `Denied`. The number of signals per
second is limited. `Show` has the counts and the last refusals. A subscription ends when the
connection leaves the bus.
"""

from collections.abc import Callable, Iterator
from typing import Final

from broker.supervisor.sandboxes.registry import Record
from broker.supervisor.sandboxes.specs import Caller
from broker.wire.errors import LIMITS_EXCEEDED, CallRefusedError

MAX_SUBSCRIBERS: Final = 64
MAX_SUBSCRIBERS_OF_USER: Final = 16
# Signals per second, to all subscribers together. Each sandbox may cause 50 reports per second.
SIGNALS_PER_SECOND: Final = 500


class Subscribers:
    """The subscribers on all buses, by bus and unique name. `now` returns seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now: Final = now
        self._users: Final[dict[tuple[str, str], int]] = {}
        self._left = float(SIGNALS_PER_SECOND)
        self._filled = now()

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._users

    def __len__(self) -> int:
        return len(self._users)

    def add(self, caller: Caller) -> None:
        """Add a connection, unless the connection is a subscriber already.

        Raises CallRefusedError.
        """
        key = caller.bus, caller.unique_name
        if key in self._users:
            return
        own = list(self._users.values()).count(caller.uid)
        if len(self._users) >= MAX_SUBSCRIBERS:
            text = f"max_subscribers={MAX_SUBSCRIBERS} would be exceeded"
            raise CallRefusedError(LIMITS_EXCEEDED, text)
        if own >= MAX_SUBSCRIBERS_OF_USER:
            text = f"max_subscribers_per_user={MAX_SUBSCRIBERS_OF_USER} would be exceeded"
            raise CallRefusedError(LIMITS_EXCEEDED, text)
        self._users[key] = caller.uid

    def discard(self, bus: str, unique_name: str) -> bool:
        """Remove a connection. Return whether the connection was a subscriber."""
        return self._users.pop((bus, unique_name), None) is not None

    def lose_bus(self, bus: str) -> None:
        """Remove the subscribers on a lost bus, which reports no leaving connections any more."""
        for key in [key for key in self._users if key[0] == bus]:
            del self._users[key]

    def hearers(self, record: Record) -> Iterator[tuple[str, str]]:
        """Yield the subscribers that may see a refusal in this sandbox, within the rate limit.

        Only the sandbox's user and root may see the refusal.
        """
        now = self._now()
        self._left += (now - self._filled) * SIGNALS_PER_SECOND
        self._left = min(self._left, SIGNALS_PER_SECOND)
        self._filled = now
        for key, uid in self._users.items():
            if uid in (0, record.uid) and self._left >= 1:
                self._left -= 1
                yield key
