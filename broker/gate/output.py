"""Outgoing messages of a connection, in order. No I/O."""

from collections import deque
from collections.abc import Iterable
from typing import Any, Final, NamedTuple, NoReturn


class _EmptyQueue(deque[Any]):
    """A queue that stays empty."""

    __slots__ = ()

    def append(self, _item: object) -> NoReturn:
        raise AssertionError("the shared empty queue must be replaced, not filled")

    extend = append


# The shared queue of connections without queued messages. Even an empty deque takes 760 bytes, and
# each connection has four queues. So a connection makes a separate deque only before the first
# `append`.
EMPTY_QUEUE: Final[deque[Any]] = _EmptyQueue()


class Chunk(NamedTuple):
    """Bytes that must begin a separate write, with the descriptors to send along."""

    data: bytes | memoryview
    fds: tuple[int, ...]


Output = list[bytes | Chunk]


def descriptors_of(output: Iterable[bytes | Chunk]) -> list[int]:
    """Return the descriptors of messages that will not be sent, for the caller to close."""
    return [fd for item in output if isinstance(item, Chunk) for fd in item.fds]
