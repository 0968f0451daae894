"""A bus as one connection of it sees it, on the other side of a Filter: for tests of the gate.

It answers calls to the bus driver as dbus-daemon does, keeps what it cannot answer in `calls`, delivers
what a test says, and notes everything that went past. `Dialogue` is an app, a filter and such a bus; a `Town` is
many of them, which hear of each other's names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from broker.control_protocol.messages import SandboxLimits
from broker.gate.filter.bus_state import BusState, make_absent_name
from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.denials import Denial
from broker.gate.filter.filter import Filter
from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL
from broker.gate.name_ledger import NameLedger
from broker.gate.output import Chunk, Output
from broker.gate.recorder import HeaderRecorder
from broker.gate.sandbox.budgets import MessageBudget
from broker.wire import errors, marshal
from broker.wire.header import (
    Flag,
    Header,
    MessageType,
    parse_header,
)
from broker.wire.interfaces import DRIVER, DRIVER_PATH
from broker.wire.marshal import Value
from broker.wire.matchrule import parse_match_rule
from policy.match import Judge
from policy.rules import AccessList, Identity
from tests.helpers.messages import Message, access, driver_call, make_reply, signal, split

ME: Final = ":1.7"
APP: Final = Identity(type="org.test", app="me")
DRIVER_INTERFACES: Final = (
    None,
    DRIVER,
    "org.freedesktop.DBus.Peer",
    "org.freedesktop.DBus.Introspectable",
)
OTHER_APP: Final = Identity(type="org.test", app="other")


ABSENT: Final = make_absent_name(bytes(16))


def make_bus(folder: Path | None = None) -> BusState:
    """Return a bus without connections."""
    return BusState("session", "unix:path=/none", NameLedger(folder), ABSENT)


def no_time() -> float:
    """Stand still: what things cost is counted."""
    return 0.0


@dataclass
class FakeHost:
    """A sandbox, as a connection needs it."""

    id: str = "c1"
    identity: Identity = APP
    limits: SandboxLimits = field(default_factory=SandboxLimits)
    bytes_held: int = 0
    states: list[ConnectionState] = field(default_factory=list)
    denials: list[Denial] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)
    messages: MessageBudget = field(default_factory=lambda: MessageBudget(25_000))
    recorder: HeaderRecorder = field(default_factory=lambda: HeaderRecorder("c1"))

    def denied(self, state: ConnectionState, denial: Denial) -> None:
        assert state.sandbox is self
        self.denials.append(denial)

    def said_hello(self, state: ConnectionState) -> None:
        state.bus.connected(state.unique_name, self.id, self.identity)
        state.bus.payers.joined(state.unique_name, self.messages)

    def close_fds(self, fds: Sequence[int]) -> None:
        self.closed += fds


class ModelBus:
    """The bus driver, for the one connection `me`; other peers are only names."""

    def __init__(self, owners: dict[str, str] | None = None, *, me: str = ME) -> None:
        self.me: Final = me
        self.owners: Final = dict(owners or {})
        self.uniques: Final = {me, *self.owners.values()}
        self.activatable: Final[list[str]] = []
        self.matches: Final[list[str]] = []
        self.requested: Final[list[tuple[str, int]]] = []
        self.calls: Final[list[Message]] = []  # to others, and those the driver does not know
        self.seen: Final[list[Message]] = []
        self.refuse: Final[dict[str, tuple[str, str]]] = {}  # driver method -> error
        # As dbus-daemon does: calls to the driver, and with an error whatever it cannot pass on.
        self.answers_mute = False
        # Who else is to know of an owner change: gets the name and the new owner.
        self.tell: Callable[[str, str], None] = lambda _name, _new: None
        self._serial = 0

    def serial(self) -> int:
        self._serial += 1
        return self._serial

    def handle(self, message: Message) -> bytes:
        """Take one message; return what the bus sends back to the connection."""
        self.seen.append(message)
        header = message.header
        assert header.sender is None
        assert not header.has_unknown or header.destination != DRIVER
        if header.type != MessageType.METHOD_CALL:
            absent = header.destination is not None and not self._is_there(header.destination)
            return self._error(header, *self._absent_call(header)) if absent else b""
        if header.destination not in (None, DRIVER):
            if not self._is_there(header.destination or ""):
                return self._error(header, *self._absent_call(header))
            self.calls.append(message)
            return b""
        if (header.member or "") in self.refuse:
            return self._error(header, *self.refuse[header.member or ""])
        method: Callable[[Header, Message], bytes] | None = getattr(
            self, f"_do_{(header.member or '').lower()}", None
        )
        if method is None or header.interface not in DRIVER_INTERFACES:
            self.calls.append(message)
            return b""
        return method(header, message)

    # -- what a test makes happen ---------------------------------------------------------------

    def change(self, name: str, new: str) -> bytes:
        """Give a name to somebody; return the signal, if the connection hears it."""
        said = self.hear_of(name, new)
        self.tell(name, new)
        return said

    def hear_of(self, name: str, new: str) -> bytes:
        """Change an owner and tell this connection alone; return the signal, if heard."""
        old = self.owners.pop(name, "")
        if new:
            self.owners[name] = new
            self.uniques.add(new)
        return self.owner_changed(name, old, new)

    def leave(self, unique_name: str) -> bytes:
        """Let a connection go, with its names."""
        names = [name for name, owner in self.owners.items() if owner == unique_name]
        said = b"".join(self.change(name, "") for name in names)
        self.uniques.discard(unique_name)
        return said + self.owner_changed(unique_name, unique_name, "")

    def hang_up(self, bus: BusState, unique_name: str, *backlog: bytes) -> list[bytes]:
        """Let a sandbox's connection close with a backlog; return what the bus says then.

        As dbus-daemon does: the gate gets the end of the file first, and what was sent is delivered behind it.
        """
        bus.gone(unique_name)
        return [*backlog, self.leave(unique_name)]

    def owner_changed(self, name: str, old: str, new: str) -> bytes:
        wanted = any(
            parse_match_rule(text).matches(
                sender_names=(DRIVER,),
                path=DRIVER_PATH,
                interface=DRIVER,
                member="NameOwnerChanged",
                args=(name, old, new),
            )
            for text in self.matches
        )
        if not wanted:
            return b""
        return signal(
            self.serial(),
            "NameOwnerChanged",
            sender=DRIVER,
            path=DRIVER_PATH,
            interface=DRIVER,
            values=(name, old, new),
        )

    # -- answers --------------------------------------------------------------------------------

    def _is_there(self, name: str) -> bool:
        return name in self.uniques or name in self.owners or name == DRIVER

    def _absent_call(self, header: Header) -> tuple[str, str]:
        if header.flags & Flag.NO_AUTO_START:
            return errors.NAME_HAS_NO_OWNER, f'Name "{header.destination}" does not exist'
        text = f"The name {header.destination} was not provided by any .service files"
        return errors.SERVICE_UNKNOWN, text

    def _return(self, header: Header, signature: str = "", *values: Value) -> bytes:
        if header.flags & Flag.NO_REPLY_EXPECTED and not self.answers_mute:
            return b""
        return marshal.make_return(
            self.serial(),
            reply_serial=header.serial,
            destination=self.me,
            sender=DRIVER,
            signature=signature,
            values=values,
        )

    def _error(self, header: Header, name: str, text: str) -> bytes:
        is_mute = header.type != MessageType.METHOD_CALL or header.flags & Flag.NO_REPLY_EXPECTED
        if is_mute and not self.answers_mute:
            return b""
        return marshal.make_error(
            self.serial(),
            reply_serial=header.serial,
            name=name,
            text=text,
            destination=self.me,
            sender=DRIVER,
        )

    def _do_hello(self, header: Header, _message: Message) -> bytes:
        acquired = signal(
            self.serial(),
            "NameAcquired",
            destination=self.me,
            sender=DRIVER,
            path=DRIVER_PATH,
            interface=DRIVER,
            values=(self.me,),
        )
        return self._return(header, "s", self.me) + acquired

    def _do_addmatch(self, header: Header, message: Message) -> bytes:
        self.matches.append(str(message.body[0]))
        return self._return(header)

    def _do_removematch(self, header: Header, message: Message) -> bytes:
        if str(message.body[0]) not in self.matches:
            return self._error(header, errors.MATCH_RULE_NOT_FOUND, "not found")
        self.matches.remove(str(message.body[0]))
        return self._return(header)

    def _do_getnameowner(self, header: Header, message: Message) -> bytes:
        name = str(message.body[0])
        owner = name if name in self.uniques or name == DRIVER else self.owners.get(name)
        if owner is None:
            text = f"Could not get owner of name '{name}': no such name"
            return self._error(header, errors.NAME_HAS_NO_OWNER, text)
        return self._return(header, "s", owner)

    def _do_namehasowner(self, header: Header, message: Message) -> bytes:
        return self._return(header, "b", self._is_there(str(message.body[0])))

    def _number(self, what: str, header: Header, message: Message) -> bytes:
        name = str(message.body[0])
        if not self._is_there(name):
            text = f"Could not get {what} of name '{name}': no such name"
            return self._error(header, errors.NAME_HAS_NO_OWNER, text)
        return self._return(header, "u", 1000)

    def _do_getconnectionunixprocessid(self, header: Header, message: Message) -> bytes:
        return self._number("PID", header, message)

    def _do_getconnectionunixuser(self, header: Header, message: Message) -> bytes:
        return self._number("UID", header, message)

    def _do_getconnectioncredentials(self, header: Header, message: Message) -> bytes:
        return self._number("credentials", header, message)

    _do_getconnectionselinuxsecuritycontext = _do_getconnectioncredentials
    _do_getadtauditsessiondata = _do_getconnectioncredentials

    def _do_listnames(self, header: Header, _message: Message) -> bytes:
        return self._return(header, "as", [DRIVER, *sorted(self.owners), *sorted(self.uniques)])

    def _do_listactivatablenames(self, header: Header, _message: Message) -> bytes:
        return self._return(header, "as", [DRIVER, *self.activatable])

    def _do_listqueuedowners(self, header: Header, _message: Message) -> bytes:
        return self._return(header, "as", sorted(self.uniques))

    def _do_startservicebyname(self, header: Header, message: Message) -> bytes:
        name = str(message.body[0])
        if name in self.owners or name == DRIVER:
            return self._return(header, "u", 2)
        text = f"The name {name} was not provided by any .service files"
        return self._error(header, errors.SERVICE_UNKNOWN, text)

    def _do_requestname(self, header: Header, message: Message) -> bytes:
        name, flags = message.body
        assert isinstance(flags, int)
        self.requested.append((str(name), flags))
        if str(name) in self.owners:
            return self._return(header, "u", 3 if flags & 4 else 2)
        said = self.change(str(name), self.me)
        return said + self._return(header, "u", 1)

    def _do_releasename(self, header: Header, message: Message) -> bytes:
        name = str(message.body[0])
        if self.owners.get(name) != self.me:
            return self._return(header, "u", 3 if name in self.owners else 2)
        return self.change(name, "") + self._return(header, "u", 1)

    def _do_getid(self, header: Header, _message: Message) -> bytes:
        return self._return(header, "s", "0" * 32)

    def _do_ping(self, header: Header, _message: Message) -> bytes:
        return self._return(header)

    def _do_introspect(self, header: Header, _message: Message) -> bytes:
        return self._return(header, "s", "<node/>")


class Dialogue:
    """An app, a filter, and a bus. The bus answers at once unless `paused`."""

    def __init__(
        self,
        rules: AccessList | None = None,
        *,
        owners: dict[str, str] | None = None,
        limits: SandboxLimits | None = None,
        shared: BusState | None = None,
        me: str = ME,
        identity: Identity = APP,
        app_takes_fds: bool = True,
        hello: bool = True,
        host: FakeHost | None = None,
    ) -> None:
        self.model: Final = ModelBus(owners, me=me)
        self.bus: Final = shared if shared is not None else make_bus()
        own_host = FakeHost(identity=identity, limits=limits or SandboxLimits())
        self.host: Final = own_host if host is None else host
        self.filter: Final = Filter(
            self.bus,
            self.host,
            self._judge(rules or access()),
            app_takes_fds=app_takes_fds,
            clock=no_time,
        )
        self.state: Final = self.filter.state
        self.host.states.append(self.state)
        self.bus.members.add(self.state.verdicts)
        self.paused = False
        self.works = True  # on chores, until they are done
        self.got: Final[list[Message]] = []  # by the app
        self._late: Final[list[Message]] = []  # what the paused bus did not see yet
        if hello:
            self.app(driver_call(1, "Hello"))
            self.clear()

    def _judge(self, rules: AccessList) -> Judge:
        return Judge(rules, bus=self.bus.name, me=self.host.identity)

    def clear(self) -> None:
        """Forget what went past so far."""
        self.got.clear()
        self.model.seen.clear()
        self.model.calls.clear()
        self.host.denials.clear()

    def app(self, *data: bytes, fds: Sequence[int] = ()) -> list[Message]:
        """Let the app send; return all that it got and did not get before."""
        before = len(self.got)
        self.filter.feed_app(b"".join(data), fds)
        self._pump()
        return self.got[before:]

    def deliver(self, *data: bytes, fds: Sequence[int] = ()) -> list[Message]:
        """Let the bus send; return what the app got of it."""
        before = len(self.got)
        self.filter.feed_bus(b"".join(data), fds)
        self._pump()
        return self.got[before:]

    def use(self, rules: AccessList) -> list[Message]:
        """Swap the rules; return what the app heard of it."""
        before = len(self.got)
        self.filter.change_rules(self._judge(rules))
        self._pump()
        return self.got[before:]

    def change(self, name: str, new: str) -> list[Message]:
        """Let a name change its owner; return what the app heard of it."""
        return self.deliver(self.model.change(name, new))

    def is_held(self) -> bool:
        """Say whether the app has to wait."""
        return self.filter.held

    def step(self) -> None:
        """Let the paused bus answer one thing."""
        answer = self.model.handle(self._late.pop(0))
        self.deliver(answer)

    def resume(self) -> list[Message]:
        """Let the bus answer what it was asked while paused; return what the app got."""
        before = len(self.got)
        self.paused = False
        self._pump()
        return self.got[before:]

    def subscribe(self, rule: str = "") -> None:
        """Add a match rule of the app."""
        assert [m.text for m in self.app(driver_call(900, "AddMatch", "s", rule))] == ["return"]
        self.clear()

    def reply(self, to: Message, *, sender: str) -> list[Message]:
        """Let somebody answer what arrived at the bus; return what the app got."""
        return self.deliver(make_reply(to, sender=sender, destination=self.model.me))

    @property
    def waiting(self) -> list[Message]:
        """The messages that the paused bus has not read yet."""
        return self._late

    @property
    def sent(self) -> list[str]:
        """What arrived at the bus and is not the gate's own, in short."""
        return [m.text for m in self.model.seen if m.header.serial < FIRST_GATE_SERIAL]

    @property
    def arrived(self) -> list[Message]:
        """The calls that arrived at the bus and were for others."""
        return self.model.calls

    def _pump(self) -> None:
        while True:
            while self.works and self.state.chores:
                self.filter.do_chores()
            self.got.extend(_messages(self.state.to_app))
            self._late.extend(_messages(self.state.to_bus))
            if self.paused or not self._late:
                return
            answer = self.model.handle(self._late.pop(0))
            if answer:
                self.filter.feed_bus(answer)


