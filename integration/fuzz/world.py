"""A filter between an app and a model bus, with a Witness of all that passes. What it says is broken is a finding."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from broker.control_protocol.messages import SandboxLimits
from broker.gate.filter.chores import NAME_WORK
from broker.gate.filter.connection_state import MAX_CALLERS
from broker.gate.filter.filter import Filter
from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL, InterceptedCall, Replier
from broker.gate.filter.verdict_cache import MAX_REMEMBERED
from broker.gate.output import Chunk, Output
from broker.gate.sandbox.budgets import MessageBudget
from broker.wire import errors, marshal
from broker.wire.errors import PeerProtocolError, PeerQuotaError
from broker.wire.header import FIXED_SIZE, Flag, MessageType, measure, parse_header
from broker.wire.interfaces import DRIVER
from broker.wire.skim import skim_header
from integration.fuzz.witness import Witness
from policy.match import Judge
from policy.rules import AccessList
from tests.helpers.messages import Message, changed, driver_call, split
from tests.helpers.modelbus import APP, ME, OTHER_APP, FakeHost, ModelBus, make_bus

# Who else is on the bus. The last one is in a sandbox of its own.
HOSTS: Final = (":1.2", ":1.3", ":1.4")
BOXED: Final = ":1.5"
PEERS: Final = (*HOSTS, BOXED)
STRANGER: Final = ":1.99"  # comes later, if at all
OWNERS: Final = {"org.a": ":1.2", "org.a.b": ":1.3", "net.c": BOXED}
NAMES: Final = ("org.a", "org.a.b", "net.c", "org.ab", "org.mine.x")
# Small, so that they are reached.
LIMITS: Final = SandboxLimits(
    bytes_held=16384, pending_calls=6, match_rules=4, names=3, tracked_names=64
)
TURN: Final = 3  # messages that are judged before others would have their turn
# What the model bus understands; to it `requestname` would be the same.
_METHODS: Final = {
    "Hello",
    "AddMatch",
    "RemoveMatch",
    "GetNameOwner",
    "NameHasOwner",
    "GetConnectionUnixProcessID",
    "GetConnectionUnixUser",
    "GetConnectionCredentials",
    "GetConnectionSELinuxSecurityContext",
    "GetAdtAuditSessionData",
    "ListNames",
    "ListActivatableNames",
    "ListQueuedOwners",
    "StartServiceByName",
    "RequestName",
    "ReleaseName",
    "GetId",
    "Ping",
    "Introspect",
}


class WatchedBus(ModelBus):
    """A model bus that says when a name changes its owner."""

    def __init__(self, owners: dict[str, str], notice: Callable[[str, str, str], None]) -> None:
        super().__init__(owners)
        self.uniques.update(PEERS)
        self.answers_mute = True
        self._notice: Final = notice

    def change(self, name: str, new: str) -> bytes:
        self._notice(name, self.owners.get(name, ""), new)
        return super().change(name, new)

    def handle(self, message: Message) -> bytes:
        header = message.header
        if header.destination in (None, DRIVER) and header.member not in _METHODS:
            if header.type != MessageType.METHOD_CALL:
                return b""
            return self._error(header, errors.UNKNOWN_METHOD, "no such method")
        return super().handle(message)


class World:
    """Everything around one connection."""

    def __init__(self, rules: AccessList, *, app_takes_fds: bool = True) -> None:
        self.bus: Final = make_bus()
        self.bus.connected(BOXED, "c2", OTHER_APP)
        self.boxed: Final = MessageBudget(25_000)  # of the other sandbox
        self.bus.payers.joined(BOXED, self.boxed)
        self.host: Final = FakeHost(limits=LIMITS)
        judge = self._judge(rules)
        self.model: Final = WatchedBus(dict(OWNERS), self._name_changes)
        self.witness: Final = Witness(self.bus, self.model.owners, ME, judge)
        self.witness.insiders[BOXED] = OTHER_APP
        self.filter: Final = Filter(
            self.bus,
            self.host,
            judge,
            app_takes_fds=app_takes_fds,
            judged_a_turn=TURN,
            clock=lambda: 0.0,
        )
        self.filter.state.chores.room = 3 * NAME_WORK
        self.host.states.append(self.filter.state)
        self.bus.members.add(self.filter.state.verdicts)
        self.paused = False
        self.ended = False
        self.got: Final[list[Message]] = []  # by the app
        self.sent: Final[list[Message]] = []  # to the bus
        self._late: Final[list[Message]] = []
        self._unread = b""  # what the app sent, as the witness has it
        self._broken = False
        self._fds: Final[list[int]] = []
        self._passed: Final[list[int]] = []
        self._questions = 0  # of the gate's own
        self.app(driver_call(1, "Hello"))

    def _judge(self, rules: AccessList) -> Judge:
        return Judge(rules, bus="session", me=APP)

    def _name_changes(self, name: str, old: str, new: str) -> None:
        self.witness.name_changes(name, old, new)

    # -- what happens ------------------------------------------------------------------------------

    def app(self, data: bytes, fds: int = 0) -> None:
        """Let the app send bytes, with so many descriptors."""
        self._observe(data)
        self._feed(self.filter.feed_app, data, fds)

    def peer(self, message: bytes, fds: int = 0) -> None:
        """Let the bus deliver a whole message of a peer."""
        self.witness.in_order = not self._late
        header = parse_header(message)
        self.witness.peer_says(header)
        is_reply = header.type in (MessageType.METHOD_RETURN, MessageType.ERROR)
        with self._paid_by(header.sender or "", ME if is_reply else ""):
            self._feed(self.filter.feed_bus, message, fds)

    def peer_strange(self, message: bytes) -> None:
        """Let the bus deliver what is legal on it and not read here: it goes nowhere, and ends nothing."""
        header = skim_header(message)
        is_call = header.type == MessageType.METHOD_CALL
        if is_call and not header.flags & Flag.NO_REPLY_EXPECTED:
            self.witness.owed[header.sender or "", header.serial] += 1
        calm = self.is_settled
        self._feed(self.filter.feed_bus, message)
        assert not (calm and self.ended)

    def change(self, name: str, new: str) -> None:
        """Let a name change its owner; "" is nobody."""
        owners = (new, self.model.owners.get(name, ""))
        with self._paid_by(self.bus.payers.who_moved(name, *owners)):
            self._feed(self.filter.feed_bus, self.model.change(name, new))

    def leave(self, unique_name: str) -> None:
        """Let a peer leave the bus, with its names."""
        # One after the other: in between, those that are left are seen by other names.
        for name in [name for name, its in self.model.owners.items() if its == unique_name]:
            self.change(name, "")
        self._feed(self.filter.feed_bus, self.model.leave(unique_name))

    def use(self, rules: AccessList) -> None:
        """Swap the rules."""
        if self.ended:
            return
        judge = self._judge(rules)
        self.witness.judge = judge
        self._happen(lambda: self.filter.change_rules(judge))

    def speaker_uses(self, rules: AccessList) -> None:
        """Swap the rules of the other sandbox: they may say who hears its broadcasts."""
        if self.bus.set_broadcast_judge(BOXED, Judge(rules, bus="session", me=OTHER_APP)):
            self.filter.state.verdicts.forget_all()

    def stranger_appears(self) -> None:
        """Let somebody connect from a sandbox under a name that the app may have guessed."""
        if STRANGER not in self.model.uniques:
            self.bus.connected(STRANGER, "c3", OTHER_APP)
            self.witness.insiders[STRANGER] = OTHER_APP
            self.model.uniques.add(STRANGER)

    def hang_up(self) -> None:
        """Let the other sandbox's app close, and the bus let go of it, which has messages of it still."""
        self.bus.gone(BOXED)

    def tag(self, unique_name: str) -> None:
        """Let a peer ask to be told in each message which sandbox it is from."""
        self.bus.wants_instance_field.add(unique_name)
        self.filter.state.verdicts.forget_all()

    def step(self) -> None:
        """Let the bus deal with one thing, if it waits for any."""
        if self._late and not self.ended:
            self._answer()

    def go_on(self) -> None:
        """Let the bus deal with everything from now on."""
        self.paused = False
        self._pump()

    @property
    def is_settled(self) -> bool:
        """True when nothing waits for an answer of the bus."""
        return not (self._late or self.filter.held or self._unread or self.ended)

    @property
    def is_half(self) -> bool:
        """True when a message of the app has begun and not ended."""
        return bool(self._unread) and not self._broken

    # -- inside ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _paid_by(self, *payers: str) -> Iterator[None]:
        """See that what comes in is charged to nobody else, unless other things wait and come with it."""
        was_settled, questions = self.is_settled, self._questions
        boxed, own = self.boxed.caused, self.host.messages.caused
        yield
        if was_settled and self.is_settled:
            assert BOXED in payers or self.boxed.caused == boxed
            # A question of the gate's own that it brings about is the connection's.
            asked = self._questions > questions
            assert ME in payers or asked or self.host.messages.caused == own

    def _feed(
        self, feed: Callable[[bytes, Sequence[int]], None], data: bytes, count: int = 0
    ) -> None:
        if self.ended:
            return
        fds = range(len(self._fds), len(self._fds) + count)
        self._fds.extend(fds)
        self._happen(lambda: feed(data, tuple(fds)))

    def _happen(self, what: Callable[[], None]) -> None:
        # Whatever waits in the filter waits for an answer of the bus.
        self.witness.in_order = not self._late
        self._try(what)
        self._take_turns()
        self._pump()

    def _take_turns(self) -> None:
        while (self.filter.yielded or self.filter.state.chores) and not self.ended:
            self.filter.spent = 0
            self._try(
                self.filter.do_chores if self.filter.state.chores else self.filter.resume_reading
            )
        self.filter.spent = 0

    def _try(self, what: Callable[[], None]) -> None:
        try:
            what()
        except (PeerProtocolError, PeerQuotaError):
            self.ended = True
        self._drain()
        if self.ended:
            self._end()
        else:
            self._check_tables()

    def _pump(self) -> None:
        while self._late and not self.paused and not self.ended:
            self._answer()

    def _answer(self) -> None:
        self.witness.in_order = False
        answer = self.model.handle(self._late.pop(0))
        if answer:
            self._try(lambda: self.filter.feed_bus(answer))
            self._take_turns()

    def _drain(self) -> None:
        state = self.filter.state
        for message in self._messages(state.to_app):
            self.witness.to_app(message)
            self.got.append(message)
        for message in self._messages(state.to_bus):
            entry = state.pending.calls_to_bus.get(message.header.serial)
            is_own = isinstance(entry, InterceptedCall) and entry.is_own
            self._questions += is_own
            self.witness.to_bus(message, is_own=is_own)
            self.sent.append(message)
            self._late.append(message)

    def _messages(self, output: Output) -> list[Message]:
        found = []
        for item in output:
            data, fds = (bytes(item.data), item.fds) if isinstance(item, Chunk) else (item, ())
            self._passed.extend(fds)
            parts = split(data)
            assert len(parts) == 1 or not fds
            found += [Message(header=parse_header(part), raw=part, fds=fds) for part in parts]
            assert all(message.header.unix_fds == len(fds) for message in found[-len(parts) :])
        output.clear()
        return found

    def _observe(self, data: bytes) -> None:
        """Let the witness know what the app says, as far as it is whole and legal."""
        self._unread += data
        try:
            while not self._broken and len(self._unread) >= FIXED_SIZE:
                size = measure(self._unread)
                if size > len(self._unread):
                    return
                part, self._unread = self._unread[:size], self._unread[size:]
                self.witness.app_says(Message(header=parse_header(part), raw=part))
        except PeerProtocolError:
            self._broken = True

    def _check_tables(self) -> None:
        state = self.filter.state
        own = sum(
            isinstance(entry, InterceptedCall) and entry.is_own
            for entry in state.pending.calls_to_bus.values()
        )
        plain = [
            entry for entry in state.pending.calls_to_bus.values() if isinstance(entry, Replier)
        ]
        lent = sum(not (entry.owner or entry.name) for entry in plain)
        assert len(state.pending.calls_to_bus) - own - lent <= LIMITS.pending_calls
        assert len(state.pending.calls_to_bus) == len(self.witness.waiting) or not self.is_settled
        assert len(state.pending.calls_to_app) <= LIMITS.pending_calls
        assert state.matches.count <= LIMITS.match_rules
        assert sum(count for _, count in state.matches.items()) == state.matches.count
        assert len(state.requested_names) <= LIMITS.names
        assert self.filter.tracked_names <= LIMITS.tracked_names
        assert len(state.callers) <= MAX_CALLERS
        assert all(serial >= FIRST_GATE_SERIAL for serial in state.pending.translated_serials)
        assert all(
            len(table) <= MAX_REMEMBERED
            for table in (*state.verdicts.tables, state.verdicts.bus_replies)
        )
        assert self.host.bytes_held == self.filter.from_app.held
        assert self.host.bytes_held <= LIMITS.bytes_held + FIXED_SIZE + 2 * 2**16
        assert sorted(self._passed + self.host.closed) == sorted(
            set(self._passed) | set(self.host.closed)
        )
        assert len(self._fds) == len(self._passed) + len(self.host.closed) + self.filter.fds

    def _end(self) -> None:
        left = self.filter.close()
        assert sorted(self._passed + self.host.closed + left) == list(range(len(self._fds)))
        assert self.host.bytes_held == 0

    def finish(self) -> None:
        """End the connection, and see that nothing is left of it."""
        if not self.ended:
            self.go_on()
        if not self.ended:
            self.ended = True
            self._end()


def from_peer(message: bytes, sender: str) -> bytes:
    """Return a message as the bus delivers it: with its sender, and fit for an incoming one."""
    return changed(message, sender=sender)


def answer_to(serial: int, sender: str, *, error: bool = False, number: int = 700) -> bytes:
    """Return a peer's reply to a call with this serial."""
    if error:
        return marshal.make_error(
            number,
            reply_serial=serial,
            name="a.b",
            text="no",
            destination=ME,
            sender=sender,
        )
    return marshal.make_return(number, reply_serial=serial, destination=ME, sender=sender)


def is_reply(message: Message) -> bool:
    """Say whether this is a return or an error."""
    return message.header.type in (MessageType.METHOD_RETURN, MessageType.ERROR)
