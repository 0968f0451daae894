"""The state of one connection of a sandbox to a bus, shared by the two directions. No I/O.

Theory of operation. A connection has an app side and a bus side. `Filter` cuts both byte streams into
messages; what it has not seen before goes to `Outgoing`, `Driver` or `Incoming`, which judge it and
leave a memory in `fast`, so that the next message with the same header bytes costs one look-up.

Rule 1: whatever a remembered verdict depends on (rules, owners, identities, tags) calls `forget_verdicts`
when it changes, in the same step; or `forget_about`, if that is a name's owner or what an owner is and has.
Rule 2: `pending` has one entry for each call that waits for a reply, whoever asked. An entry's `owner` is the one unique
name whose reply is let through without a second look; "" makes every reply take the slow path. Many entries may be one Target.
Rule 3: serials from OWN_SERIALS up are the gate's. An app's message that has one is given another.
Rule 4: a descriptor that came in is in exactly one place; whoever drops it closes it by `close_fds`.
Rule 5: what is known for longer than a turn of the loop is data, and in `dump`: another process may have to go on with it.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, Protocol

from broker.control_protocol.messages import SandboxLimits
from broker.gate.dumps import (
    CallDump,
    ConnectionStateDump,
    PlainCalls,
    PlainCallsDump,
    ReplierDump,
    ReplyAction,
    unpack_rows,
)
from broker.gate.filter.bus_state import BusState
from broker.gate.filter.chores import Chores
from broker.gate.filter.denials import Denial
from broker.gate.filter.pending_calls import OwnersSince
from broker.gate.filter.subscriptions import Subscriptions
from broker.gate.filter.verdict_cache import VerdictTable
from broker.gate.output import Chunk, Output
from broker.wire import marshal
from broker.wire.errors import PeerQuotaError
from broker.wire.header import Header
from broker.wire.interfaces import DRIVER, DRIVER_PATH
from broker.wire.marshal import Value
from broker.wire.matchrule import parse_match_rule
from policy.match import Judge
from policy.rules import Identity

# Write down a known header: the bytes that it is in, where it begins, how long it is.
KnownNote = Callable[[bytes, int, int], None]


class Recorder(Protocol):
    """Writes down the headers of messages, for whoever looks into the gate's death (recorder.py)."""

    @property
    def note_from_app(self) -> KnownNote:
        """Writes down a known message of the app."""

    @property
    def note_from_bus(self) -> KnownNote:
        """Writes down a known message of the bus."""

    def parse_from_app(self, data: bytes, pos: int) -> Header:
        """Write down and parse the header that begins at `pos`. Raises PeerProtocolError."""

    def parse_from_bus(self, data: bytes, pos: int) -> Header:
        """Write down and parse the header that begins at `pos`. Raises PeerProtocolError."""


class SandboxView(Protocol):
    """What the connection needs of the sandbox it belongs to."""

    bytes_held: int

    @property
    def id(self) -> str:
        """Its id, cN."""

    @property
    def identity(self) -> Identity:
        """Which app it is."""

    @property
    def limits(self) -> SandboxLimits:
        """What it may take."""

    @property
    def recorder(self) -> Recorder:
        """The recorder of its messages."""

    @property
    def states(self) -> Collection["ConnectionState"]:
        """Its connections, those in their handshakes left out."""

    def denied(self, state: "ConnectionState", denial: Denial) -> None:
        """Report a refusal."""

    def said_hello(self, state: "ConnectionState") -> None:
        """Register `state.unique_name`, before the app gets to know it."""

    def close_fds(self, fds: Sequence[int]) -> None:
        """Close descriptors."""


FIRST_GATE_SERIAL: Final = 0xFFF00000
LAST_SERIAL: Final = 0xFFFFFFFE
REPLY_SERIAL: Final = 0xFFFFFFFF  # of replies that the gate makes itself: no bus uses it
MAX_CALLERS: Final = 1024  # that are remembered: whoever called the app may be seen by it
MAX_FORMER_OWNERS: Final = 64  # that one waiting call is followed through


class Replier:
    """Who may reply to a call: a unique name, or a well-known one with its present owner."""

    __slots__ = ("former", "name", "owner")

    def __init__(self, owner: str, name: str = "", former: Collection[str] = frozenset()) -> None:
        self.owner = owner
        self.name = name  # the well-known name that was addressed, if one was
        self.former = former  # who else owned that name since the call


