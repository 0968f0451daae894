"""The calls of one connection that wait for a reply: their serials, and who may answer them. No I/O.

A name that changes hands again and again must not cost a look at each call that waits for its owner, of which there
may be thousands. So a change is written down once, and a call knows from where on it has to read.
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
MAX_FORMER_OWNERS: Final = 64  # that one waiting call is followed through


class Replier:
    """Who may reply to a call: a unique name, or a well-known one with its present owner."""

    __slots__ = ("former", "name", "owner")

    def __init__(self, owner: str, name: str = "", former: Collection[str] = frozenset()) -> None:
        self.owner = owner
        self.name = name  # the well-known name that was addressed, if one was
        self.former = former  # who else owned that name since the call


class InterceptedCall:
    """A call whose reply is not simply passed on: `then` says what is done with it."""

    __slots__ = ("action", "former", "is_own", "name", "owner", "replier")

    def __init__(
        self, action: ReplyAction, replier: "Replier | None" = None, *, is_own: bool = False
    ) -> None:
        self.owner = ""  # never equal to a sender
        self.name = ""
        self.former: Collection[str] = frozenset()
        self.replier = replier if replier is not None else BUS_DRIVER
        self.action = action
        self.is_own = is_own  # a call of the gate, not of the app


BUS_DRIVER: Final = Replier(DRIVER)
NO_REPLIER: Final = Replier("")  # may reply: the call waits under another serial


class PendingCalls:
    """The calls of one connection that wait for a reply, in both directions."""

    __slots__ = ("calls_to_app", "calls_to_bus", "gate_serial", "translated_serials")

    def __init__(self) -> None:
        # Calls of the app and of the gate: serial -> who may reply.
        self.calls_to_bus: Final[dict[int, Replier | InterceptedCall]] = {}
        # Serials of the gate's range that calls of the app have: they wait under another.
        self.translated_serials: Final[set[int]] = set()
        # Calls to the app: (caller, serial).
        self.calls_to_app: Final[set[tuple[str, int]]] = set()
        self.gate_serial = FIRST_GATE_SERIAL  # the next one to try

    def awaits_reply(self, serial: int) -> bool:
        """Say whether a call of the app with this serial waits for its reply."""
        return serial in (
            self.calls_to_bus if serial < FIRST_GATE_SERIAL else self.translated_serials
        )

    def next_gate_serial(self) -> int:
        """Return a serial that no waiting call has."""
        for _ in range(LAST_SERIAL - FIRST_GATE_SERIAL):
            serial = self.gate_serial
            self.gate_serial = FIRST_GATE_SERIAL if serial == LAST_SERIAL else serial + 1
            if serial not in self.calls_to_bus:
                return serial
        raise PeerQuotaError("too many calls wait for a reply")

    def translated(self, serial: int, after: ReplyAction | None = None) -> ReplyAction:
        """Say that the reply is to be given the app's own serial back, which no other call has meanwhile."""
        if serial < FIRST_GATE_SERIAL:
            self.calls_to_bus[serial] = NO_REPLIER
        else:
            self.translated_serials.add(serial)
        return ReplyAction("translate", (serial,), after)

    def give_serial_back(self, serial: int, reply: Header, data: bytes) -> bytes:
        """Return a reply with the app's own serial, which other calls may have from now on."""
        if serial < FIRST_GATE_SERIAL:
            self.calls_to_bus.pop(serial, None)
        self.translated_serials.discard(serial)
        at = reply.reply_serial_at
        order: Literal["little", "big"] = "little" if reply.little else "big"
        return data[:at] + serial.to_bytes(4, order) + data[at + 4 :]

    def dump_calls(
        self, changes_of: Callable[[str], int]
    ) -> tuple[PlainCallsDump, tuple[CallDump, ...]]:
        """Return the calls that wait, in few bytes and steps each: how many they are is the app's choice."""
        plain = PlainCalls()
        others: list[CallDump] = []
        last: Replier | InterceptedCall | None = None
        dump, row, is_plain = ReplierDump(owner=""), (0, 0, 0), False
        for serial, entry in self.calls_to_bus.items():
            if entry is not last:  # many in a row are for one peer
                last, dump = entry, _dump_replier(entry, changes_of)
                is_plain = isinstance(entry, Replier)
                if is_plain:
                    row = (*plain.index(dump.owner, dump.name), dump.since)
            if is_plain:
                plain.add((serial, *row))
            else:
                action, is_own = (
                    (entry.action, entry.is_own)
                    if isinstance(entry, InterceptedCall)
                    else (None, False)
                )
                others.append(CallDump(serial=serial, replier=dump, action=action, is_own=is_own))
        return plain.dump(), tuple(others)

    def load(self, dump: ConnectionStateDump, since: Callable[[str, int], "OwnersSince"]) -> None:
        """Restore the calls from `dump`. `since` makes what a call knows of a name's owners."""
        self.calls_to_bus.update(_load_plain(dump.plain, since))
        for call in dump.calls:
            self.calls_to_bus[call.serial] = _load_call(call, since)
        self.translated_serials.update(dump.translated_serials)
        self.calls_to_app.update(dump.calls_to_app)
        self.gate_serial = dump.next_gate_serial


class OwnerHistory:
    """The last changes of one name's owner. It lives as long as a call does that may have to know of them."""

    __slots__ = ("__weakref__", "_changes", "count")

    def __init__(self, most: int) -> None:
        self._changes: Final[deque[tuple[str, str]]] = deque(maxlen=most)
        self.count = 0  # of all changes, those included that are forgotten

    @property
    def changes(self) -> tuple[tuple[str, str], ...]:
        """The changes that are not forgotten."""
        return tuple(self._changes)

    def restore(self, count: int, changes: Collection[tuple[str, str]]) -> None:
        """Restore what `count` and `changes` were."""
        self.count = count
        self._changes.extend(changes)

    def add(self, old: str, new: str) -> None:
        """Write a change down ("" is nobody)."""
        self._changes.append((old, new))
        self.count += 1

    def owners_since(self, count: int) -> Iterator[str]:
        """Return who owned it since there were so many changes, some maybe twice."""
        known = len(self._changes)
        for change in islice(self._changes, max(0, known - (self.count - count)), None):
            yield from filter(None, change)


class OwnersSince(Collection[str]):
    """The owners of a name since a call to it: they may answer the call, too."""

    __slots__ = ("_history", "count")

    def __init__(self, history: OwnerHistory, count: int | None = None) -> None:
        self._history: Final = history
        self.count: Final = history.count if count is None else count  # of the changes before

    def __contains__(self, owner: object) -> bool:
        return owner in {*self._history.owners_since(self.count)}

    def __iter__(self) -> Iterator[str]:
        return iter({*self._history.owners_since(self.count)})

    def __len__(self) -> int:
        return len({*self})


def _dump_replier(
    entry: Replier | InterceptedCall, changes_of: Callable[[str], int]
) -> ReplierDump:
    replier = entry.replier if isinstance(entry, InterceptedCall) else entry
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
            replier = made[key] = Replier(owners[owner], names[name])
            if replier.name:
                replier.former = since(replier.name, count)
        yield serial, replier


def _load_call(
    dump: CallDump, since: Callable[[str, int], OwnersSince]
) -> Replier | InterceptedCall:
    its = dump.replier
    replier = Replier(its.owner, its.name)
    if its.name:
        replier.former = since(its.name, its.since)
    return (
        replier
        if dump.action is None
        else InterceptedCall(dump.action, replier, is_own=dump.is_own)
    )
