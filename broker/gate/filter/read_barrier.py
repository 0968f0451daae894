"""A wait until the bus has read everything that sandboxes have sent so far. No I/O.

A bus handles the messages of a connection in order. So each connection sends a question after the app's messages,
and its answer proves that the bus has read them. A connection that closes meanwhile has been read when the bus
releases its unique name.
"""

from collections.abc import Callable, Iterable
from typing import Final

# The `ReplyAction.kind` of a connection's question.
KIND: Final = "read-barrier"


class Barrier:
    """The connections, by unique name, that the bus may not have read yet."""

    def __init__(self, names: Iterable[str], passed: Callable[[], None]) -> None:
        self.names: Final = set(names)
        self._passed: Final = passed

    def take(self, unique_name: str) -> None:
        """Remove a connection, all of whose messages the bus has read."""
        if unique_name in self.names:
            self.names.discard(unique_name)
            self.check()

    def check(self) -> None:
        """Call `passed` if no connection is left to wait for."""
        if not self.names:
            self._passed()
