"""What connections take of their sandbox's limits. No I/O."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

from broker.gate.control import Use
from broker.gate.filter import Filter


class Reader(Protocol):
    """A connection, by what its app has not read."""

    @property
    def behind(self) -> int:
        """Bytes that wait for it, if they are of more than one message."""


AnyReader = TypeVar("AnyReader", bound=Reader)


def find_too_far_behind(readers: Iterable[AnyReader], most: int) -> AnyReader | None:
    """Return the one that is most behind if more than `most` bytes wait for all together."""
    behind = {reader: reader.behind for reader in readers}
    return max(behind, key=behind.__getitem__) if sum(behind.values()) > most else None


def connection_use(judging: Filter | None, *, queued: int, fds: int) -> Use:
    """Return it. Without a filter it is in its handshakes."""
    if judging is None:
        return Use(connections=1, handshake_seconds=1)
    core = judging.core
    return Use(
        connections=1,
        bytes_queued=queued,
        pending_calls=len(core.pending) + len(core.asked),
        match_rules=core.match_count,
        names=len(core.requested_names),
        tracked_names=judging.tracked_names,
        fds=fds,
        handshake_seconds=not core.unique_name,
        message_seconds=bool(judging.from_app.unfinished),
    )
