"""The part of a connection that stands between the app and its bus, as the connection uses it.

A `Filter` judges every message. The proxy's `PassthroughFilter` passes them on.
"""

from collections.abc import Sequence
from typing import Protocol

from broker.gate.dumps import Fds, FilterDump
from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.receive_buffer import ReceiveBuffer
from policy.match import Judge


class Mediator(Protocol):
    """Bytes and descriptors in, bytes and descriptors out, in `state.to_bus` and `state.to_app`."""

    held: bool  # do not read from the app
    yielded: bool  # call `resume_reading` in a later turn
    spent: int  # the cost of the app's messages since the caller last took it away
    answered: int  # the cost of the replies to them
    billed: float  # seconds that the bus's messages took and their senders paid for

    @property
    def state(self) -> ConnectionState: ...

    @property
    def from_app(self) -> ReceiveBuffer: ...

    @property
    def fds(self) -> int:
        """The number of descriptors that wait here."""

    @property
    def tracked_names(self) -> int:
        """The number of names that are followed only because the app wrote to them."""

    @property
    def is_changing(self) -> bool:
        """Return whether the app has still to be told of a change of rules."""

    @property
    def bus_is_clear(self) -> bool:
        """Return whether nothing from the bus waits."""

    @property
    def fits_rules(self) -> bool:
        """Return whether the followed names are those of the rules."""

    def feed_app(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes from the app. Raises PeerProtocolError or PeerQuotaError: end the connection."""

    def feed_bus(self, arrived: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes from the bus. Raises PeerProtocolError or PeerQuotaError: end the connection."""

    def resume_reading(self) -> None:
        """Continue after a yield. Raises as `feed_app` does."""

    def do_chores(self) -> None:
        """Do a slice of the chores. Raises as `feed_bus` does."""

    def change_rules(self, judge: Judge) -> None:
        """Judge every message from now on by these rules."""

    def close(self) -> list[int]:
        """Return every descriptor that is still here: the caller closes them."""

    def dump(self, fds: Fds) -> FilterDump:
        """Return the state, with descriptors as indexes. Raises HandoverError."""

    def load(self, dump: FilterDump, fds: Sequence[int]) -> None:
        """Restore the state from `dump`. Raises ValueError."""
