"""Waiting until a bus has read all that sandboxes have sent so far. No I/O.

Each connection asks the bus something behind what it sent; a bus deals with a connection's messages in order. One that
is closed meanwhile has been read when the bus lets go of it.
"""

from collections.abc import Callable, Iterable
from typing import Final

# What a connection's question is for: see handover.Then.
KIND: Final = "passed"


class Barrier:
    """Connections that the bus may not have read yet, by unique name; `passed` is called when it has read all."""

    def __init__(self, names: Iterable[str], passed: Callable[[], None]) -> None:
        self.names: Final = set(names)
        self._passed: Final = passed

    def take(self, unique_name: str) -> None:
        """Note that the bus has read what one had sent."""
        if unique_name in self.names:
            self.names.discard(unique_name)
            self.check()

    def check(self) -> None:
        """Be passed, if the bus has read all."""
        if not self.names:
            self._passed()
