"""What all connections of one gate to one bus share: who is who, and how that bus words its errors.

Identity is exact because it is learned from the Hello reply as it passes through the gate, before
that connection can say anything else: a unique name that is not here is a host's.
"""

import os
import socket
from collections import OrderedDict
from typing import Final, Protocol

from broker.gate.connector import Done, connect
from broker.gate.control import BusSpec
from broker.gate.handover import BusDump
from broker.gate.loop import Loop
from broker.gate.payers import Payers
from broker.wire import errors
from broker.wire.sasl import Client, SaslClient
from policy.match import Judge
from policy.rules import Identity

DRIVER: Final = "org.freedesktop.DBus"
DRIVER_PATH: Final = "/org/freedesktop/DBus"

# A name that nobody owns and that no service file gives: what a bus says of it is what it says of
# every name that is not there.
# Nobody can guess it, own it, and leave us without an answer.
ABSENT: Final = f"org.buswarden.NotThere.x{os.urandom(16).hex()}"
ABSENT_UNIQUE: Final = ":0.4294967295"


# Connections that are closed and still have a name, because messages of theirs may be on their way. Each
# of them took a handshake with the bus, which hands out messages in the meantime.
MAX_LATE: Final = 4096


class Member(Protocol):
    """What the bus has to know of a connection: see `Bus.connected`."""

    def stranger_appeared(self, unique_name: str) -> None:
        """Forget what was decided for this unique name while it was a host's."""

    def forget_verdicts(self) -> None:
        """Forget everything that was decided."""


class Closable(Protocol):
    """A connection to the bus."""

    def close(self, reason: str) -> None:
        """End it."""


class Bus:
    """One real bus."""

    def __init__(self, name: str, address: str) -> None:
        self.name: Final = name
        self.address = address
        self.identities: Final[dict[str, Identity]] = {}
        self.sandboxes: Final[dict[str, str]] = {}  # unique name -> sandbox id
        self.members: Final[set[Member]] = set()
        self.payers: Final = Payers()
        # Senders whose rules say which apps hear their broadcasts: their unique names.
        self.speakers: Final[dict[str, Judge]] = {}
        self._late: Final[OrderedDict[str, None]] = OrderedDict()
        # Connections that want header field 10 on what sandboxes send them.
        self.tagged: Final[set[str]] = set()
        self._wording: dict[str, tuple[str, str]] = {}
        self._guid = ""
        self.links: Final[set[Closable]] = set()
        # Both are ways of xdg-dbus-proxy, for who is to pass for it. All unique names may be heard to come
        # and go; a well-known name is judged as itself alone, whatever else its owner owns.
        self.tells_unique_names = False
        self.judges_names_alone = False
        # False: no connection to it passes descriptors, and apps are told so in the handshake.
        self.takes_fds = True

    def spec(self) -> BusSpec:
        """Return it as the supervisor knows it."""
        return BusSpec(name=self.name, address=self.address)

    def connect(self, loop: Loop, address: str, uid: int, done: Done) -> None:
        """Connect as that user; `address` is the bus's own, or one that it made for a sandbox."""
        connect(loop, address, uid, done)

    def make_client(self, sock: socket.socket, uid: int) -> Client:
        """Return who does the handshake on a new connection."""
        return SaslClient(uid)

    def met(self, guid: str) -> None:
        """Take note of who answers at the address.

        Another bus than before has given unique names anew: what was known is about others, and whoever
        is still connected to the old one has only not heard yet.
        """
        if self._guid and guid != self._guid:
            for link in list(self.links):
                link.close("the bus started anew")
            self.identities.clear()
            self.sandboxes.clear()
            self.speakers.clear()
            self._late.clear()
            self.tagged.clear()
            self._wording.clear()
            self.payers.clear()
        self._guid = guid

    def connected(self, unique_name: str, sandbox: str, identity: Identity) -> None:
        """Remember who is behind a unique name. Call it before the app can use the connection."""
        self.identities[unique_name] = identity
        self._late.pop(unique_name, None)
        self.sandboxes[unique_name] = sandbox
        for member in self.members:
            member.stranger_appeared(unique_name)

    def gone(self, unique_name: str) -> None:
        """Note that a connection is closed.

        Who it was is remembered for a while: what it sent last is still to be judged, and must not pass for
        a host's. The bus gives its name to nobody else, unless it starts anew: then all members go.
        """
        self.sandboxes.pop(unique_name, None)
        if unique_name in self.identities:
            self._late[unique_name] = None
        while self._late and (len(self._late) > MAX_LATE or not self.members):
            oldest, _ = self._late.popitem(last=False)
            del self.identities[oldest]
            self.speakers.pop(oldest, None)

    def speaks(self, unique_name: str, judge: Judge) -> bool:
        """Let a connection's broadcasts be heard by whom these rules say; return whether that may be a change."""
        before = self.speakers.pop(unique_name, None)
        if judge.hearers_matter:
            self.speakers[unique_name] = judge
        return before is not None or judge.hearers_matter

    # -- handing over ------------------------------------------------------------------------

    def dump(self) -> BusDump:
        """Return all but the connections, which bring their rules with them."""
        # One list of rules has spoken for many connections, maybe.
        late = {name: self.speakers[name] for name in self._late if name in self.speakers}
        judges = {id(judge): judge for judge in late.values()}
        places = {key: place for place, key in enumerate(judges)}
        return BusDump(
            name=self.name,
            address=self.address,
            guid=self._guid,
            identities=tuple(self.identities.items()),
            sandboxes=tuple(self.sandboxes.items()),
            late=tuple(self._late),
            judges=tuple((judge.access, judge.me) for judge in judges.values()),
            speakers=tuple((name, places[id(judge)]) for name, judge in late.items()),
            tagged=tuple(sorted(self.tagged)),
            wording=tuple((question, *words) for question, words in self._wording.items()),
            payers=self.payers.dump(),
        )

    def load(self, dump: BusDump) -> None:
        """Know what the one knew that made the dump."""
        judges = [Judge(access, bus=self.name, me=me) for access, me in dump.judges]
        self._guid = dump.guid
        self.identities.update(dump.identities)
        self.sandboxes.update(dump.sandboxes)
        self._late.update(dict.fromkeys(dump.late))
        self.speakers.update((name, judges[place]) for name, place in dump.speakers)
        self.tagged.update(dump.tagged)
        self._wording.update((question, (error, text)) for question, error, text in dump.wording)
        self.payers.load(dump.payers)

    # -- how this bus words "there is no such name" ------------------------------------------

    @property
    def wording_known(self) -> bool:
        """True when the bus has been asked."""
        return bool(self._wording)

    def learn_wording(self, question: str, asked: str, error: str, text: str) -> None:
        """Take the answer to `question` about ABSENT or ABSENT_UNIQUE as the bus's way of saying so."""
        if error in (errors.SERVICE_UNKNOWN, errors.NAME_HAS_NO_OWNER):
            self._wording[question] = (error, text.replace(asked, "\0"))

    def no_such_name(self, question: str, name: str) -> tuple[str, str]:
        """Return the error name and text that this bus gives for a name that does not exist.

        `question` is "call", "call-no-start", "unique", "unique-no-start" or a driver method's name.
        """
        error, text = self._wording.get(question) or _WORDING.get(
            question, _WORDING["GetNameOwner"]
        )
        return error, text.replace("\0", name)


# dbus-daemon's, until the bus in use has been heard.
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
