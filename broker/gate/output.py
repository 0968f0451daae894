"""Messages on their way out of a connection, in order. No I/O."""

from collections.abc import Iterable
from typing import NamedTuple


class Chunk(NamedTuple):
    """Bytes that must begin a write of their own, with the descriptors that go with them."""

    data: bytes | memoryview
    fds: tuple[int, ...]


Output = list[bytes | Chunk]


def descriptors_of(output: Iterable[bytes | Chunk]) -> list[int]:
    """Return the descriptors of messages that will not be sent: the caller closes them."""
    return [fd for item in output if isinstance(item, Chunk) for fd in item.fds]