class Town:
    """Connections of several sandboxes to one bus: what becomes of a name all of them hear who want to."""

    def __init__(self, owners: dict[str, str] | None = None) -> None:
        self.bus: Final = make_bus()
        self.talks: Final[list[Dialogue]] = []
        self._owners: Final = dict(owners or {})

    def add(self, *rules: str, host: FakeHost | None = None) -> Dialogue:
        """Let an app connect, from a sandbox of its own or from that one."""
        me = f":1.{100 + len(self.talks)}"
        own = FakeHost(id=f"c{len(self.talks)}", identity=Identity(type="org.test", app=me[3:]))
        for talk in self.talks:
            talk.deliver(talk.model.owner_changed(me, "", me))
        talk = Dialogue(
            access(*rules), owners=self._owners, shared=self.bus, me=me, host=host or own
        )
        talk.model.tell = lambda name, new: self._tell(talk, name, new)
        talk.model.uniques.update(other.model.me for other in self.talks)
        self.talks.append(talk)
        return talk

    def change(self, name: str, new: str) -> None:
        """Let a name change its owner; "" is nobody."""
        self._tell(None, name, new)

    def emit(self, sender: str, member: str = "Changed") -> None:
        """Deliver a broadcast to all connections."""
        for talk in self.talks:
            talk.deliver(signal(5, member, sender=sender))

    def _tell(self, teller: Dialogue | None, name: str, new: str) -> None:
        if new:
            self._owners[name] = new
        else:
            self._owners.pop(name, None)
        for talk in self.talks:
            if talk is not teller and (said := talk.model.hear_of(name, new)):
                talk.deliver(said)


def _messages(output: Output) -> list[Message]:
    found = []
    for item in output:
        data, fds = (bytes(item.data), item.fds) if isinstance(item, Chunk) else (item, ())
        parts = split(data)
        assert not fds or len(parts) == 1
        found += [Message(header=parse_header(part), raw=part, fds=fds) for part in parts]
    output.clear()
    return found
