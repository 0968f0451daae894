"""The state of one connection of a sandbox to a bus, shared by the two directions. No I/O.

Theory of operation. A connection has an app side and a bus side. `Filter` cuts both byte streams into
messages; what it has not seen before goes to `Outgoing`, `Driver` or `Incoming`, which judge it and
leave a memory in `fast`, so that the next message with the same header bytes costs one look-up.

Rule 1: whatever a remembered verdict depends on (rules, owners, identities, tags) calls `verdicts.forget_all`
when it changes, in the same step; or `verdicts.forget_about`, if that is a name's owner or what an owner is and has.
Rule 2: `pending` has one entry for each call that waits for a reply, whoever asked. An entry's `owner` is the one unique
name whose reply is let through without a second look; "" makes every reply take the slow path. Many entries may be one Target.
Rule 3: serials from OWN_SERIALS up are the gate's. An app's message that has one is given another.
Rule 4: a descriptor that came in is in exactly one place; whoever drops it closes it by `close_fds`.
Rule 5: what is known for longer than a turn of the loop is data, and in `dump`: another process may have to go on with it.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Final, Protocol

from broker.control_protocol.messages import SandboxLimits
from broker.gate.dumps import (
    ConnectionStateDump,
    ReplyAction,
)
from broker.gate.filter.bus_state import BusState
from broker.gate.filter.chores import Chores
from broker.gate.filter.denials import Denial
from broker.gate.filter.pending_calls import InterceptedCall, OwnersSince, PendingCalls
from broker.gate.filter.subscriptions import Subscriptions
from broker.gate.filter.verdict_cache import VerdictCache
from broker.gate.output import Chunk, Output
from broker.wire import marshal
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

    def note_from_app(self, data: bytes, pos: int, size: int) -> None:
        """Write down a known header of the app: the bytes that it is in, where it begins, how long it is."""

    def note_from_bus(self, data: bytes, pos: int, size: int) -> None:
        """Write down a known header of the bus."""

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


REPLY_SERIAL: Final = 0xFFFFFFFF  # of replies that the gate makes itself: no bus uses it
MAX_CALLERS: Final = 1024  # that are remembered: whoever called the app may be seen by it


# Gets what `ReplyAction` says, and the reply: header, whole message, descriptors.
ReplyHandler = Callable[[ReplyAction, Header, bytes, tuple[int, ...]], None]


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
        self.pending: Final = PendingCalls()
        self.verdicts: Final = VerdictCache()
        self.matches: Final = Subscriptions()
        self.chores: Final = Chores()
        # Names that the app has or waits for, and the number of its last request for each.
        self.requested_names: Final[dict[str, int]] = {}
        self.name_requests = 0  # so far
        self.callers: Final[OrderedDict[str, None]] = OrderedDict()
        self.counts_callers = False  # it is being asked which of them are still there
        # Who knows what to do with a reply to a Special call: by Then.kind. Each part of the connection
        # puts its own in.
        self.reply_handlers: Final[dict[str, ReplyHandler]] = {
            "ignore": _ignore,
            "translate": self._translate,
        }

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

    def call_driver(
        self,
        member: str,
        signature: str,
        values: Sequence[Value],
        action: ReplyAction,
    ) -> None:
        """Call the bus on this connection for the gate's own use."""
        serial = self.pending.next_gate_serial()
        self.pending.calls_to_bus[serial] = InterceptedCall(action, is_own=True)
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
        self, action: ReplyAction, reply: Header, data: bytes, fds: tuple[int, ...]
    ) -> None:
        """Do with the reply what is said."""
        self.reply_handlers[action.kind](action, reply, data, fds)

    def _translate(
        self, action: ReplyAction, reply: Header, data: bytes, fds: tuple[int, ...]
    ) -> None:
        (serial,) = action.values
        assert isinstance(serial, int)
        data = self.pending.give_serial_back(serial, reply, data)
        if action.after is None:
            self.deliver(data, fds)
        else:
            self.handle_reply(action.after, reply, data, fds)

    def refuse_caller(self, caller: str, serial: int, name: str, text: str) -> None:
        """Refuse a call to the app in the app's place."""
        self.to_bus.append(
            marshal.make_error(
                self.pending.next_gate_serial(),
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
        plain, calls = self.pending.dump_calls(changes_of)
        return ConnectionStateDump(
            unique_name=self.unique_name,
            greeting=self.greeting,
            plain=plain,
            calls=calls,
            translated_serials=tuple(sorted(self.pending.translated_serials)),
            calls_to_app=tuple(sorted(self.pending.calls_to_app)),
            matches=tuple((rule.canonical(), count) for rule, count in self.matches.items()),
            requested_names=tuple(self.requested_names.items()),
            name_requests=self.name_requests,
            callers=tuple(self.callers),
            counts_callers=self.counts_callers,
            next_gate_serial=self.pending.gate_serial,
        )

    def load(self, dump: ConnectionStateDump, since: Callable[[str, int], OwnersSince]) -> None:
        """Restore the state from `dump`. `since` makes what a call knows of a name's owners."""
        self.unique_name = dump.unique_name
        self.greeting = dump.greeting
        for call in dump.calls:
            self._check(call.action)
        self.pending.load(dump, since)
        for text, count in dump.matches:
            self.matches.add(parse_match_rule(text), count)
        self.requested_names.update(dump.requested_names)
        self.name_requests = dump.name_requests
        self.callers.update(dict.fromkeys(dump.callers))
        self.counts_callers = dump.counts_callers

    def _check(self, action: ReplyAction | None) -> None:
        """Raise ValueError if nobody here knows what to do with such a reply."""
        while action is not None:
            if action.kind not in self.reply_handlers:
                raise ValueError(f"a reply to be dealt with as {action.kind!r}")
            action = action.after


def _ignore(_action: ReplyAction, _reply: Header, _data: bytes, _fds: tuple[int, ...]) -> None:
    """It makes no difference what was answered."""
