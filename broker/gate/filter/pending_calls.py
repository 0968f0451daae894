"""The calls of a connection that wait for a reply: their serials and their repliers. No I/O.

Serials. The app and the gate share a connection, so their serials must not meet. The gate's are those from
FIRST_GATE_SERIAL up. A message of the app with such a serial is sent under another one, and the serial in the reply is
translated back:

    app                           gate                                                bus
     | call #0xFFF00001 ---------> | translated_serials: 0xFFF00001                    |
     |                             | calls_to_bus[0xFFF00007] = translate 0xFFF00001   |
     |                             | ------------------------------------------------> | call #0xFFF00007
     |                             | <------------------------------------------------ | return to #0xFFF00007
     | <- return to #0xFFF00001    | both entries are removed                          |

The bus may also send an error about a call that wanted no reply. So the gate's version of a call to the bus itself is
sent under a gate serial, too, unless its reply passes unchanged. The serial of the app stays taken meanwhile:

     | AddMatch #5 --------------> | calls_to_bus[5] = NO_REPLIER                      |
     |                             | calls_to_bus[0xFFF00008] = translate 5, add-match |
     |                             | ------------------------------------------------> | AddMatch #0xFFF00008
     | call #5 ------------------> | refused: a call with serial 5 waits               |

Former owners. A call to a well-known name may be answered by each owner that the name has until then. A name may
change its owner often, and thousands of calls may wait for it. So a change is recorded once, in the `OwnerHistory` of
the name, and each call knows the first change that concerns it.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import Final, Literal

from broker.gate.dumps import (
    CallDump,
    ConnectionStateDump,
    PlainCalls,
    PlainCallsDump,
    ReplierDump,
    ReplyAction,
    unpack_rows,
)
from broker.wire.errors import PeerQuotaError
from broker.wire.header import Header
from broker.wire.interfaces import DRIVER

FIRST_GATE_SERIAL: Final = 0xFFF00000
LAST_SERIAL: Final = 0xFFFFFFFE
# Owners of a name that may still answer a waiting call.
MAX_FORMER_OWNERS: Final = 64


class Replier:
    """The possible repliers to a call: a unique name, or a well-known name with its present owner."""

    __slots__ = ("former", "name", "owner")

    def __init__(self, owner: str, name: str = "", former: Collection[str] = frozenset()) -> None:
        self.owner = owner
        self.name = name  # the well-known name that was called, or ""
        self.former = former  # other owners of the name since the call


class InterceptedCall:
    """A call with a reply that the gate handles by `action` instead of passing it on."""

    __slots__ = ("action", "former", "is_own", "name", "owner", "replier")

    def __init__(
        self, action: ReplyAction, replier: "Replier | None" = None, *, is_own: bool = False
    ) -> None:
        self.owner = ""  # is no sender, so the reply takes the slow path
        self.name = ""
        self.former: Collection[str] = frozenset()
        self.replier = replier if replier is not None else BUS_DRIVER
        self.action = action
        self.is_own = is_own  # a call of the gate, not of the app


BUS_DRIVER: Final = Replier(DRIVER)
# Of a serial that is only kept from being used: the call waits under another one.
NO_REPLIER: Final = Replier("")


class PendingCalls:
    """The calls of a connection that wait for a reply, in both directions."""

    __slots__ = ("calls_to_app", "calls_to_bus", "gate_serial", "translated_serials")

    def __init__(self) -> None:
        # Calls of the app and of the gate, by serial.
        self.calls_to_bus: Final[dict[int, Replier | InterceptedCall]] = {}
        # Serials of the gate's range that the app used. The calls wait under other serials.
        self.translated_serials: Final[set[int]] = set()
        # Calls to the app: (caller, serial).
        self.calls_to_app: Final[set[tuple[str, int]]] = set()
        self.gate_serial = FIRST_GATE_SERIAL  # the next serial to try

    def awaits_reply(self, serial: int) -> bool:
        """Return whether a call of the app with this serial waits for its reply."""
        return serial in (
            self.calls_to_bus if serial < FIRST_GATE_SERIAL else self.translated_serials
        )

    def next_gate_serial(self) -> int:
        """Return a serial of the gate's range that no waiting call has."""
        for _ in range(LAST_SERIAL - FIRST_GATE_SERIAL):
            serial = self.gate_serial
            self.gate_serial = FIRST_GATE_SERIAL if serial == LAST_SERIAL else serial + 1
            if serial not in self.calls_to_bus:
                return serial
        raise PeerQuotaError("too many calls wait for a reply")

    def translated(self, serial: int, after: ReplyAction | None = None) -> ReplyAction:
        """Return the action that translates a reply back to the app's serial, and keep that serial taken.

        `after` is the action for the translated reply. Without one the reply is passed to the app.
        """
        if serial < FIRST_GATE_SERIAL:
            self.calls_to_bus[serial] = NO_REPLIER
        else:
            self.translated_serials.add(serial)
        return ReplyAction("translate", (serial,), after)

    def give_serial_back(self, serial: int, reply: Header, data: bytes) -> bytes:
        """Return a reply translated back to the app's serial, and free that serial."""
        if serial < FIRST_GATE_SERIAL:
            self.calls_to_bus.pop(serial, None)
        self.translated_serials.discard(serial)
        at = reply.reply_serial_at
        order: Literal["little", "big"] = "little" if reply.little else "big"
        return data[:at] + serial.to_bytes(4, order) + data[at + 4 :]

    def dump_calls(
        self, changes_of: Callable[[str], int]
    ) -> tuple[PlainCallsDump, tuple[CallDump, ...]]:
        """Return the calls to the bus, in few bytes and steps each, because the app chooses their number.

        `changes_of` returns how often a name has changed its owner so far.
        """
        plain = PlainCalls()
        others: list[CallDump] = []
        last: Replier | None = None
        row = (0, 0, 0)
        for serial, entry in self.calls_to_bus.items():
            if isinstance(entry, InterceptedCall):
                dump = _dump_replier(entry.replier, changes_of)
                others.append(
                    CallDump(serial=serial, replier=dump, action=entry.action, is_own=entry.is_own)
                )
                continue
            if entry is not last:  # calls in a row are often to one peer
                last, dump = entry, _dump_replier(entry, changes_of)
                row = (*plain.index(dump.owner, dump.name), dump.since)
            plain.add((serial, *row))
        return plain.dump(), tuple(others)

    def load(self, dump: ConnectionStateDump, since: Callable[[str, int], "OwnersSince"]) -> None:
        """Restore the calls from `dump`. `since` returns the owners of a name from one of its changes on."""
        self.calls_to_bus.update(_load_plain(dump.plain, since))
        for call in dump.calls:
            self.calls_to_bus[call.serial] = _load_call(call, since)
        self.translated_serials.update(dump.translated_serials)
        self.calls_to_app.update(dump.calls_to_app)
        self.gate_serial = dump.next_gate_serial


