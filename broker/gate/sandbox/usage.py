"""What connections take of their sandbox's limits. No I/O."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

from broker.control_protocol.messages import Usage
from broker.gate.sandbox.mediator import Mediator
from broker.wire.errors import PeerQuotaError


class Reader(Protocol):
    """A connection, by what its app has not read."""

    @property
    def queued(self) -> int:
        """Bytes that wait for it."""

    @property
    def behind(self) -> int:
        """The same, if they are of more than one message."""

    def failed(self, exc: Exception) -> None:
        """End as the exception says."""


AnyReader = TypeVar("AnyReader", bound=Reader)


def find_slowest_reader(readers: Iterable[AnyReader], most: int) -> AnyReader | None:
    """Return the one that is most behind if more than `most` bytes wait for all together.

    One message of any size may always wait, for one of them: of those that only one waits for the largest does not count.
    """
    waiting = {reader: reader.queued for reader in readers}
    alone = [reader for reader in waiting if not reader.behind]
    if alone:
        del waiting[max(alone, key=waiting.__getitem__)]
    return max(waiting, key=waiting.__getitem__) if sum(waiting.values()) > most else None


def end_slowest_reader(reader: Reader, readers: Iterable[Reader], most: int) -> None:
    """End that one, if there is one. Raises PeerQuotaError if it is `reader`."""
    worst = find_slowest_reader(readers, most)
    if worst is not None:
        exc = PeerQuotaError("does not read what it is sent")
        if worst is reader:
            raise exc
        worst.failed(exc)


def connection_usage(judging: Mediator | None, *, queued: int, fds: int) -> Usage:
    """Return it. Without a filter it is in its handshakes."""
    if judging is None:
        return Usage(connections=1, handshake_seconds=1)
    state = judging.state
    return Usage(
        connections=1,
        bytes_queued=queued,
        pending_calls=len(state.pending.calls_to_bus) + len(state.pending.calls_to_app),
        match_rules=state.matches.count,
        names=len(state.requested_names),
        tracked_names=judging.tracked_names,
        fds=fds,
        handshake_seconds=not state.unique_name,
        message_seconds=bool(judging.from_app.unfinished),
    )
