"""The state that all connections of a gate to a bus share: identities, and the bus's error texts. No I/O.

Identities are exact, for two reasons. A unique name is learned from the reply to Hello as it passes through the gate, before
that connection can send anything else. And it is never unlearned: a bus gives no unique name twice, so a name that a
sandbox had is no host's, however long its connection is gone. A unique name goes through these states:

    state       meaning                                                 known identity
    connected   the app is connected                                    its sandbox and app
    lingering   the app has gone, the bus has not let go (lingering.py) its sandbox and app
    late        the bus has let go, and may still deliver its messages  its sandbox and app, of the last MAX_LATE names,
                                                                        or of fewer (MAX_LATE_RULES)
    unknown     it was late, or of a gate that died (name_ledger.py)    some sandbox: UNKNOWN
    host        none of these                                           a host
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

from broker.control_protocol.messages import BusSpec
from broker.gate.dumps import BusDump
from broker.gate.filter.payers import Payers
from broker.gate.filter.read_barrier import Barrier
from broker.wire import errors
from policy.match import Judge
from policy.rules import Identity

# A unique name that no connection has: a bus numbers connections from 1, and not that far.
ABSENT_UNIQUE: Final = ":0.4294967295"
# Late names with a known identity. Their messages may still come, because dbus-daemon closes a connection before it has
# delivered everything, and dbus-broker keeps calls for a service that is being started. Older names are UNKNOWN.
MAX_LATE: Final = 4096
# Rules of late names that restrict the receivers of broadcasts, each list counted once: some MiB, and some 50 ms of a
# hand-over. The newest list is kept, however long.
MAX_LATE_RULES: Final = 4096
# The identity of an unknown sandbox: it is no host, and no app that a rule could name.
UNKNOWN: Final = Identity(type="", app="")


class Member(Protocol):
    """The remembered verdicts of a connection."""

    def forget_about(self, *names: str) -> None:
        """Forget the verdicts that rest on these names."""

    def forget_all(self) -> None:
        """Forget all verdicts."""


class Closable(Protocol):
    """A connection to the bus."""

    def close(self, reason: str) -> None:
        """End the connection."""

    def ask_if_read(self, number: int) -> None:
        """Call `BusState.has_read(number)` once the bus has read all sent messages."""


class Lingering(Protocol):
    """A connection to the bus whose app has gone."""

    def close(self) -> None:
        """Close the connection to the bus."""


def make_absent_name(random: bytes) -> str:
    """Return a well-known name that no program can guess, made from random bytes."""
    return f"org.buswarden.NotThere.x{random.hex()}"


class UniqueNames(Protocol):
    """All unique names that sandboxes ever had on the bus, kept where the next gate finds them (name_ledger.py)."""

    def __contains__(self, unique_name: str) -> bool: ...

    def is_doubtful(self, unique_name: str) -> bool:
        """Return whether the answer for a name depends on the unknown id of the bus."""

    def add(self, unique_name: str) -> None:
        """Add a name. Raises OSError."""

    def meet(self, bus_id: str) -> None:
        """Take in the names that are known of this bus. Raises OSError."""

    def move(self, bus_id: str) -> None:
        """Replace all names by those of a new bus. Raises OSError."""

    def dump(self) -> tuple[tuple[str, bytes], ...]:
        """Return all names."""

    def load(self, bus_id: str, dump: tuple[tuple[str, bytes], ...]) -> None:
        """Restore the names from `dump`. Raises ValueError."""


class BusState:
    """The state of a real bus.

    `absent_name` is a name that has no owner and no service file. The bus's answers about it are its answers about every
    name that does not exist. A program that guessed it could own it, and keep the gate from learning them.
    """

    def __init__(self, name: str, address: str, ledger: UniqueNames, absent_name: str) -> None:
        self.name: Final = name
        self.address = address
        self.identities: Final[dict[str, Identity]] = {}
        self.sandboxes: Final[dict[str, str]] = {}  # unique name -> sandbox id
        self.ledger: Final = ledger
        self.absent_name: Final = absent_name
        self.members: Final[set[Member]] = set()
        self.payers: Final = Payers()
        # Unique names of senders whose rules restrict the receivers of their broadcasts.
        self.broadcast_judges: Final[dict[str, Judge]] = {}
        self._closed_recently: Final[OrderedDict[str, None]] = OrderedDict()
        # The lists of rules in `broadcast_judges` that late names have, with those names. The list used last is at the end.
        self._late_lists: Final[OrderedDict[Judge, dict[str, None]]] = OrderedDict()
        self._late_rules = 0
        # Connections that want header field 10 in messages that sandboxes send them.
        self.wants_instance_field: Final[set[str]] = set()
        self._absent_name_errors: dict[str, tuple[str, str]] = {}
        self._guid = ""
        self.connections: Final[set[Closable]] = set()
        self.lingering: Final[dict[str, Lingering]] = {}  # by unique name
        self.barriers: Final[dict[int, Barrier]] = {}
        # For compatibility with xdg-dbus-proxy: apps are told of all unique names that come and go, and a message to a
        # well-known name is judged by that name alone, whatever else its owner owns.
        self.tells_unique_names = False
        self.judges_names_alone = False
        # False: no program may ask about the sandboxes of its connections.
        self.gives_instance_field = True
        # False: no connection to the bus passes descriptors, and apps are told so in the handshake.
        self.takes_fds = True

    def spec(self) -> BusSpec:
        """Return the bus as the supervisor specified it."""
        return BusSpec(name=self.name, address=self.address)

    def authenticated(self, guid: str) -> None:
        """Record the id of the bus that answers at the address.

        Another id means that the bus was restarted and gives the same unique names again. So everything known is
        forgotten, and connections that have not noticed yet are closed.
        """
        if not self._guid:
            self.ledger.meet(guid)
        elif guid != self._guid:
            for connection in list(self.connections):
                connection.close("the bus started anew")
            for rest in list(self.lingering.values()):
                rest.close()
            self.ledger.move(guid)
            self.identities.clear()
            self.sandboxes.clear()
            self.broadcast_judges.clear()
            self._closed_recently.clear()
            self._late_lists.clear()
            self._late_rules = 0
            self.wants_instance_field.clear()
            self._absent_name_errors.clear()
            self.payers.clear()
        self._guid = guid

    @property
    def is_authenticated(self) -> bool:
        """Return whether the bus's id is known."""
        return bool(self._guid)

    def connected(self, unique_name: str, sandbox: str, identity: Identity) -> None:
        """Remember the identity behind a unique name, before the app may use it.

        Raises OSError if the name cannot be written to the ledger. The app must not use the connection then.
        """
        self.ledger.add(unique_name)
        if unique_name in self._closed_recently:
            self._forget(unique_name)
        self.identities[unique_name] = identity
        self.sandboxes[unique_name] = sandbox
        # Unique names can be guessed: a verdict may be older than the connection it is about.
        for member in self.members:
            member.forget_about(unique_name)

    def gone(self, unique_name: str) -> None:
        """Record that the bus has released a connection.

        Its identity is remembered for a while, because its last messages are still to be judged.
        """
        if unique_name in self.identities:
            self._remember_late(unique_name)
        for number in list(self.barriers):
            self.has_read(unique_name, number)
        while self._late_rules > MAX_LATE_RULES and len(self._late_lists) > 1:
            for name in list(next(iter(self._late_lists.values()))):
                self._forget(name)
        while len(self._closed_recently) > MAX_LATE:
            self._forget(next(iter(self._closed_recently)))

    def _remember_late(self, unique_name: str) -> None:
        self._closed_recently[unique_name] = None
        if (judge := self.broadcast_judges.get(unique_name)) is not None:
            if judge not in self._late_lists:
                self._late_lists[judge] = {}
                self._late_rules += len(judge.access.rules)
            self._late_lists[judge][unique_name] = None
            self._late_lists.move_to_end(judge)

    def _forget(self, unique_name: str) -> None:
        """Forget the identity behind the unique name of a closed connection."""
        del self._closed_recently[unique_name]
        del self.identities[unique_name]
        self.sandboxes.pop(unique_name, None)
        judge = self.broadcast_judges.pop(unique_name, None)
        if judge is not None and (names := self._late_lists.get(judge)) is not None:
            names.pop(unique_name, None)
            if not names:
                del self._late_lists[judge]
                self._late_rules -= len(judge.access.rules)

    def wait_read(self, number: int, passed: Callable[[], None]) -> None:
        """Call `passed` once the bus has read everything sandboxes have sent so far."""
        late = set(self._closed_recently)
        names = [name for name in self.sandboxes if name not in late]
        barrier = self.barriers[number] = Barrier(names, passed)
        for connection in list(self.connections):
            connection.ask_if_read(number)
        barrier.check()

    def has_read(self, unique_name: str, number: int) -> None:
        """Record that the bus has read the messages of a connection before its question."""
        if (barrier := self.barriers.get(number)) is not None:
            barrier.take(unique_name)

    def peer(self, unique_name: str) -> Identity | None:
        """Return the identity of a connection in a sandbox, maybe UNKNOWN; None for a host."""
        identity = self.identities.get(unique_name)
        if identity is None and unique_name in self.ledger:
            return UNKNOWN
        return identity

    def who(self, unique_name: str) -> str | None:
        """Return the id of the sandbox of a connection, "" if it is not known; None for a host."""
        sandbox = self.sandboxes.get(unique_name)
        return "" if sandbox is None and self.peer(unique_name) is not None else sandbox

    def set_broadcast_judge(self, unique_name: str, judge: Judge) -> bool:
        """Restrict the receivers of a connection's broadcasts by these rules; return whether that may be a change."""
        before = self.broadcast_judges.pop(unique_name, None)
        if judge.restricts_broadcast_receivers:
            self.broadcast_judges[unique_name] = judge
        return before is not None or judge.restricts_broadcast_receivers

    # -- handing over ------------------------------------------------------------------------

    def dump(self) -> BusDump:
        """Return the state without the connections, which bring their rules with them."""
        # Many connections may share a list of rules.
        gone = sorted({*self._closed_recently, *self.lingering} & self.broadcast_judges.keys())
        late = {name: self.broadcast_judges[name] for name in gone}
        judges = {id(judge): judge for judge in late.values()}
        places = {key: place for place, key in enumerate(judges)}
        return BusDump(
            name=self.name,
            address=self.address,
            guid=self._guid,
            identities=tuple(self.identities.items()),
            sandboxes=tuple(self.sandboxes.items()),
            closed_recently=tuple(self._closed_recently),
            spans=self.ledger.dump(),
            judges=tuple((judge.access, judge.me) for judge in judges.values()),
            broadcast_judges=tuple((name, places[id(judge)]) for name, judge in late.items()),
            wants_instance_field=tuple(sorted(self.wants_instance_field)),
            absent_name_errors=tuple(
                (question, *words) for question, words in self._absent_name_errors.items()
            ),
            payers=self.payers.dump(),
        )

    def load(self, dump: BusDump) -> None:
        """Restore the state from `dump`. Raises ValueError."""
        judges = [Judge(access, bus=self.name, me=me) for access, me in dump.judges]
        self._guid = dump.guid
        self.ledger.load(dump.guid, dump.spans)
        self.identities.update(dump.identities)
        self.sandboxes.update(dump.sandboxes)
        self.broadcast_judges.update((name, judges[place]) for name, place in dump.broadcast_judges)
        for name in dump.closed_recently:
            self._remember_late(name)
        self.wants_instance_field.update(dump.wants_instance_field)
        self._absent_name_errors.update(
            (question, (error, text)) for question, error, text in dump.absent_name_errors
        )
        self.payers.load(dump.payers)

    def resume(self) -> None:
        """Add to the ledger the names that an older gate without a ledger did not. Raises OSError."""
        for unique_name in self.identities:
            self.ledger.add(unique_name)

    # -- this bus's error for names that do not exist -----------------------------------------

    @property
    def knows_absent_name_errors(self) -> bool:
        """Return whether the bus was asked for them."""
        return bool(self._absent_name_errors)

    def learn_absent_name_error(self, question: str, asked: str, error: str, text: str) -> None:
        """Remember the bus's answer to `question` about the name `asked`, which does not exist."""
        if error in (errors.SERVICE_UNKNOWN, errors.NAME_HAS_NO_OWNER):
            self._absent_name_errors[question] = (error, text.replace(asked, "\0"))

    def absent_name_error(self, question: str, name: str) -> tuple[str, str]:
        """Return the error name and text that this bus gives for a name that does not exist.

        `question` is "call", "call-no-start", "unique", "unique-no-start" or a driver method's name.
        """
        error, text = self._absent_name_errors.get(question) or _WORDING.get(
            question, _WORDING["GetNameOwner"]
        )
        return error, text.replace("\0", name)


# The errors of dbus-daemon, until the bus was asked.
_NOT_PROVIDED: Final = (
    errors.SERVICE_UNKNOWN,
    "The name \0 was not provided by any .service files",
)
_NOT_EXISTING: Final = (errors.NAME_HAS_NO_OWNER, 'Name "\0" does not exist')
_WORDING: Final = {
    "call": _NOT_PROVIDED,
    "call-no-start": _NOT_EXISTING,
    "unique": _NOT_PROVIDED,
    "unique-no-start": _NOT_EXISTING,
    "StartServiceByName": _NOT_PROVIDED,
    "GetNameOwner": (
        errors.NAME_HAS_NO_OWNER,
        "Could not get owner of name '\0': no such name",
    ),
}
