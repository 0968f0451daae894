"""Sees all that goes into a filter and comes out of it, and judges each message again by what is really so.

It remembers nothing about verdicts, and knows the owners of names from the bus itself: what the filter
lets through is compared with one fresh question to the rules in force.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Final

from broker.gate.filter.bus_state import ABSENT_UNIQUE, BusState
from broker.gate.filter.connection_state import REPLY_SERIAL
from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL
from broker.wire.header import Field, Flag, Header, MessageType
from broker.wire.interfaces import DRIVER, INSTANCE_FIELD, INSTANCE_PREFIX
from broker.wire.matchrule import parse_match_rule
from integration.fuzz.header import read_fields
from policy.bus_calls import NEVER_INTERFACES, NEVER_MEMBERS
from policy.match import Judge
from policy.rules import Identity
from tests.helpers.messages import Message
from tests.helpers.modelbus import ABSENT, APP

SANDBOX: Final = "c1"
REPLIES: Final = (MessageType.METHOD_RETURN, MessageType.ERROR)
PEER: Final = "org.freedesktop.DBus.Peer"
# What every sandbox may ask of the bus, by interface.
FREE: Final = {
    DRIVER: {"Hello", "GetId", "ListNames", "ListActivatableNames"},
    PEER: {"Ping"},
    "org.freedesktop.DBus.Introspectable": {"Introspect"},
}
LOOK_UPS: Final = {
    "GetNameOwner",
    "NameHasOwner",
    "GetConnectionUnixProcessID",
    "GetConnectionUnixUser",
    "GetConnectionCredentials",
    "GetConnectionSELinuxSecurityContext",
    "GetAdtAuditSessionData",
}
OWNING: Final = {"RequestName", "ReleaseName", "ListQueuedOwners"}


@dataclass(slots=True)
class Waiting:
    """A call of the app that a peer may answer."""

    bus_serial: int
    destination: str
    responders: set[str]


class Witness:
    """What is really so, and the checks."""

    def __init__(self, bus: BusState, owners: dict[str, str], me: str, judge: Judge) -> None:
        self.judge = judge
        self.me: Final = me
        # Who is or was in a sandbox, whatever the bus has let go of.
        self.insiders: Final[dict[str, Identity]] = {me: APP}  # the app itself is no host, either
        # Calls of the app that want a reply and have none: how many of each serial.
        self.unanswered: Final[Counter[int]] = Counter()
        self.waiting: Final[dict[int, Waiting]] = {}  # by the app's serial
        # Calls of others that want a reply and have none.
        self.owed: Final[Counter[tuple[str, int]]] = Counter()
        self.delivered: Final[Counter[tuple[str, int]]] = Counter()
        self.callers: Final[set[str]] = set()
        # Calls and signals of peers, and the names of their senders when the bus delivered them: until the
        # filter knows all owners it lets them wait, and what the bus says of owners behind them.
        self.arrived: Final[defaultdict[tuple[str, int], list[set[str]]]] = defaultdict(list)
        self.in_order = True  # nothing of what the bus said waits
        self._bus: Final = bus
        self._owners: Final = owners
        self._last_own = 0
        self._high: Final[list[Message]] = []  # calls with serials that the gate uses itself

    # -- what is so ------------------------------------------------------------------------------

    def names_of(self, name: str) -> tuple[set[str], Identity | None]:
        """Return all names of who is behind a name, and who it is."""
        owner = name if name[:1] == ":" else self._owners.get(name, "")
        names = {name} | {each for each, its in self._owners.items() if owner and its == owner}
        return names | ({owner} if owner else set()), self.insiders.get(owner)

    def sees(self, name: str) -> bool:
        """Say whether the app may know of a name. Whoever has called it counts, alive or not."""
        names, identity = self.names_of(name)
        known = {DRIVER, self.me, *self.callers}
        return not known.isdisjoint(names) or self.judge.see(names, identity).allowed

    def may_send(self, header: Header) -> bool:
        """Say whether a message may leave the sandbox now."""
        if header.destination is None:
            verdict = self.judge.broadcast(header.path, header.interface, header.member)
        else:
            names, peer = self.names_of(header.destination)
            verdict = self.judge.send(names, header.path, header.interface, header.member, peer)
            if self.me in names and verdict.rule is None:
                return verdict.allowed or self.judge.access.receive_from_host
        return verdict.allowed

    def may_receive(self, header: Header) -> bool:
        """Say whether a message of a peer may enter the sandbox now."""
        sender = header.sender or ""
        what = (header.path, header.interface, header.member)
        peer = self.insiders.get(sender)
        broadcast = header.destination is None
        speaker = self._bus.broadcast_judges.get(sender) if broadcast else None
        heard = speaker is None or speaker.judge_broadcast_receiver(*what, APP).allowed
        return heard and any(
            self.judge.receive(names, *what, peer, broadcast=broadcast).allowed
            for names in self.arrived[sender, header.serial]
        )

    # -- what goes in ----------------------------------------------------------------------------

    def app_says(self, message: Message) -> None:
        """Note a message that the app sends."""
        header = message.header
        if header.type == MessageType.METHOD_CALL and not header.flags & Flag.NO_REPLY_EXPECTED:
            self.unanswered[header.serial] += 1
            if header.serial >= FIRST_GATE_SERIAL and header.destination not in (None, DRIVER):
                self._high.append(message)

    def peer_says(self, header: Header) -> None:
        """Note a message that the bus delivers for a peer."""
        if self.in_order:
            self.arrived.clear()
        sender = header.sender or ""
        self.arrived[sender, header.serial].append(self.names_of(sender)[0])
        if header.type == MessageType.METHOD_CALL and not header.flags & Flag.NO_REPLY_EXPECTED:
            self.owed[header.sender or "", header.serial] += 1

    def name_changes(self, name: str, old: str, new: str) -> None:
        """Note that a name changes its owner: who got it since may answer what was sent to it."""
        for waiting in self.waiting.values():
            if waiting.destination == name:
                waiting.responders |= {old, new} - {""}

    # -- what comes out --------------------------------------------------------------------------

    def to_bus(self, message: Message, *, is_own: bool) -> None:
        """Check a message that the filter passes to the bus; `is_own`: a call of the gate's own."""
        header = message.header
        assert header.sender is None
        assert self._stamps_are_right(message)
        assert header.flags <= 7
        if header.serial >= FIRST_GATE_SERIAL:
            assert header.serial > self._last_own, "a serial of the gate's that it did not give"
            self._last_own = header.serial
        assert (header.reply_serial is not None) == (header.type in REPLIES)
        assert not header.has_misplaced
        if header.type in REPLIES:
            key = (header.destination or "", header.reply_serial or 0)
            assert self.owed[key] > 0, "a reply that nobody waits for"
            self.owed[key] -= 1
        elif header.destination in (ABSENT, ABSENT_UNIQUE) and header.serial >= FIRST_GATE_SERIAL:
            assert header.member == "Ping"
        elif header.type == MessageType.METHOD_CALL and header.destination in (None, DRIVER):
            if not is_own:
                self._driver_call(message)
        else:
            assert header.type in (MessageType.METHOD_CALL, MessageType.SIGNAL)
            assert header.destination != DRIVER
            assert self.may_send(header), f"not allowed out: {message.text}"
            self._expect_reply(message)

    def _stamps_are_right(self, message: Message) -> bool:
        """Say whether a message has no fields but D-Bus's, and the one that says its sandbox to who asked for it."""
        header = message.header
        name, tagged = header.destination, self._bus.wants_instance_field
        is_exact = name is not None and name[:1] == ":"
        to_bus = header.type == MessageType.METHOD_CALL and name in (None, DRIVER, ABSENT)
        wanted = not to_bus and (name in tagged if is_exact else bool(tagged))
        if not header.has_unknown:
            return not wanted or header.type in REPLIES  # one may be the gate's own error
        # A name that nobody owns may be of a service that is being started; the gate may not know yet that it is so.
        may = wanted or (name is not None and not is_exact)
        fields = dict(read_fields(message.raw[: header.size], little=header.little))
        stamp = {INSTANCE_FIELD: INSTANCE_PREFIX + SANDBOX} if may else {}
        return {code: value for code, value in fields.items() if code > Field.UNIX_FDS} == stamp

    def _expect_reply(self, message: Message) -> None:
        header = message.header
        if header.type == MessageType.SIGNAL or header.flags & Flag.NO_REPLY_EXPECTED:
            return
        name = header.destination or ""
        serial = header.serial if header.serial < FIRST_GATE_SERIAL else self._own_of(message)
        assert serial not in self.waiting, "two calls under one serial"
        assert all(header.serial != other.bus_serial for other in self.waiting.values())
        owner = name if name[:1] == ":" else self._owners.get(name, "")
        self.waiting[serial] = Waiting(header.serial, name, {owner} - {""})

    def _own_of(self, message: Message) -> int:
        """Return the serial that the app gave a call which has another on the bus."""
        for number, high in enumerate(self._high):
            if _content(high) == _content(message):
                del self._high[number]
                return high.header.serial
        raise AssertionError("a call that the app did not make")

    def _refused(self, serial: int) -> None:
        """Note that a call did not go to a peer: it can be taken for no other one."""
        for number, high in enumerate(self._high):
            if high.header.serial == serial:
                del self._high[number]
                return

    def _driver_call(self, message: Message) -> None:
        header = message.header
        interface, member = header.interface, header.member or ""
        if header.destination is None:
            assert interface in (None, PEER)
            assert member in {"Ping", "GetMachineId"}
            assert member == "Ping" or self._rule_allows(header)
            return
        if any(member in members for one, members in FREE.items() if interface in (None, one)):
            return
        if interface not in (None, DRIVER):
            assert interface not in NEVER_INTERFACES
            assert self._rule_allows(header)
        elif member in {"AddMatch", "RemoveMatch"}:
            (text,) = message.body
            assert parse_match_rule(str(text)).canonical() == text
        elif member in LOOK_UPS:
            assert self.sees(str(message.body[0]))
        elif member in OWNING:
            assert self.judge.own(str(message.body[0])).allowed
        elif member == "StartServiceByName":
            name = str(message.body[0])
            assert self.judge.start(*self.names_of(name)).allowed
        else:
            assert member not in NEVER_MEMBERS
            assert self._rule_allows(header)

    def _rule_allows(self, header: Header) -> bool:
        what = (header.path, header.interface, header.member)
        return self.judge.send((DRIVER,), *what, None).allowed

    def to_app(self, message: Message) -> None:
        """Check a message that the filter passes to the app."""
        header = message.header
        if header.type in REPLIES:
            self._reply(header)
            if header.sender == DRIVER and header.signature == "as" and self.in_order:
                (names,) = message.body
                assert isinstance(names, tuple)
                assert all(self.sees(str(name)) for name in names), "a name that is not to be seen"
        elif header.sender in (None, DRIVER):
            self._driver_signal(message)
        else:
            assert header.type in (MessageType.METHOD_CALL, MessageType.SIGNAL)
            assert not header.has_unknown
            assert self.may_receive(header), f"not allowed in: {message.text}"
            if header.type == MessageType.METHOD_CALL:
                self.callers.add(header.sender)
                self.delivered[header.sender, header.serial] += 1

    def _reply(self, header: Header) -> None:
        serial = header.reply_serial or 0
        assert self.unanswered[serial] > 0, "a reply that was not asked for"
        self.unanswered[serial] -= 1
        if header.serial == REPLY_SERIAL:
            self._refused(serial)
            assert header.sender == DRIVER
            return
        waiting = self.waiting.pop(serial, None)
        if header.sender not in (None, DRIVER):
            assert waiting is not None, "a reply from somebody who was not asked"
            assert header.sender in waiting.responders, "a reply from somebody else"

    def _driver_signal(self, message: Message) -> None:
        header = message.header
        assert header.type == MessageType.SIGNAL
        if header.member != "NameOwnerChanged":
            return
        name, _, new = (str(text) for text in message.body)
        if new and self.in_order:
            assert self.sees(name), f"{name} is not to be seen"
            assert name[:1] == ":" or self._owners.get(name) == new


def _content(message: Message) -> tuple[object, ...]:
    header = message.header
    return (
        header.destination,
        header.path,
        header.interface,
        header.member,
        header.signature,
        header.flags & 7,
        message.raw[header.size :],
    )
