"""What has to be told once more if the supervisor dies before it has dealt with it: ends and refusals. No I/O.

Each such event has a number. The supervisor says up to which one it has dealt with them, and until then they are
here, in bounded room: of refusals the oldest go first, and are counted. What else happens a snapshot tells.
"""

from collections.abc import Iterator
from typing import Final

import msgspec

from broker.control_protocol.messages import Denied, Ended, Event

# The end of each of as many sandboxes as there may be.
MAX_ENDS: Final = 10_000
# Of all sandboxes together: twenty times what a supervisor remembers of one. No text of one is long (reports.py), so
# they are some MiB at the most.
MAX_DENIALS: Final = 1000


class EventJournal(msgspec.Struct):
    """The events by their numbers, oldest first."""

    ends: dict[int, Ended] = {}
    denials: dict[int, Denied] = {}
    last: int = 0
    told: int = 0  # up to here a supervisor was told, whatever it has made of it
    # Refusals that went while no supervisor was there to be told: sandbox -> how many.
    uncounted: dict[str, int] = {}

    def add(self, event: Event, *, is_told: bool) -> int:
        """Keep an event, and return its number: 0 if it is not of those that are kept."""
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
        if is_told:
            self.told = self.last
        return self.last

    def confirm(self, number: int) -> None:
        """Forget all up to that one."""
        for events in (self.ends, self.denials):
            while events and (first := next(iter(events))) <= number:
                del events[first]

    def forget_end(self, sandbox: str) -> None:
        """There is one of that name anew: an end that is told late must not be taken for its own."""
        for number in [n for n, event in self.ends.items() if event.sandbox == sandbox]:
            del self.ends[number]

    def replay(self) -> Iterator[tuple[int, Event]]:
        """Return everything, for a supervisor that comes."""
        kept: list[tuple[int, Event]] = [*self.ends.items(), *self.denials.items()]
        yield from sorted(kept, key=lambda item: item[0])
        self.told = self.last
        uncounted, self.uncounted = self.uncounted, {}
        for sandbox, more in uncounted.items():
            yield 0, summarise(sandbox, more, "while no supervisor was there")

    def _drop_denial(self) -> None:
        number = next(iter(self.denials))
        event = self.denials.pop(number)
        if number > self.told:
            more = bool(event.kind) + event.more
            self.uncounted[event.sandbox] = self.uncounted.get(event.sandbox, 0) + more


def summarise(sandbox: str, more: int, when: str = "one by one") -> Denied:
    """Return an event that only tells how many refusals went unreported."""
    return Denied(
        sandbox=sandbox,
        bus="",
        direction="",
        kind="",
        peer="",
        reason=f"too many to report {when}",
        more=more,
    )
