"""Who owns the names that matter to one connection, learned on that connection. No I/O.

Only on the app's own connection is an owner change certain to come before the new owner's
messages, so each connection asks for itself: a match rule first, the question second, and the last
word wins. While an answer is missing, `waiting` is above zero and what needs it is held.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Final

from broker.gate.bus import ABSENT, ABSENT_UNIQUE, DRIVER
from broker.gate.core import MAX_FORMER_OWNERS, Core, Special, Target
from broker.wire import marshal
from broker.wire.errors import PeerQuotaError
from broker.wire.header import Flag, Header, MessageType
from broker.wire.marshal import Value
from policy.match import NamesUsed

_OWNER_CHANGED: Final = (
    "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',"
    "member='NameOwnerChanged'"
)
_LOOK_UPS: Final = (
    "GetNameOwner",
    "GetConnectionUnixProcessID",
    "GetConnectionUnixUser",
    "GetConnectionCredentials",
    "GetConnectionSELinuxSecurityContext",
    "GetAdtAuditSessionData",
)
# With more names than this, one match for every owner change is cheaper, and the system bus takes 512 at most.
MAX_NARROW_MATCHES: Final = 64


class Owners:
    """The names of one connection's rules, and those its app wrote to."""

    def __init__(self, core: Core, synced: Callable[[], None]) -> None:
        self._core: Final = core
        self._synced: Final = synced
        self.names: Final[dict[str, Target]] = {}
        self.waiting = 0  # answers that are on their way
        self._then: Callable[[], None] | None = None
        self._by_owner: Final[dict[str, set[str]]] = {}
        self._extra: Final[OrderedDict[str, None]] = OrderedDict()
        self._uses = NamesUsed(exact=frozenset(), subtrees=frozenset(), globs=False)
        self._matches: Final[set[str]] = set()

    @property
    def extra_count(self) -> int:
        """How many names are followed that no rule names."""
        return len(self._extra)

    def names_of(self, unique_name: str) -> set[str]:
        """Return the unique name and the names that we know it to own."""
        return {unique_name, *self._by_owner.get(unique_name, ())}

    # -- what to know -------------------------------------------------------------------------

    def use(self, uses: NamesUsed, then: Callable[[], None] | None = None) -> None:
        """Know these names from now on; call `then` when all are known (maybe at once)."""
        self._then = then
        self.waiting += 1  # keeps synced() from coming early
        before, self._uses = self._uses, uses
        asked = {_target_of(entry).name for entry in self._core.pending.values()}
        for name in [name for name in self.names if not self._relevant(name)]:
            if name in asked:  # its reply is still to be recognised
                self._extra[name] = None
            else:
                self._forget(name)
        self._set_matches()
        wanted = uses.exact - self.names.keys() - {DRIVER}
        if self._wide or uses.subtrees - before.subtrees or (uses.globs and not before.globs):
            self._ask("ListNames", "", (), partial(self._listed, wanted))
        else:
            for name in sorted(wanted):
                self._ask_owner(name)
        self._answered()

    def ask(self, name: str) -> None:
        """Know one more name, which no rule names."""
        self._extra[name] = None
        while len(self._extra) > max(self._core.sandbox.limits.tracked_names, 1):
            oldest, _ = self._extra.popitem(last=False)
            if not self._relevant(oldest):
                self._forget(oldest)
        self._set_matches()
        self._ask_owner(name)

    def ask_wording(self) -> None:
        """Ask the bus what it says of names that are not there, to say the same of hidden ones."""
        for question in _LOOK_UPS:
            self._ask(question, "s", (ABSENT,), partial(self._worded, question))
        self._ask(
            "StartServiceByName", "su", (ABSENT, 0), partial(self._worded, "StartServiceByName")
        )
        for question, flags in (("", 0), ("-no-start", Flag.NO_AUTO_START)):
            self._ping(ABSENT, flags, f"call{question}")
            self._ping(ABSENT_UNIQUE, flags, f"unique{question}")

    def _ping(self, name: str, flags: int, question: str) -> None:
        def finish(header: Header, data: bytes, _fds: tuple[int, ...]) -> None:
            self._worded(question, header, data)
            self._answered()

        serial = self._core.own_serial()
        self._core.pending[serial] = Special(finish, Target(name), is_own=True)
        self.waiting += 1
        self._core.to_bus.append(
            marshal.make_call(
                serial,
                destination=name,
                path="/",
                interface="org.freedesktop.DBus.Peer",
                member="Ping",
                flags=flags,
            )
        )

    def _worded(self, question: str, header: Header, data: bytes) -> None:
        if header.type == MessageType.ERROR and header.signature == "s":
            (text,) = marshal.read_body("s", data[header.size :], little=header.little)
            self._core.bus.learn_wording(question, header.error_name or "", str(text))

    def used(self, name: str) -> None:
        """Keep a name that no rule names a while longer."""
        if name in self._extra:
            self._extra.move_to_end(name)

    def changed(self, name: str, new: str) -> bool:
        """Take note of an owner change ("" is nobody); return whether the name matters here."""
        target = self.names.get(name)
        if target is None:
            if not self._relevant(name):
                return False
            target = self.names[name] = Target("", name)
        old = target.owner
        if old == new:
            return True
        if old:
            owned = self._by_owner[old]
            owned.discard(name)
            if not owned:
                del self._by_owner[old]
        if new:
            self._by_owner.setdefault(new, set()).add(name)
        self._follow(target, old, new)
        target.owner = new
        if not new and name not in self._uses.exact and name not in self._extra:
            del self.names[name]  # names come and go: those of a subtree or glob have no end
        self._core.forget_verdicts()
        return True

    # -- inside --------------------------------------------------------------------------------

    @property
    def _wide(self) -> bool:
        uses = self._uses
        number = len(uses.exact) + len(uses.subtrees) + len(self._extra)
        return uses.globs or number > MAX_NARROW_MATCHES

    def _relevant(self, name: str) -> bool:
        uses = self._uses
        if uses.globs or name in uses.exact or name in uses.subtrees or name in self._extra:
            return True
        parts = name.split(".")
        return any(".".join(parts[:n]) in uses.subtrees for n in range(1, len(parts)))

    def _follow(self, target: Target, old: str, new: str) -> None:
        """Let waiting calls to this name be answered by whoever owned it since they were made."""
        for serial, entry in list(self._core.pending.items()):
            waiting = _target_of(entry)
            if waiting.name != target.name:
                continue
            former = waiting.former if len(waiting.former) < MAX_FORMER_OWNERS else frozenset()
            followed = Target(new, target.name, former | {old} if old else former)
            if isinstance(entry, Special):
                entry.target = followed
            else:
                self._core.pending[serial] = followed

    def _forget(self, name: str) -> None:
        target = self.names.pop(name, None)
        if target is not None and target.owner:
            owned = self._by_owner[target.owner]
            owned.discard(name)
            if not owned:
                del self._by_owner[target.owner]
        self._core.forget_verdicts()

    def _set_matches(self) -> None:
        """Bring the match rules of the connection in line with what is to be known."""
        uses = self._uses
        if self._wide:
            wanted = {_OWNER_CHANGED}
        else:
            wanted = {f"{_OWNER_CHANGED},arg0='{name}'" for name in (*uses.exact, *self._extra)}
            wanted |= {f"{_OWNER_CHANGED},arg0namespace='{base}'" for base in uses.subtrees}
        for text in sorted(wanted - self._matches):
            self._ask("AddMatch", "s", (text,), _must_work)
        for text in sorted(self._matches - wanted):
            self._core.call_driver("RemoveMatch", "s", (text,), _ignore)
        self._matches.clear()
        self._matches.update(wanted)

    def _ask(
        self,
        member: str,
        signature: str,
        values: tuple[Value, ...],
        use: Callable[[Header, bytes], None],
    ) -> None:
        def finish(header: Header, data: bytes, _fds: tuple[int, ...]) -> None:
            use(header, data)
            self._answered()

        self.waiting += 1
        self._core.call_driver(member, signature, values, finish)

    def _answered(self) -> None:
        self.waiting -= 1
        if not self.waiting:
            then, self._then = self._then, None
            if then is not None:
                then()
            self._synced()

    def _ask_owner(self, name: str) -> None:
        self.names.setdefault(name, Target("", name))
        self._ask("GetNameOwner", "s", (name,), partial(self._told, name))

    def _told(self, name: str, header: Header, data: bytes) -> None:
        owner = ""
        if header.type == MessageType.METHOD_RETURN:
            owner = str(marshal.read_body("s", data[header.size :], little=header.little)[0])
        if name in self.names:
            self.changed(name, owner)

    def _listed(self, wanted: frozenset[str], header: Header, data: bytes) -> None:
        if header.type != MessageType.METHOD_RETURN:
            raise PeerQuotaError("the bus does not list its names")
        (names,) = marshal.read_body("as", data[header.size :], little=header.little)
        assert isinstance(names, tuple)
        there = {n for n in names if n[0] != ":" and n != DRIVER and self._relevant(n)}
        for name in wanted - there:
            self.names.setdefault(name, Target("", name))
        for name in sorted(there - {n for n, t in self.names.items() if t.owner}):
            self._ask_owner(name)


def _target_of(entry: Target | Special) -> Target:
    return entry.target if isinstance(entry, Special) else entry


def _must_work(header: Header, _data: bytes) -> None:
    if header.type != MessageType.METHOD_RETURN:
        # Without it an owner change could be missed, and a right outlive its reason.
        raise PeerQuotaError("the bus takes no more match rules from this connection")


def _ignore(_header: Header, _data: bytes, _fds: tuple[int, ...]) -> None:
    """Whether a match rule of ours was there to be removed makes no difference."""
