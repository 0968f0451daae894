"""Messages to be sent on a connection, in order. No I/O."""

from collections import deque
from collections.abc import Iterable
from typing import Any, Final, NamedTuple, NoReturn


class _EmptyQueue(deque[Any]):
    """A queue that stays empty."""

    __slots__ = ()

    def append(self, _item: object) -> NoReturn:
        raise AssertionError("the shared empty queue is to be replaced, not filled")

    extend = append


# The queue of a connection that has nothing to queue. A deque takes 760 bytes even when it is empty, and each connection
# has four. So a queue begins as this one, and `append` is called on one of its own.
EMPTY_QUEUE: Final[deque[Any]] = _EmptyQueue()


class Chunk(NamedTuple):
    """Bytes that begin a write, because descriptors go with the first byte."""

    data: bytes | memoryview
    fds: tuple[int, ...]


Output = list[bytes | Chunk]


def descriptors_of(output: Iterable[bytes | Chunk]) -> list[int]:
    """Return the descriptors of messages that will not be sent. The caller closes the descriptors."""
    return [fd for item in output if isinstance(item, Chunk) for fd in item.fds]
