"""What one connection takes of its sandbox's limits. No I/O."""

from broker.gate.control import Use
from broker.gate.filter import Filter


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