class OwnerHistory:
    """The last changes of a name's owner, kept alive by the calls that wait for the name."""

    __slots__ = ("__weakref__", "_changes", "count")

    def __init__(self, most: int) -> None:
        self._changes: Final[deque[tuple[str, str]]] = deque(maxlen=most)
        self.count = 0  # all changes so far, forgotten ones included

    @property
    def changes(self) -> tuple[tuple[str, str], ...]:
        """The remembered changes: the old and the new owner of each."""
        return tuple(self._changes)

    def restore(self, count: int, changes: Collection[tuple[str, str]]) -> None:
        """Restore the history from its `count` and `changes`."""
        self.count = count
        self._changes.extend(changes)

    def add(self, old: str, new: str) -> None:
        """Record a change; "" stands for no owner."""
        self._changes.append((old, new))
        self.count += 1

    def owners_since(self, count: int) -> Iterator[str]:
        """Return the owners from change number `count` on; an owner may come twice."""
        known = len(self._changes)
        for change in islice(self._changes, max(0, known - (self.count - count)), None):
            yield from filter(None, change)


class OwnersSince(Collection[str]):
    """The owners of a name since a call to it, who may also answer the call."""

    __slots__ = ("_history", "count")

    def __init__(self, history: OwnerHistory, count: int | None = None) -> None:
        self._history: Final = history
        self.count: Final = history.count if count is None else count  # the changes before the call

    def __contains__(self, owner: object) -> bool:
        return any(owner == each for each in self._history.owners_since(self.count))

    def __iter__(self) -> Iterator[str]:
        return iter({*self._history.owners_since(self.count)})

    def __len__(self) -> int:
        return len({*self})


def _dump_replier(replier: Replier, changes_of: Callable[[str], int]) -> ReplierDump:
    if isinstance(replier.former, OwnersSince):
        since = replier.former.count
    else:
        since = changes_of(replier.name) if replier.name else 0
    return ReplierDump(owner=replier.owner, name=replier.name, since=since)


def _load_plain(
    dump: PlainCallsDump, since: Callable[[str, int], OwnersSince]
) -> Iterator[tuple[int, Replier]]:
    owners, names = dump.owners, dump.names
    made: dict[tuple[int, int, int], Replier] = {}
    for serial, owner, name, count in unpack_rows(dump.rows):
        key = (owner, name, count)
        replier = made.get(key)
        if replier is None:
            replier = made[key] = _make_replier(owners[owner], names[name], count, since)
        yield serial, replier


def _load_call(dump: CallDump, since: Callable[[str, int], OwnersSince]) -> InterceptedCall:
    its = dump.replier
    return InterceptedCall(
        dump.action, _make_replier(its.owner, its.name, its.since, since), is_own=dump.is_own
    )


def _make_replier(
    owner: str, name: str, count: int, since: Callable[[str, int], OwnersSince]
) -> Replier:
    return Replier(owner, name, since(name, count) if name else frozenset())
