"""Wishes of connections for header field 10 on messages from sandboxes.

A wish is answered as soon as no message without the field is under way any more. For that, the gate
asks the bus a question on each connection (filter/read_barrier.py). So wishes are handled in
rounds, a few per second. A wish that comes during a round is handled in the next round.

    service      gate                                  bus
     | wishes --> | tags all messages from now on       |
     |            | -- GetId, on each connection -----> | (has read all earlier messages)
     |            | <--------------------- answers ---- |
     | <-- Done   |
"""

from collections.abc import Callable
from functools import partial
from typing import Final

from broker.control_protocol.messages import Answer, Done, Refused
from broker.gate.filter.bus_state import BusState
from broker.gate.io.loop import Loop
from broker.wire import errors

# Seconds for a bus to read all messages of sandboxes. A caller waits longer for an answer.
BARRIER_SECONDS: Final = 5.0
# Seconds from the end of a round to the next round.
PAUSE: Final = 0.1
# The waiting requests of the supervisor, by unique name.
Wishes = dict[str, list[int]]


class InstanceFieldRounds:
    """The unanswered wishes on all buses."""

    def __init__(self, loop: Loop, answer: Callable[[int, Answer], None]) -> None:
        self._loop: Final = loop
        self._answer: Final = answer
        self._rounds: Final[dict[BusState, Wishes]] = {}
        self._next: Final[dict[BusState, Wishes]] = {}
        self._resting: Final[set[BusState]] = set()
        self._number = 0  # of the last round

    def wish(self, bus: BusState, unique_name: str, serial: int) -> None:
        """Answer the request as soon as all messages to that connection have the field."""
        current = self._rounds.get(bus, {})
        if unique_name in current:
            current[unique_name].append(serial)
        elif unique_name in bus.wants_instance_field:
            self._answer(serial, Done())
        else:
            self._next.setdefault(bus, {}).setdefault(unique_name, []).append(serial)
            self._begin(bus)

    def take_back(self, bus: BusState, unique_name: str) -> None:
        """Stop tagging for a connection. Remembered verdicts stay valid."""
        bus.wants_instance_field.discard(unique_name)
        for serial in self._next.get(bus, {}).pop(unique_name, []):
            self._answer(serial, Done())

    def give_up(self, text: str) -> None:
        """Refuse all waiting wishes. The supervisor has to ask again."""
        for bus in {*self._rounds, *self._next}:
            bus.barriers.clear()
            self._refuse(bus, self._rounds.pop(bus, {}), text)
            self._refuse(bus, self._next.pop(bus, {}), text)

    def _begin(self, bus: BusState) -> None:
        if bus in self._rounds or bus in self._resting or not self._next.get(bus):
            return
        wishes = self._rounds[bus] = self._next.pop(bus)
        bus.wants_instance_field.update(wishes)
        for member in bus.members:
            member.forget_all()
        self._number += 1
        number = self._number
        self._loop.call_later(BARRIER_SECONDS, partial(self._too_long, bus, number))
        if bus.connections:  # Without connections the round ends at once.
            self._resting.add(bus)
            self._loop.call_later(PAUSE, partial(self._rested, bus))
        bus.wait_read(number, partial(self._passed, bus, number))

    def _rested(self, bus: BusState) -> None:
        self._resting.discard(bus)
        self._begin(bus)

    def _passed(self, bus: BusState, number: int) -> None:
        if bus.barriers.pop(number, None) is None:
            return
        for serials in self._rounds.pop(bus).values():
            for serial in serials:
                self._answer(serial, Done())
        self._begin(bus)

    def _too_long(self, bus: BusState, number: int) -> None:
        if (barrier := bus.barriers.pop(number, None)) is None:
            return
        names = ", ".join(sorted(barrier.names)[:3])
        text = f"bus {bus.name} has not read all messages of {names} yet: try again"
        self._refuse(bus, self._rounds.pop(bus), text)
        self._begin(bus)

    def _refuse(self, bus: BusState, wishes: Wishes, text: str) -> None:
        """Refuse wishes whose connections may still receive messages without the field."""
        bus.wants_instance_field.difference_update(wishes)
        for serials in wishes.values():
            for serial in serials:
                self._answer(serial, Refused(errors.NO_REPLY, text))
