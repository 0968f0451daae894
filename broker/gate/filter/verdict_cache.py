"""Remembered verdicts, by the bytes of a header and the names they rest on. No I/O."""

from typing import TYPE_CHECKING, Any, Final, TypeVar

from broker.wire.fixed_header import CALLS, MUTE_CALLS, SIGNALS
from broker.wire.header import Header

if TYPE_CHECKING:
    from broker.gate.filter.denials import Denial
    from broker.gate.filter.pending_calls import Replier

# Remembered verdicts of one table, and the size of the longest remembered header: 256 KiB at the most.
MAX_REMEMBERED: Final = 512
MAX_REMEMBERED_BYTES: Final = 512
# Links from names to verdicts of one table. Some are to forgotten verdicts.
MAX_LINKS: Final = 4 * MAX_REMEMBERED

# The links of tables without any, as most of a connection's tables stay. It is never changed.
_NOTHING: Final[dict[str, set[bytes]]] = {}

Remembered = TypeVar("Remembered")


class VerdictTable(dict[bytes, Remembered]):
    """Verdicts of a kind, by the field array of the header.

    A change of rules or header fields calls `clear`. Owners of names change all the time, and other programs change
    them. So `forget_about` removes the verdicts that rest on some names and leaves the others.
    """

    __slots__ = ("_links", "_resting")

    def __init__(self) -> None:
        super().__init__()
        self._resting: dict[str, set[bytes]] = _NOTHING
        self._links = 0

    def remember(self, key: bytes, value: Remembered, *names: str) -> None:
        """Remember a verdict that rests on the owners of these names and on all their names; within bounds."""
        if len(key) > MAX_REMEMBERED_BYTES:
            return
        if len(self) >= MAX_REMEMBERED or self._links + len(names) > MAX_LINKS:
            self.clear()
        self[key] = value
        if names and self._resting is _NOTHING:
            self._resting = {}
        for name in names:
            self._resting.setdefault(name, set()).add(key)
        self._links += len(names)

    def forget_about(self, *names: str) -> None:
        """Forget the verdicts that rest on any of these names."""
        if self._resting:
            for name in names:
                for key in self._resting.pop(name, ()):
                    self.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self._resting = _NOTHING
        self._links = 0


# First words of a header (byte order, type, flags, version), and the index of their table in `app_tables` and `bus_tables`.
KINDS: Final[dict[int, int]] = {
    **dict.fromkeys(CALLS, 0),
    **dict.fromkeys(MUTE_CALLS, 1),
    **dict.fromkeys(SIGNALS, 2),
}


class VerdictCache:
    """The remembered verdicts of a connection.

    Messages are looked up by the first word of the header in `KINDS`, then by the field array in the table of
    `app_tables` or `bus_tables` with that index.

    Replies of one sender have one shape: the field array without the four bytes of REPLY_SERIAL. `bus_reply_at` and
    `app_reply_at` tell by the length of the array where those are. `bus_replies` and `app_replies` give the sender, or
    the destination, by the shape.
    """

    __slots__ = (
        *("app_calls", "app_mute", "app_signals"),
        *("bus_calls", "bus_mute", "bus_signals", "bus_refused"),
        *("tables", "app_tables", "bus_tables"),
        *("app_replies", "app_reply_at", "bus_replies", "bus_reply_at"),
    )

    def __init__(self) -> None:
        self.app_calls: Final[VerdictTable[Replier]] = VerdictTable()  # -> who may reply
        self.app_mute: Final[VerdictTable[bool]] = VerdictTable()  # calls that want no reply
        self.app_signals: Final[VerdictTable[bool]] = VerdictTable()
        self.bus_calls: Final[VerdictTable[str]] = VerdictTable()  # -> caller
        self.bus_mute: Final[VerdictTable[str]] = VerdictTable()  # -> sender
        self.bus_signals: Final[VerdictTable[str]] = VerdictTable()
        self.bus_refused: Final[VerdictTable[Denial]] = VerdictTable()  # broadcasts
        self.app_tables: Final[tuple[VerdictTable[Any], ...]] = (
            *(self.app_calls, self.app_mute, self.app_signals),
        )
        self.bus_tables: Final[tuple[VerdictTable[str], ...]] = (
            *(self.bus_calls, self.bus_mute, self.bus_signals),
        )
        self.tables: Final[tuple[VerdictTable[Any], ...]] = (
            *(*self.app_tables, *self.bus_tables, self.bus_refused),
        )
        self.bus_reply_at: Final[dict[int, int]] = {}
        self.bus_replies: Final[dict[bytes, str]] = {}
        self.app_reply_at: Final[dict[int, int]] = {}
        self.app_replies: Final[dict[bytes, str]] = {}

    def forget_all(self) -> None:
        """Judge everything anew."""
        for table in self.tables:
            table.clear()
        self.app_replies.clear()

    def forget_about(self, *names: str) -> None:
        """Judge anew the messages to and from present and former owners of these names."""
        for table in self.tables:
            table.forget_about(*names)


def remember_shape(
    shapes: dict[bytes, str], positions: dict[int, int], header: Header, data: bytes, peer: str
) -> None:
    """Remember the shape of replies from or to this peer, within bounds.

    All shapes of one length lack the bytes at the same position. Otherwise a reply could be forged that looks like one of
    the shapes with other bytes left out.
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
