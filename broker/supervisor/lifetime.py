"""Whose end a sandbox follows. Pure.

One that has a close-notification pipe ends with that, at the gate, whatever becomes of us. Else it stops
listening when the connection that created it leaves its bus, unless it was told to outlive it.
"""

from collections.abc import Iterator
from typing import Final

from broker.supervisor.registry import Record, SandboxId


def follows_creator(record: Record) -> bool:
    """Say whether it stops listening when its creator leaves."""
    return not record.close_notify and not record.keep_after_creator


class Creators:
    """The sandboxes that follow somebody: (bus, unique name) -> their ids."""

    def __init__(self) -> None:
        self._followers: Final[dict[tuple[str, str], dict[SandboxId, None]]] = {}

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(list(self._followers))

    def add(self, record: Record) -> bool:
        """Note a sandbox; say whether it follows its creator."""
        if not follows_creator(record):
            return False
        self._followers.setdefault((record.creator_bus, record.creator), {})[record.id] = None
        return True

    def remove(self, record: Record) -> bool:
        """Forget a sandbox; say whether it was noted."""
        key = (record.creator_bus, record.creator)
        followers = self._followers.get(key, {})
        if record.id not in followers:
            return False
        del followers[record.id]
        if not followers:
            del self._followers[key]
        return True

    def left(self, bus: str, unique_name: str) -> tuple[SandboxId, ...]:
        """Return, once, who followed this connection."""
        return tuple(self._followers.pop((bus, unique_name), ()))
