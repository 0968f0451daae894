"""Events that no supervisor has confirmed yet, to be sent again to the next one: `Ended` and `Denied`. No I/O.

Each of these events has a number. A supervisor confirms all events up to a number. The journal has bounded room: the
oldest refusals are dropped first, and counted. A snapshot tells all other events.
"""

from collections.abc import Iterator
from typing import Final

import msgspec

from broker.control_protocol.messages import Denied, Ended, Event

# As many as there may be sandboxes.
MAX_ENDS: Final = 10_000
# Refusals of all sandboxes together: twenty times as many as a supervisor remembers of one. Their texts are short
# (sandbox/denial_reports.py), so all together have some MiB at the most.
MAX_DENIALS: Final = 1000


class EventJournal(msgspec.Struct):
    """The unconfirmed events by their numbers, oldest first."""

    ends: dict[int, Ended] = {}
    denials: dict[int, Denied] = {}
    last: int = 0
    sent: int = 0  # the last number that was sent to a supervisor
    # Refusals that were dropped before any supervisor was told: sandbox -> how many.
    uncounted: dict[str, int] = {}

    def add(self, event: Event, *, was_sent: bool) -> int:
        """Keep an event and return its number; 0 for an event that a snapshot tells."""
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
        """Forget all events up to that number."""
        for events in (self.ends, self.denials):
            while events and (first := next(iter(events))) <= number:
                del events[first]

    def forget_end(self, sandbox: str) -> None:
        """Drop unconfirmed `Ended` events of an id that is being reused."""
        for number in [n for n, event in self.ends.items() if event.sandbox == sandbox]:
            del self.ends[number]

    def replay(self) -> Iterator[tuple[int, Event]]:
        """Return all events with their numbers, for a new supervisor."""
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
    """Return an event with nothing but the number of unreported refusals."""
    return Denied(
        sandbox=sandbox,
        bus="",
        direction="",
        kind="",
        peer="",
        reason=f"too many to report {when}",
        more=more,
    )
