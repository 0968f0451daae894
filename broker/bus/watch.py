"""Watches of names on a bus: callbacks run once when a watched name loses its owner.

Each watched name has a match rule of its own, counted. So a busy bus does not wake the supervisor
for the owner changes of other names.
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
        """Send a call that wants no reply."""

    async def call(
        self, target: Destination, member: str, signature: str = "", values: Sequence[object] = ()
    ) -> list[Any]:
        """Return the values of the reply."""


class NameWatch:
    """The watched names of a bus. The owner passes every signal to `take`."""

    def __init__(self, bus: Caller) -> None:
        self.on_gone: Callable[[str], None] = _ignore
        self.on_caller_gone: Callable[[str], None] = _ignore
        self._bus: Final = bus
        self._counts: Final[dict[str, int]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._counts

    def add(self, name: str) -> None:
        """Watch a name. Calls sent to the bus later are answered after the watch has begun."""
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        if count == 0:
            self._send("AddMatch", name)

    def discard(self, name: str) -> None:
        """Undo one `add`.

        Names without a watch are ignored, because the owner may be gone already.
        """
        count = self._counts.pop(name, 0)
        if count > 1:
            self._counts[name] = count - 1
        elif count == 1:
            self._send("RemoveMatch", name)

    def take(self, signal: Signal) -> None:
        """Handle a signal."""
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
        """Look for names whose owner was already gone when the watch began."""
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
        # A lost bus reports no more changes. The next connection gets a watch of its own.
        with contextlib.suppress(BusLostError):
            self._bus.send(BUS_DRIVER, member, "s", [_match(name)])


def _ignore(_name: str) -> None:
    pass


def _match(name: str) -> str:
    return (
        f"type='signal',sender='{DRIVER}',interface='{DRIVER}',member='NameOwnerChanged',"
        f"arg0='{name}',arg2=''"
    )
