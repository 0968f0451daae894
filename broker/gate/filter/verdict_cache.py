"""Remembered verdicts, by the bytes of a header and the names they rest on. No I/O."""

from typing import Final, TypeVar

from broker.wire.header import Header

# Remembered verdicts a table, and the longest header worth remembering: 256 KiB at the most.
MAX_REMEMBERED: Final = 512
MAX_REMEMBERED_BYTES: Final = 512
# From names to verdicts, a table. Some are of verdicts that are forgotten.
MAX_LINKS: Final = 4 * MAX_REMEMBERED

Remembered = TypeVar("Remembered")


class VerdictTable(dict[bytes, Remembered]):
    """Verdicts of one kind, by the field array of the header.

    Whatever else they rest on (rules, tags) calls `clear` when it changes. The owners of names change all the time, and
    by the doing of others: `forget_about` takes away what rests on them and leaves the rest.
    """

    __slots__ = ("_links", "_resting")

    def __init__(self) -> None:
        super().__init__()
        self._resting: Final[dict[str, set[bytes]]] = {}
        self._links = 0

    def remember(self, key: bytes, value: Remembered, *names: str) -> None:
        """Remember a verdict that rests on who has these names, and what else they have; within bounds."""
        if len(key) > MAX_REMEMBERED_BYTES:
            return
        if len(self) >= MAX_REMEMBERED or self._links + len(names) > MAX_LINKS:
            self.clear()
        self[key] = value
        for name in names:
            self._resting.setdefault(name, set()).add(key)
        self._links += len(names)

    def forget_about(self, *names: str) -> None:
        """Forget what rests on any of these names."""
        for name in names:
            for key in self._resting.pop(name, ()):
                self.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self._resting.clear()
        self._links = 0


def remember_shape(
    shapes: dict[bytes, str], positions: dict[int, int], header: Header, data: bytes, peer: str
) -> None:
    """Remember what replies from or to this peer look like, within bounds.

    All shapes of one length lack the bytes at the same place. Otherwise a reply could be made that looks
    like one of them with other bytes left out, and says something else.
    """
    at = header.reply_serial_at
    shape = data[12:at] + data[at + 4 : header.size]
    if len(shape) > MAX_REMEMBERED_BYTES:
        return
    if positions.get(header.size, at) != at:
        for known in [known for known in shapes if len(known) == len(shape)]:
            del shapes[known]
    positions[header.size] = at
    if len(shapes) >= MAX_REMEMBERED:
        shapes.clear()
    shapes[shape] = peer