# Gets what `ReplyAction` says, and the reply: header, whole message, descriptors.
ReplyHandler = Callable[[ReplyAction, Header, bytes, tuple[int, ...]], None]


class InterceptedCall:
    """A call whose reply is not simply passed on: `then` says what is done with it."""

    __slots__ = ("former", "is_own", "name", "owner", "target", "then")

    def __init__(
        self, then: ReplyAction, target: "Replier | None" = None, *, is_own: bool = False
    ) -> None:
        self.owner = ""  # never equal to a sender
        self.name = ""
        self.former: Collection[str] = frozenset()
        self.target = target if target is not None else BUS_DRIVER
        self.then = then
        self.is_own = is_own  # a call of the gate, not of the app


BUS_DRIVER: Final = Replier(DRIVER)
NO_REPLIER: Final = Replier("")  # may reply: the call waits under another serial


class ConnectionState:
    """Everything both directions know."""

    def __init__(
        self, bus: BusState, sandbox: SandboxView, judge: Judge, *, app_takes_fds: bool
    ) -> None:
        self.bus: Final = bus
        self.sandbox: Final = sandbox
        self.judge = judge
        self.app_takes_fds: Final = app_takes_fds
        self.unique_name = ""
        self.greeting = False  # Hello is on its way
        self.to_bus: Final[Output] = []
        self.to_app: Final[Output] = []
        # Calls of the app and of the gate that wait for a reply: serial -> who may give it.
        self.calls_to_bus: Final[dict[int, Replier | InterceptedCall]] = {}
        # Serials of the gate's range that calls of the app have: they wait under another.
        self.translated_serials: Final[set[int]] = set()
        # Calls to the app that wait for its reply: (caller, serial).
        self.calls_to_app: Final[set[tuple[str, int]]] = set()
        self.matches: Final = Subscriptions()
        self.chores: Final = Chores()
        # Names that the app has or waits for, and the number of its last request for each.
        self.requested_names: Final[dict[str, int]] = {}
        self.name_requests = 0  # so far
        self.callers: Final[OrderedDict[str, None]] = OrderedDict()
        self.counts_callers = False  # it is being asked which of them are still there
        # Remembered verdicts, by the first header word (byte order, type, flags, version), then the field array.
        self.app_calls: Final[VerdictTable[Replier]] = VerdictTable()  # -> who may reply
        self.app_mute: Final[VerdictTable[bool]] = VerdictTable()  # calls that want no reply
        self.app_signals: Final[VerdictTable[bool]] = VerdictTable()
        self.bus_calls: Final[VerdictTable[str]] = VerdictTable()  # -> caller
        self.bus_mute: Final[VerdictTable[str]] = VerdictTable()  # -> sender
        self.bus_signals: Final[VerdictTable[str]] = VerdictTable()
        self.bus_refused: Final[VerdictTable[Denial]] = VerdictTable()  # broadcasts
        self.tables: Final[tuple[VerdictTable[Any], ...]] = (
            *(self.app_calls, self.app_mute, self.app_signals),
            *(self.bus_calls, self.bus_mute, self.bus_signals, self.bus_refused),
        )
        # Replies of one sender have one shape, the field array without the four bytes of REPLY_SERIAL:
        # length of the array -> where those are; shape -> sender (destination).
        self.bus_reply_at: Final[dict[int, int]] = {}
        self.bus_replies: Final[dict[bytes, str]] = {}
        self.app_reply_at: Final[dict[int, int]] = {}
        self.app_replies: Final[dict[bytes, str]] = {}
        self._next_gate_serial = FIRST_GATE_SERIAL
        # Who knows what to do with a reply to a Special call: by Then.kind. Each part of the connection
        # puts its own in.
        self.reply_handlers: Final[dict[str, ReplyHandler]] = {
            "ignore": _ignore,
            "translate": self._translate,
        }

    # -- remembered verdicts -----------------------------------------------------------------

    def forget_verdicts(self) -> None:
        """Judge everything anew."""
        for table in self.tables:
            table.clear()
        self.app_replies.clear()

    def forget_about(self, *names: str) -> None:
        """Judge anew what is to or from whoever has, or had, one of these names."""
        for table in self.tables:
            table.forget_about(*names)

    def stranger_appeared(self, unique_name: str) -> None:
        """Unique names can be guessed: a verdict may be older than the connection it is about."""
        self.forget_about(unique_name)

    # -- what the sandbox has in all ------------------------------------------------------------

    @property
    def all_match_rules(self) -> int:
        """How many match rules the connections of the sandbox have together."""
        return sum(state.matches.count for state in self.sandbox.states)

    @property
    def all_names(self) -> int:
        """How many names they own or wait for together."""
        return sum(len(state.requested_names) for state in self.sandbox.states)

    # -- serials and calls of the gate's own ------------------------------------------------------

    def awaits_reply(self, serial: int) -> bool:
        """Say whether a call of the app with this serial waits for its reply."""
        return serial in (
            self.calls_to_bus if serial < FIRST_GATE_SERIAL else self.translated_serials
        )

    def next_gate_serial(self) -> int:
        """Return a serial that no waiting call has."""
        for _ in range(LAST_SERIAL - FIRST_GATE_SERIAL):
            serial = self._next_gate_serial
            self._next_gate_serial = FIRST_GATE_SERIAL if serial == LAST_SERIAL else serial + 1
            if serial not in self.calls_to_bus:
                return serial
        raise PeerQuotaError("too many calls wait for a reply")

    def call_driver(
        self,
        member: str,
        signature: str,
        values: Sequence[Value],
        then: ReplyAction,
    ) -> None:
        """Call the bus on this connection for the gate's own use."""
        serial = self.next_gate_serial()
        self.calls_to_bus[serial] = InterceptedCall(then, is_own=True)
        self.to_bus.append(
            marshal.make_call(
                serial,
                destination=DRIVER,
                path=DRIVER_PATH,
                interface=DRIVER,
                member=member,
                signature=signature,
                values=values,
            )
        )

    # -- answers of the gate's own ----------------------------------------------------------------

    def answer(self, serial: int, signature: str = "", values: Sequence[Value] = ()) -> None:
        """Answer a call of the app in the bus's place."""
        self.to_app.append(
            marshal.make_return(
                REPLY_SERIAL,
                reply_serial=serial,
                destination=self.unique_name or None,
                sender=DRIVER,
                signature=signature,
                values=values,
            )
        )

    def answer_error(self, serial: int, name: str, text: str) -> None:
        """Refuse a call of the app in the bus's place."""
        self.to_app.append(
            marshal.make_error(
                REPLY_SERIAL,
                reply_serial=serial,
                name=name,
                text=text,
                destination=self.unique_name or None,
                sender=DRIVER,
            )
        )

    def deliver(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Pass a message to the app as it is."""
        self.to_app.append(Chunk(data, fds) if fds else data)

    def handle_reply(
        self, then: ReplyAction, reply: Header, data: bytes, fds: tuple[int, ...]
    ) -> None:
        """Do with the reply what is said."""
        self.reply_handlers[then.kind](then, reply, data, fds)

    def translated(self, serial: int, after: ReplyAction | None = None) -> ReplyAction:
        """Say that the reply is to be given the app's own serial back, which no other call has meanwhile."""
        if serial < FIRST_GATE_SERIAL:
            self.calls_to_bus[serial] = NO_REPLIER
        else:
            self.translated_serials.add(serial)
        return ReplyAction("translate", (serial,), after)

    def _translate(
        self, then: ReplyAction, reply: Header, data: bytes, fds: tuple[int, ...]
    ) -> None:
        (serial,) = then.values
        assert isinstance(serial, int)
        if serial < FIRST_GATE_SERIAL:
            self.calls_to_bus.pop(serial, None)
        self.translated_serials.discard(serial)
        at = reply.reply_serial_at
        order: Literal["little", "big"] = "little" if reply.little else "big"
        data = data[:at] + serial.to_bytes(4, order) + data[at + 4 :]
        if then.after is None:
            self.deliver(data, fds)
        else:
            self.handle_reply(then.after, reply, data, fds)

    def refuse_caller(self, caller: str, serial: int, name: str, text: str) -> None:
        """Refuse a call to the app in the app's place."""
        self.to_bus.append(
            marshal.make_error(
                self.next_gate_serial(),
                reply_serial=serial,
                name=name,
                text=text,
                destination=caller,
            )
        )

    def remember_caller(self, unique_name: str) -> None:
        """Remember a caller: the app may see it as long as it lives."""
        self.callers[unique_name] = None
        self.callers.move_to_end(unique_name)
        if len(self.callers) > MAX_CALLERS:
            self.callers.popitem(last=False)

    # -- handing over ---------------------------------------------------------------------------------

    def dump(self, changes_of: Callable[[str], int]) -> ConnectionStateDump:
        """Return all but the rules and what is remembered of them.

        `changes_of` tells how often a name has changed its owner so far.
        """
        plain, calls = _dump_calls(self.calls_to_bus, changes_of)
        return ConnectionStateDump(
            unique_name=self.unique_name,
            greeting=self.greeting,
            plain=plain,
            calls=calls,
            translated_serials=tuple(sorted(self.translated_serials)),
            calls_to_app=tuple(sorted(self.calls_to_app)),
            matches=tuple((rule.canonical(), count) for rule, count in self.matches.items()),
            requested_names=tuple(self.requested_names.items()),
            name_requests=self.name_requests,
            callers=tuple(self.callers),
            counts_callers=self.counts_callers,
            next_gate_serial=self._next_gate_serial,
        )

    def load(self, dump: ConnectionStateDump, since: Callable[[str, int], OwnersSince]) -> None:
        """Restore the state from `dump`. `since` makes what a call knows of a name's owners."""
        self.unique_name = dump.unique_name
        self.greeting = dump.greeting
        self.calls_to_bus.update(_load_plain(dump.plain, since))
        for call in dump.calls:
            self._check(call.then)
            self.calls_to_bus[call.serial] = _load_call(call, since)
        self.translated_serials.update(dump.translated_serials)
        self.calls_to_app.update(dump.calls_to_app)
        for text, count in dump.matches:
            self.matches.add(parse_match_rule(text), count)
        self.requested_names.update(dump.requested_names)
        self.name_requests = dump.name_requests
        self.callers.update(dict.fromkeys(dump.callers))
        self.counts_callers = dump.counts_callers
        self._next_gate_serial = dump.next_gate_serial

    def _check(self, then: ReplyAction | None) -> None:
        """Raise ValueError if nobody here knows what to do with such a reply."""
        while then is not None:
            if then.kind not in self.reply_handlers:
                raise ValueError(f"a reply to be dealt with as {then.kind!r}")
            then = then.after


def _dump_calls(
    pending: Mapping[int, Replier | InterceptedCall], changes_of: Callable[[str], int]
) -> tuple[PlainCallsDump, tuple[CallDump, ...]]:
    """Return the calls that wait, in few bytes and steps each: how many they are is the app's choice."""
    plain = PlainCalls()
    others: list[CallDump] = []
    last: Replier | InterceptedCall | None = None
    dump, row, is_plain = ReplierDump(owner=""), (0, 0, 0), False
    for serial, entry in pending.items():
        if entry is not last:  # many in a row are for one peer
            last, dump = entry, _dump_target(entry, changes_of)
            is_plain = isinstance(entry, Replier)
            if is_plain:
                row = (*plain.index(dump.owner, dump.name), dump.since)
        if is_plain:
            plain.add((serial, *row))
        else:
            then, is_own = (
                (entry.then, entry.is_own) if isinstance(entry, InterceptedCall) else (None, False)
            )
            others.append(CallDump(serial=serial, target=dump, then=then, is_own=is_own))
    return plain.dump(), tuple(others)


def _dump_target(entry: Replier | InterceptedCall, changes_of: Callable[[str], int]) -> ReplierDump:
    target = entry.target if isinstance(entry, InterceptedCall) else entry
    if isinstance(target.former, OwnersSince):
        since = target.former.count
    else:
        since = changes_of(target.name) if target.name else 0
    return ReplierDump(owner=target.owner, name=target.name, since=since)


def _load_plain(
    dump: PlainCallsDump, since: Callable[[str, int], OwnersSince]
) -> Iterator[tuple[int, Replier]]:
    owners, names = dump.owners, dump.names
    made: dict[tuple[int, int, int], Replier] = {}
    for serial, owner, name, count in unpack_rows(dump.rows):
        key = (owner, name, count)
        target = made.get(key)
        if target is None:
            target = made[key] = Replier(owners[owner], names[name])
            if target.name:
                target.former = since(target.name, count)
        yield serial, target


def _load_call(
    dump: CallDump, since: Callable[[str, int], OwnersSince]
) -> Replier | InterceptedCall:
    its = dump.target
    target = Replier(its.owner, its.name)
    if its.name:
        target.former = since(its.name, its.since)
    return target if dump.then is None else InterceptedCall(dump.then, target, is_own=dump.is_own)


def _ignore(_then: ReplyAction, _reply: Header, _data: bytes, _fds: tuple[int, ...]) -> None:
    """It makes no difference what was answered."""
