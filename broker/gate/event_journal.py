"""Journal of unconfirmed events for the supervisor: `Ended` and `Denied`. No I/O.

The gate sends these events again to the next supervisor. Each event has a number, and a supervisor
confirms all events up to a number. The journal has limited room. The oldest refusals are dropped
first, and counted. All other events are not kept, because a snapshot has the same information.
"""

from collections.abc import Iterator
from typing import Final

import msgspec

from broker.control_protocol.messages import Denied, Ended, Event

# The highest possible number of sandboxes.
MAX_ENDS: Final = 10_000
# Refusals of all sandboxes together. A supervisor remembers a twentieth of that number for a
# sandbox. The texts are short (sandbox/denial_reports.py), so all refusals together take at most
# some MiB.
MAX_DENIALS: Final = 1000


class EventJournal(msgspec.Struct):
    """The unconfirmed events by number, oldest first."""

    ends: dict[int, Ended] = {}
    denials: dict[int, Denied] = {}
    last: int = 0
    sent: int = 0  # the last number that was sent to a supervisor
    # The number of refusals that were dropped before any supervisor received them, by sandbox.
    uncounted: dict[str, int] = {}

    def add(self, event: Event, *, was_sent: bool) -> int:
        """Keep an event, and return the number of the event.

        Return 0 for an event that is not kept, because a snapshot has the same information.
        """
        match event:
            case Ended():
                self.last += 1
                self.ends[self.last] = event
                self.uncounted.pop(event.sandbox, None)
                if len(self.ends) > MAX_ENDS:
                    del self.ends[next(iter(self.ends))]
            case Denied():
                self.last += 1
                self.denials[self.last] = event
                if len(self.denials) > MAX_DENIALS:
                    self._drop_denial()
            case _:
                return 0
        if was_sent:
            self.sent = self.last
        return self.last

    def confirm(self, number: int) -> None:
        """Forget all events up to `number`."""
        for events in (self.ends, self.denials):
            while events and (first := next(iter(events))) <= number:
                del events[first]

    def forget_end(self, sandbox: str) -> None:
        """Drop unconfirmed `Ended` events of an id that is being reused."""
        for number in [n for n, event in self.ends.items() if event.sandbox == sandbox]:
            del self.ends[number]

    def replay(self) -> Iterator[tuple[int, Event]]:
        """Yield all events with their numbers, for a new supervisor."""
        kept: list[tuple[int, Event]] = [*self.ends.items(), *self.denials.items()]
        yield from sorted(kept, key=lambda item: item[0])
        self.sent = self.last
        uncounted, self.uncounted = self.uncounted, {}
        for sandbox, more in uncounted.items():
            yield 0, summarise(sandbox, more, "while no supervisor was there")

    def _drop_denial(self) -> None:
        number = next(iter(self.denials))
        event = self.denials.pop(number)
        if number > self.sent:
            more = bool(event.kind) + event.more
            self.uncounted[event.sandbox] = self.uncounted.get(event.sandbox, 0) + more


def summarise(sandbox: str, more: int, when: str = "one by one") -> Denied:
    """Return an event that only has the number of unreported refusals."""
    return Denied(
        sandbox=sandbox,
        bus="",
        direction="",
        kind="",
        peer="",
        reason=f"too many to report {when}",
        more=more,
    )
