"""Watching names on a bus: who asked is told once when a name loses its owner.

One match rule a name, counted, so that a busy bus does not wake us for everybody's comings and goings.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from broker.bus.connection import BUS_DRIVER, Destination, Signal
from broker.bus.message_bus import BusLostError
from broker.wire.interfaces import DRIVER


class Caller(Protocol):
    """The part of a bus that a watch needs."""

    def send(
        self, target: Destination, member: str, signature: str = "", values: Sequence[object] = ()
    ) -> None:
        """Call without wanting a reply."""

    async def call(
        self, target: Destination, member: str, signature: str = "", values: Sequence[object] = ()
    ) -> list[Any]:
        """Return the values of the reply."""


class NameWatch:
    """The names that are watched on one bus. Give it every signal by `take`."""

    def __init__(self, bus: Caller) -> None:
        self.on_gone: Callable[[str], None] = _ignore
        self.on_caller_gone: Callable[[str], None] = _ignore
        self._bus: Final = bus
        self._counts: Final[dict[str, int]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._counts

    def add(self, name: str) -> None:
        """Watch a name. What is called on this bus afterwards is answered after the watch is on."""
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        if count == 0:
            self._send("AddMatch", name)

    def discard(self, name: str) -> None:
        """Undo one `add`. Names that are not watched are ignored: they may be gone already."""
        count = self._counts.pop(name, 0)
        if count > 1:
            self._counts[name] = count - 1
        elif count == 1:
            self._send("RemoveMatch", name)

    def take(self, signal: Signal) -> None:
        """Look at a signal."""
        if (
            signal.sender != DRIVER
            or signal.member != "NameOwnerChanged"
            or signal.signature != "sss"
        ):
            return
        name, _, new_owner = signal.values
        if not new_owner:
            self._gone(name)

    async def check(self) -> None:
        """Find out which names were gone already when they were added."""
        for name in list(self._counts):
            (has_owner,) = await self._bus.call(BUS_DRIVER, "NameHasOwner", "s", [name])
            if not has_owner:
                self._gone(name)

    def _gone(self, name: str) -> None:
        if self._counts.pop(name, 0):
            self._send("RemoveMatch", name)
            self.on_caller_gone(name)
            self.on_gone(name)

    def _send(self, member: str, name: str) -> None:
        # A bus that is lost tells nothing any more: there will be another watch on another connection.
        with contextlib.suppress(BusLostError):
            self._bus.send(BUS_DRIVER, member, "s", [_match(name)])


def _ignore(_name: str) -> None:
    pass


def _match(name: str) -> str:
    return (
        f"type='signal',sender='{DRIVER}',interface='{DRIVER}',member='NameOwnerChanged',"
        f"arg0='{name}',arg2=''"
    )
