"""The owners of the names that matter to a connection, learned on that connection. No I/O.

The names are those of the app's rules, and those that the app wrote to. Only on the app's own connection does an owner
change certainly come before the new owner's messages. So each connection asks the bus for itself: it adds a match rule
first and asks for the owner second, and the last word wins:

    app                gate                                                       bus
     | call org.a #5 -> | waiting: 1, and the call is held                         |
     |                  | AddMatch NameOwnerChanged, arg0='org.a' ---------------> |
     |                  | GetNameOwner org.a ------------------------------------> |
     |                  | <---------------- NameOwnerChanged org.a :1.2 -> :1.3    |
     |                  | <------------------------------------------------ :1.3   |
     |                  | waiting: 0, and the call is judged with the owner :1.3   |
     |                  | call org.a #5 -----------------------------------------> |

While `waiting` is above zero, messages that need owners are held: those of the app to others, and those of others to the
app. NameOwnerChanged is held as well, because telling the app of a change takes all owners to be known.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from typing import Final
from weakref import WeakValueDictionary

from broker.gate.dumps import HistoryDump, OwnersDump, ReplyAction
from broker.gate.filter.bus_state import ABSENT_UNIQUE
from broker.gate.filter.chores import NAME_WORK, Work
from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.owner_views import Views
from broker.gate.filter.pending_calls import (
    MAX_FORMER_OWNERS,
    InterceptedCall,
    OwnerHistory,
    OwnersSince,
    Replier,
)
from broker.gate.output import EMPTY_QUEUE
from broker.wire import marshal
from broker.wire.errors import PeerQuotaError
from broker.wire.header import Flag, Header, MessageType
from broker.wire.interfaces import DRIVER, DRIVER_PATH, PEER
from broker.wire.marshal import Value
from policy.match import NamesUsed

# With a path_namespace, which no rule of an app has (driver_calls.py), and as MatchRule.canonical() writes it.
_OWNER_CHANGED: Final = (
    f"type='signal',sender='{DRIVER}',interface='{DRIVER}',"
    f"member='NameOwnerChanged',path_namespace='{DRIVER_PATH}'"
)
_LOOK_UPS: Final = (
    "GetNameOwner",
    "GetConnectionUnixProcessID",
    "GetConnectionUnixUser",
    "GetConnectionCredentials",
    "GetConnectionSELinuxSecurityContext",
    "GetAdtAuditSessionData",
)
# With more names than this, one match rule for all owner changes is cheaper. The system bus takes 512 rules at most.
MAX_NARROW_MATCHES: Final = 64
# Names whose owner is asked for at a time. With a glob there may be hundreds when an app connects, and long work in the
# gate makes all other connections wait.
ASKED_A_TURN: Final = 4


class NameOwners:
    """The names of a connection's rules and those that its app wrote to, with their owners."""

    def __init__(self, state: ConnectionState, synced: Callable[[], None]) -> None:
        self._state: Final = state
        self._synced: Final = synced
        self.names: Final[dict[str, Replier]] = {}
        self.waiting = 0  # answers and chores that are not done
        self._when_known: Callable[[], Work] | None = None
        self.views: Final = Views(state.bus)
        # The owner changes of names, as long as calls to them wait, which keep the histories alive.
        self._histories: WeakValueDictionary[str, OwnerHistory] | None = None
        self._extra: Final[OrderedDict[str, None]] = OrderedDict()
        # Names whose owner is still to be asked for, and the number of those that the bus was asked for.
        self._unasked: deque[str] = EMPTY_QUEUE
        self._asking = 0
        self._uses = NamesUsed(exact=frozenset(), subtrees=frozenset(), globs=False)
        self._matches: Final[set[str]] = set()
        state.reply_handlers["owner"] = self._told
        state.reply_handlers["owners"] = self._listed
        state.reply_handlers["wording"] = self._worded
        state.reply_handlers["must-work"] = self._worked

    @property
    def extra_count(self) -> int:
        """The number of followed names that no rule has."""
        return len(self._extra)

    def names_of(self, unique_name: str) -> set[str]:
        """Return the unique name and the followed names that it owns."""
        return self.views.names_of(unique_name)

    # -- followed names -----------------------------------------------------------------------

    def follow(self, uses: NamesUsed, when_known: Callable[[], Work] | None = None) -> Work:
        """Follow these names from now on, and do the work of `when_known` when all owners are known.

        They may be known at once.
        """
        self._when_known = when_known
        self.waiting += 1  # keeps `_synced` from being called early
        before, self._uses = self._uses, uses
        asked = {_replier_of(entry).name for entry in self._state.pending.calls_to_bus.values()}
        for name in list(self.names):
            yield NAME_WORK
            if self._relevant(name):
                continue
            if name in asked:  # its reply is still to be recognised
                self._extra[name] = None
            else:
                self._forget(name)
        self._set_matches()
        wanted = uses.exact - self.names.keys() - {DRIVER}
        if self._wide or uses.subtrees - before.subtrees or (uses.globs and not before.globs):
            self._ask("ListNames", "", (), ReplyAction("owners", tuple(sorted(wanted))))
        else:
            for name in sorted(wanted):
                self._ask_owner(name)
        self._answered()

    def look_up(self, name: str) -> None:
        """Follow one more name, which no rule has."""
        self._extra[name] = None
        while len(self._extra) > max(self._state.sandbox.limits.tracked_names, 1):
            oldest, _ = self._extra.popitem(last=False)
            if not self._relevant(oldest):
                self._forget(oldest)
        self._set_matches()
        self._ask_owner(name)

    def look_up_absent_names(self) -> None:
        """Ask the bus about names that do not exist, to say the same of hidden ones."""
        absent = self._state.bus.absent_name
        for question in _LOOK_UPS:
            self._ask(question, "s", (absent,), ReplyAction("wording", (question, absent)))
        action = ReplyAction("wording", ("StartServiceByName", absent))
        self._ask("StartServiceByName", "su", (absent, 0), action)
        for question, flags in (("", 0), ("-no-start", Flag.NO_AUTO_START)):
            self._ping(absent, flags, f"call{question}")
            self._ping(ABSENT_UNIQUE, flags, f"unique{question}")

    def _ping(self, name: str, flags: int, question: str) -> None:
        serial = self._state.pending.next_gate_serial()
        action = ReplyAction("wording", (question, name))
        self._state.pending.calls_to_bus[serial] = InterceptedCall(
            action, Replier(name), is_own=True
        )
        self.waiting += 1
        self._state.to_bus.append(
            marshal.make_call(
                serial,
                destination=name,
                path="/",
                interface=PEER,
                member="Ping",
                flags=flags,
            )
        )

    def _worded(
        self, action: ReplyAction, header: Header, data: bytes, _fds: tuple[int, ...]
    ) -> None:
        if header.type == MessageType.ERROR and header.signature == "s":
            (text,) = marshal.read_body("s", data[header.size :], little=header.little)
            question, asked = map(str, action.values)
            self._state.bus.learn_absent_name_error(
                question, asked, header.error_name or "", str(text)
            )
        self._answered()

    def touch(self, name: str) -> None:
        """Make a followed name that no rule has the last to be forgotten."""
        if name in self._extra:
            self._extra.move_to_end(name)

    def owner_changed(self, name: str, new: str) -> bool:
        """Record an owner change ("" stands for no owner); return whether the name is followed."""
        replier = self.names.get(name)
        if replier is None:
            if not self._relevant(name):
                return False
            replier = self.names[name] = Replier("", name)
        old = replier.owner
        if old == new:
            return True
        if old:
            self.views.take(old, name)
        if new:
            self.views.give(new, name)
        self._follow(replier, old, new)
        if not new and name not in self._uses.exact and name not in self._extra:
            del self.names[name]  # the names of a subtree or glob come and go without end
        self._state.verdicts.forget_about(name, old, new)
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

    def _follow(self, replier: Replier, old: str, new: str) -> None:
        """Let waiting calls to this name be answered by all its owners since they were made.

        Those calls share `replier`, or one from before an earlier change. Later calls have another.
        """
        self._keep_history(replier).add(old, new)
        self.names[replier.name] = Replier(new, replier.name)

    def _keep_history(self, replier: Replier) -> OwnerHistory:
        """Let the calls that wait for `replier` know all owner changes from now on."""
        history = self._history_of(replier.name)
        if not isinstance(replier.former, OwnersSince):
            replier.former = OwnersSince(history)
        return history

    def _history_of(self, name: str) -> OwnerHistory:
        if self._histories is None:
            self._histories = WeakValueDictionary()
        history = self._histories.get(name)
        if history is None:
            history = self._histories[name] = OwnerHistory(MAX_FORMER_OWNERS - 1)
        return history

    def changes_of(self, name: str) -> int:
        """Return how often a name with waiting calls has changed its owner."""
        history = self._histories.get(name) if self._histories is not None else None
        return history.count if history is not None else 0

    def _forget(self, name: str) -> None:
        replier = self.names.pop(name, None)
        if replier is None:
            return
        self._keep_history(replier)
        if replier.owner:
            self.views.take(replier.owner, name)
        self._state.verdicts.forget_about(name, replier.owner)

    def _set_matches(self) -> None:
        """Add and remove match rules of the gate, so that they cover the followed names."""
        uses = self._uses
        if self._wide:
            wanted = {_OWNER_CHANGED}
        else:
            wanted = {f"{_OWNER_CHANGED},arg0='{name}'" for name in (*uses.exact, *self._extra)}
            wanted |= {f"{_OWNER_CHANGED},arg0namespace='{base}'" for base in uses.subtrees}
        for text in sorted(wanted - self._matches):
            self._ask("AddMatch", "s", (text,), ReplyAction("must-work"))
        for text in sorted(self._matches - wanted):
            self._state.call_driver("RemoveMatch", "s", (text,), ReplyAction("ignore"))
        self._matches.clear()
        self._matches.update(wanted)

    def _ask(
        self, member: str, signature: str, values: tuple[Value, ...], action: ReplyAction
    ) -> None:
        self.waiting += 1
        self._state.call_driver(member, signature, values, action)

    def hold(self, work: Work) -> None:
        """Begin a chore, and hold messages that need owners until its end."""
        self.waiting += 1
        self._state.chores.begin(self._held(work))

    def _held(self, work: Work) -> Work:
        yield from work
        self._answered()

    def _answered(self) -> None:
        self.waiting -= 1
        if self.waiting:
            return
        when_known, self._when_known = self._when_known, None
        if when_known is not None:
            self.hold(when_known())
        else:
            self._synced()

    def _ask_owner(self, name: str) -> None:
        self.names.setdefault(name, Replier("", name))
        self.waiting += 1
        if self._unasked is EMPTY_QUEUE:
            self._unasked = deque()
        self._unasked.append(name)
        self._ask_on()

    def _ask_on(self) -> None:
        """Ask for the owners of the next names, a few at a time."""
        while self._unasked and self._asking < ASKED_A_TURN:
            self._asking += 1
            name = self._unasked.popleft()
            self._state.call_driver("GetNameOwner", "s", (name,), ReplyAction("owner", (name,)))
        if not self._unasked:
            self._unasked = EMPTY_QUEUE

    def _told(
        self, action: ReplyAction, header: Header, data: bytes, _fds: tuple[int, ...]
    ) -> None:
        self._asking = max(0, self._asking - 1)  # an earlier gate did not count
        self._ask_on()
        name, owner = str(action.values[0]), ""
        if header.type == MessageType.METHOD_RETURN:
            owner = str(marshal.read_body("s", data[header.size :], little=header.little)[0])
        if name in self.names:
            self.owner_changed(name, owner)
        self._answered()

    def _listed(
        self, action: ReplyAction, header: Header, data: bytes, _fds: tuple[int, ...]
    ) -> None:
        if header.type != MessageType.METHOD_RETURN:
            raise PeerQuotaError("the bus does not list its names")
        (names,) = marshal.read_body("as", data[header.size :], little=header.little)
        assert isinstance(names, tuple)
        self.hold(self._take_list(names, tuple(map(str, action.values))))
        self._answered()

    def _take_list(self, names: tuple[Value, ...], wanted: tuple[str, ...]) -> Work:
        """Ask for the owners of listed names. Wanted names that are not listed have no owner."""
        there = frozenset(map(str, names))
        for name in wanted:
            yield NAME_WORK
            # The rules may have changed since, and no owner is recorded of a name that is not followed.
            if name not in there and self._relevant(name):
                self.names.setdefault(name, Replier("", name))
        for name in sorted(there - {DRIVER}):
            if name[0] == ":":
                continue
            yield NAME_WORK
            replier = self.names.get(name)
            if (replier is None or not replier.owner) and self._relevant(name):
                self._ask_owner(name)

    def _worked(
        self, _action: ReplyAction, header: Header, _data: bytes, _fds: tuple[int, ...]
    ) -> None:
        if header.type != MessageType.METHOD_RETURN:
            # Without the match rule an owner change could be missed, and a permission outlive its reason.
            raise PeerQuotaError("the bus takes no more match rules from this connection")
        self._answered()

    # -- handing over ---------------------------------------------------------------------------

    def dump(self, asked: Collection[str]) -> OwnersDump:
        """Return the state. `asked` has the names with waiting calls."""
        return OwnersDump(
            names=tuple((name, replier.owner) for name, replier in self.names.items()),
            waiting=self.waiting,
            tells=self._when_known is not None,
            extra=tuple(self._extra),
            exact=tuple(sorted(self._uses.exact)),
            subtrees=tuple(sorted(self._uses.subtrees)),
            globs=self._uses.globs,
            matches=tuple(sorted(self._matches)),
            histories=tuple(self._dump_history(name) for name in sorted(asked)),
            unasked=tuple(self._unasked),
            asking=self._asking,
        )

    def _dump_history(self, name: str) -> HistoryDump:
        history = self._histories.get(name) if self._histories is not None else None
        if history is None:
            return HistoryDump(name=name)
        return HistoryDump(name=name, count=history.count, changes=history.changes)

    def load(self, dump: OwnersDump, when_known: Callable[[], Work]) -> Sequence[OwnerHistory]:
        """Restore the state from `dump`; return the histories, which the caller keeps alive until calls have them.

        `when_known` returns the work for the moment when all owners are known, if that was not done.
        """
        for name, owner in dump.names:
            self.names[name] = Replier(owner, name)
            if owner:
                self.views.give(owner, name)
        histories = [self._history_of(one.name) for one in dump.histories]
        for history, one in zip(histories, dump.histories, strict=True):
            history.restore(one.count, one.changes)
        self.waiting = dump.waiting
        self._when_known = when_known if dump.tells else None
        self._extra.update(dict.fromkeys(dump.extra))
        self._uses = NamesUsed(
            exact=frozenset(dump.exact), subtrees=frozenset(dump.subtrees), globs=dump.globs
        )
        self._matches.update(dump.matches)
        if dump.unasked:
            self._unasked = deque(dump.unasked)
        self._asking = dump.asking
        return histories

    def since(self, name: str, count: int) -> OwnersSince:
        """Return the owners of a name from its change number `count` on."""
        return OwnersSince(self._history_of(name), count)

    @property
    def uses(self) -> NamesUsed:
        """The names of the rules that were last applied."""
        return self._uses


def _replier_of(entry: Replier | InterceptedCall) -> Replier:
    return entry.replier if isinstance(entry, InterceptedCall) else entry
