"""The state of a connection of a sandbox to a bus, shared by both directions. No I/O.

Theory of operation. A connection has an app side and a bus side. `Filter` cuts both byte streams into messages. A message
with a header that was not seen before goes to `AppMessages`, `BusDriverCalls` or `BusMessages`. They judge it and
remember the verdict in `verdicts`, so that the next message with the same header bytes costs one look-up:

    app                   gate                                            bus
     | call org.a.Do #5 -> | AppMessages judges: allowed                   |
     |                     | verdicts.app_calls[header] = Replier(:1.2)    |
     |                     | pending.calls_to_bus[5] = Replier(:1.2) ----> | call #5
     |                     | BusMessages judges: :1.2 may reply to #5 <--- | return to #5
     | return to #5 <----- | del pending.calls_to_bus[5]                   |
     | call org.a.Do #6 -> | Filter finds the header in app_calls -------> | call #6

Rule 1: a change of rules, identities or header fields calls `verdicts.forget_all` in the same step, because remembered
verdicts depend on them. A change of a name's owner, or of the names of an owner, calls `verdicts.forget_about`.
Rule 2: `pending.calls_to_bus` has one entry for each call that waits for a reply, whether the app or the gate made it.
The `owner` of an entry is the unique name whose reply passes on the fast path; with "" every reply takes the slow path.
Rule 3: serials from FIRST_GATE_SERIAL up are the gate's. An app's message with such a serial is given another.
Rule 4: a received descriptor is in exactly one place. The code that drops the descriptor closes it by `close_fds`.
Rule 5: state that lives longer than a turn of the loop is data, and is in `dump` for the next gate.
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

# Writes down a known header: `data`, the position of the header in it, the size of the header.
KnownNote = Callable[[bytes, int, int], None]


class Recorder(Protocol):
    """Writes down the headers of messages, for finding out how a gate died (recorder.py)."""

    @property
    def note_from_app(self) -> KnownNote:
        """Write down a known header of the app."""

    @property
    def note_from_bus(self) -> KnownNote:
        """Write down a known header of the bus."""

    def parse_from_app(self, data: bytes, pos: int) -> Header:
        """Write down and parse the header that begins at `pos`. Raises PeerProtocolError."""

    def parse_from_bus(self, data: bytes, pos: int) -> Header:
        """Write down and parse the header that begins at `pos`. Raises PeerProtocolError."""


class SandboxView(Protocol):
    """The sandbox of a connection, as the connection uses it."""

    bytes_held: int

    @property
    def id(self) -> str:
        """The id, cN."""

    @property
    def identity(self) -> Identity:
        """The app of the sandbox."""

    @property
    def limits(self) -> SandboxLimits:
        """The limits of the sandbox."""

    @property
    def recorder(self) -> Recorder:
        """The recorder of the sandbox's messages."""

    @property
    def states(self) -> Collection["ConnectionState"]:
        """The connections of the sandbox that are past their handshakes."""

    def denied(self, state: "ConnectionState", denial: Denial) -> None:
        """Report a refusal."""

    def said_hello(self, state: "ConnectionState") -> None:
        """Register `state.unique_name`, before the app gets to know it."""

    def close_fds(self, fds: Sequence[int]) -> None:
        """Close descriptors."""


# The serial of replies that the gate makes itself. No bus uses it.
REPLY_SERIAL: Final = 0xFFFFFFFF
# Remembered callers. The app may see the callers of its own objects.
MAX_CALLERS: Final = 1024

# Handles a reply: the action, then the header, the whole message and the descriptors of the reply.
ReplyHandler = Callable[[ReplyAction, Header, bytes, tuple[int, ...]], None]


class ConnectionState:
    """The state of a connection that both directions use."""

    def __init__(
        self, bus: BusState, sandbox: SandboxView, judge: Judge, *, app_takes_fds: bool
    ) -> None:
        self.bus: Final = bus
        self.sandbox: Final = sandbox
        self.judge = judge
        self.app_takes_fds: Final = app_takes_fds
        self.unique_name = ""
        self.greeting = False  # Hello was sent to the bus, and its reply has not come
        self.to_bus: Final[Output] = []
        self.to_app: Final[Output] = []
        self.pending: Final = PendingCalls()
        self.verdicts: Final = VerdictCache()
        self.matches: Final = Subscriptions()
        self.chores: Final = Chores()
        # Names that the app owns or waits for, with the number of its last request for each.
        self.requested_names: Final[dict[str, int]] = {}
        self.name_requests = 0  # the number of requests so far
        self.callers: Final[OrderedDict[str, None]] = OrderedDict()
        self.counts_callers = False  # the bus was asked for the callers that are still connected
        # By `ReplyAction.kind`. Each part of the connection adds its own handlers.
        self.reply_handlers: Final[dict[str, ReplyHandler]] = {
            "ignore": _ignore,
            "translate": self._translate,
        }

    # -- totals of the sandbox ------------------------------------------------------------------

    @property
    def all_match_rules(self) -> int:
        """The number of match rules of all connections of the sandbox."""
        return sum(state.matches.count for state in self.sandbox.states)

    @property
    def all_names(self) -> int:
        """The number of names that all connections of the sandbox own or wait for."""
        return sum(len(state.requested_names) for state in self.sandbox.states)

    # -- calls of the gate's own ------------------------------------------------------------------

    def call_driver(
        self,
        member: str,
        signature: str,
        values: Sequence[Value],
        action: ReplyAction,
    ) -> None:
        """Call the bus on this connection, for the gate's own use."""
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
        """Reply to a call of the app in place of the bus."""
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
        """Refuse a call of the app in place of the bus."""
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
        """Pass a message to the app unchanged."""
        self.to_app.append(Chunk(data, fds) if fds else data)

    def handle_reply(
        self, action: ReplyAction, reply: Header, data: bytes, fds: tuple[int, ...]
    ) -> None:
        """Handle a reply by its action."""
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
        """Refuse a call to the app in place of the app."""
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
        """Remember a caller, because the app may see it as long as it is connected."""
        self.callers[unique_name] = None
        self.callers.move_to_end(unique_name)
        if len(self.callers) > MAX_CALLERS:
            self.callers.popitem(last=False)

    # -- handing over ---------------------------------------------------------------------------------

    def dump(self, changes_of: Callable[[str], int]) -> ConnectionStateDump:
        """Return the state without the rules and the remembered verdicts.

        `changes_of` returns how often a name has changed its owner so far.
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
        """Restore the state from `dump`. `since` returns the owners of a name from one of its changes on."""
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
        """Raise ValueError if this gate has no handler for the action."""
        while action is not None:
            if action.kind not in self.reply_handlers:
                raise ValueError(f"a reply to be dealt with as {action.kind!r}")
            action = action.after


def _ignore(_action: ReplyAction, _reply: Header, _data: bytes, _fds: tuple[int, ...]) -> None:
    """Drop the reply."""
