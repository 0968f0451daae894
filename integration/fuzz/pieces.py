"""How a harness makes something of an input: numbers from its beginning, pieces of the rest."""

from collections.abc import Sequence
from typing import Final


class Choices:
    """Takes from the beginning of an input; where that has ended all is 0 and empty."""

    def __init__(self, data: bytes) -> None:
        self._data: Final = data
        self._at = 0

    @property
    def ended(self) -> bool:
        """True when nothing is left."""
        return self._at >= len(self._data)

    def byte(self) -> int:
        """Take a byte."""
        return (self.take(1) or b"\0")[0]

    def take(self, size: int) -> bytes:
        """Take up to so many bytes."""
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        """Take all that is left."""
        return self.take(len(self._data))


def cut(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """Return pieces of these sizes, again and again. A size of 0 is an empty piece."""
    if not any(sizes):
        return [data]
    found = []
    at = turn = 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        found.append(data[at : at + size])
        at += size
        turn += 1
    return found


def text_of(data: bytes) -> str:
    """Return the text of an input. What is no UTF-8 is left out: the reader before has refused it."""
    return data.decode("utf-8", "ignore")
