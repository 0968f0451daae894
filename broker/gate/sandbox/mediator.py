"""Mediators between an app and a bus, as used by a connection.

A `Filter` judges every message. The proxy's `PassthroughFilter` passes on every message.
"""

from collections.abc import Sequence
from typing import Protocol

from broker.gate.dumps import Fds, FilterDump
from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.receive_buffer import ReceiveBuffer
from policy.match import Judge


class Mediator(Protocol):
    """A mediator that takes bytes and descriptors, and puts the result into its `state`.

    The caller sends `state.to_bus` and `state.to_app`.
    """

    held: bool  # the app must not be read
    yielded: bool  # `resume_reading` has to be called in a later turn
    spent: int  # the cost of the app's messages since the caller last reset `spent`
    answered: int  # the cost of the replies to these messages
    billed: float  # seconds spent on messages from the bus that the senders have paid for

    @property
    def state(self) -> ConnectionState: ...

    @property
    def from_app(self) -> ReceiveBuffer: ...

    @property
    def fds(self) -> int:
        """The number of descriptors in the mediator."""

    @property
    def tracked_names(self) -> int:
        """The number of names that are tracked only because of messages from the app."""

    @property
    def is_changing(self) -> bool:
        """Return whether a change of rules has still to be reported to the app."""

    @property
    def bus_is_clear(self) -> bool:
        """Return whether nothing from the bus waits."""

    @property
    def fits_rules(self) -> bool:
        """Return whether the tracked names are those of the rules."""

    def feed_app(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes from the app.

        Raises PeerProtocolError or PeerQuotaError, and the caller ends the connection.
        """

    def feed_bus(self, arrived: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes from the bus.

        Raises PeerProtocolError or PeerQuotaError, and the caller ends the connection.
        """

    def resume_reading(self) -> None:
        """Continue after a yield. Raises as `feed_app` does."""

    def do_chores(self) -> None:
        """Do a slice of the chores. Raises as `feed_bus` does."""

    def change_rules(self, judge: Judge) -> None:
        """Judge every message from now on by these rules."""

    def close(self) -> list[int]:
        """Return all remaining descriptors, which the caller closes."""

    def dump(self, fds: Fds) -> FilterDump:
        """Return the state, with descriptors as indexes. Raises HandoverError."""

    def load(self, dump: FilterDump, fds: Sequence[int]) -> None:
        """Restore the state from `dump`. Raises ValueError."""
