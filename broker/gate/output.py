"""Messages on their way out of a connection, in order. No I/O."""

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
    """Bytes that must begin a write of their own, with the descriptors that go with them."""

    data: bytes | memoryview
    fds: tuple[int, ...]


Output = list[bytes | Chunk]


def descriptors_of(output: Iterable[bytes | Chunk]) -> list[int]:
    """Return the descriptors of messages that will not be sent: the caller closes them."""
    return [fd for item in output if isinstance(item, Chunk) for fd in item.fds]
