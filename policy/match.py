"""The judgement: an AccessList compiled into an index, and questions to it. Pure.

A Judge does not change: new rules are a new Judge. It answers for one sandbox on one bus, and is told who the
other end is; it keeps nothing of what it was asked. docs/policy.md says what the rules mean.

How the index works. Rules are put into buckets by what they name: nothing, an exact name, a subtree, a
glob. Which buckets a name belongs to is found once and remembered. Within a bucket rules are filed by
their interface if they say one literally. So of a thousand rules a question tries those few
that could be about it; they are tried in turn, by the fixed beginnings of their patterns first.
"""

import enum
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

import msgspec

from policy.globs import (
    Predicate,
    compile_interface,
    compile_member_glob,
    compile_name,
    compile_path,
    parse_name_pattern,
    stem,
)
from policy.rules import Access, AccessList, Identity, Peer, Rule
from policy.text import format_rule

# D-Bus sets no limit to a path, and a glob takes time quadratic in it (policy.globs): 2048
# characters are some tens of milliseconds for the worst of patterns.
MAX_PATH: Final = 2048
# Names whose place in an index is remembered.
MAX_KNOWN_NAMES: Final = 512
# To whom the design sends broadcasts: to nobody, or to the bus itself.
BUS_NAME: Final = "org.freedesktop.DBus"
# `*` asks for no name in particular: it matches whoever the other end is.
_ANY_NAME: Final = frozenset({None, "*"})


class Verdict(msgspec.Struct, frozen=True):
    """A judgement, the rule that gave it (none: no rule matched), and the reason in a line."""

    allowed: bool
    rule: Rule | None
    reason: str


class NamesUsed(msgspec.Struct, frozen=True, kw_only=True):
    """The bus names whose owners the rules ask for."""

    exact: frozenset[str]
    subtrees: frozenset[str]  # the base: without `.*`
    globs: bool  # there are others, so any name may matter


NO_SEND: Final = Verdict(allowed=False, rule=None, reason="no rule allows sending it")
NO_RECEIVE: Final = Verdict(allowed=False, rule=None, reason="no rule allows receiving it")
NO_OWN: Final = Verdict(allowed=False, rule=None, reason="no rule allows owning the name")
NO_SEE: Final = Verdict(allowed=False, rule=None, reason="no rule allows seeing the name")
NO_START: Final = Verdict(allowed=False, rule=None, reason="no rule allows sending to the name")
FROM_HOST: Final = Verdict(allowed=True, rule=None, reason="what the host sends is let in")
LONG_PATH: Final = Verdict(
    allowed=False, rule=None, reason=f"object path longer than {MAX_PATH} characters"
)


class Judge:
    """What one access list says on one bus. Raises PatternError for a list with a bad pattern.

    `names` are all names that the other end is known by: those it owns, its unique name, and the
    name in the message. `peer` is who the other end is; None is the host.
    """

    def __init__(self, access: AccessList, *, bus: str, me: Identity) -> None:
        self.access: Final = access
        self.me: Final = me
        rules = [rule for rule in access.rules if rule.bus is None or rule.bus == bus]
        self._receive_from_host: Final = access.receive_from_host
        send = [rule for rule in rules if Access.SEND in rule.access]
        receive = [rule for rule in rules if Access.RECEIVE in rule.access]
        own = [rule for rule in rules if Access.OWN in rule.access]
        name_and_peer = _Heed.NAME | _Heed.PEER
        self._send: Final = _Table(send, me, _Heed.ALL, NO_SEND)
        self._broadcast: Final = _Table(_for_broadcasts(send), me, _Heed.MESSAGE, NO_SEND)
        self._receive: Final = _Table(receive, me, _Heed.ALL, NO_RECEIVE)
        self._own: Final = _Table(own, me, _Heed.NAME, NO_OWN)
        self._see: Final = _Table(_for_sight(rules), me, name_and_peer, NO_SEE)
        self._start: Final = _Table(_for_starting(send), me, name_and_peer, NO_START)
        broadcasts = _about_broadcasts(send)
        self.hearers_matter: Final = any(rule.peer is not None for rule in broadcasts)
        heard = broadcasts if self.hearers_matter else []
        self._hear: Final = _Table(heard, me, _Heed.MESSAGE | _Heed.PEER, NO_SEND)
        self.uses: Final = _names_used(rules)
        self.any_send: Final = any(not rule.deny for rule in send)
        self.owner_matters: Final = any(
            rule.name is not None or rule.peer is not None for rule in rules
        )

    def send(
        self,
        names: Collection[str],
        path: str | None,
        interface: str | None,
        member: str | None,
        peer: Identity | None,
    ) -> Verdict:
        """Judge a call or unicast signal out of the sandbox."""
        return self._send.judge(names, _Question(path, interface, member, peer))

    def broadcast(self, path: str | None, interface: str | None, member: str | None) -> Verdict:
        """Judge a broadcast out of the sandbox, whoever may hear it: `hear` judges that."""
        return self._broadcast.judge((), _Question(path, interface, member, None))

    def hear(
        self, path: str | None, interface: str | None, member: str | None, peer: Identity
    ) -> Verdict:
        """Judge whether another app may hear a broadcast out of this sandbox.

        To be asked where it comes in, if `hearers_matter`: what a broadcast needs beside `broadcast`.
        """
        return self._hear.judge((), _Question(path, interface, member, peer))

    def receive(
        self,
        names: Collection[str],
        path: str | None,
        interface: str | None,
        member: str | None,
        peer: Identity | None,
        *,
        broadcast: bool,
    ) -> Verdict:
        """Judge a call or signal into the sandbox. A broadcast needs a rule, also from the host."""
        verdict = self._receive.judge(names, _Question(path, interface, member, peer))
        if verdict is NO_RECEIVE and peer is None and not broadcast and self._receive_from_host:
            return FROM_HOST
        return verdict

    def own(self, name: str) -> Verdict:
        """Judge a request for a bus name."""
        return self._own.judge((name,), _Question(None, None, None, None))

    def see(self, names: Collection[str], peer: Identity | None) -> Verdict:
        """Judge whether the other end's existence may be known."""
        return self._see.judge(names, _Question(None, None, None, peer))

    def start(self, names: Collection[str], peer: Identity | None) -> Verdict:
        """Judge whether the service of these names may be started: if anything may be sent to it."""
        return self._start.judge(names, _Question(None, None, None, peer))


class _Question(NamedTuple):
    path: str | None
    interface: str | None
    member: str | None
    peer: Identity | None


class _Heed(enum.Flag):
    """Which conditions of its rules a table goes by."""

    NAME = enum.auto()
    MESSAGE = enum.auto()  # path, interface, member
    PEER = enum.auto()
    ALL = NAME | MESSAGE | PEER


def _for_broadcasts(send: list[Rule]) -> list[Rule]:
    # Who hears a broadcast is judged at each receiver: a deny for some peers stops nothing here.
    return [rule for rule in _about_broadcasts(send) if not (rule.deny and rule.peer is not None)]


def _about_broadcasts(send: list[Rule]) -> list[Rule]:
    return [rule for rule in send if rule.name in {None, BUS_NAME}]


def _for_sight(rules: list[Rule]) -> list[Rule]:
    return [
        rule
        for rule in rules
        if Access.SEE in rule.access or (rule.name is not None and not rule.deny)
    ]


def _for_starting(send: list[Rule]) -> list[Rule]:
    # A deny of some messages leaves others, for which the service may be started.
    return [
        rule
        for rule in send
        if not rule.deny or (rule.path is None and rule.interface is None and rule.member is None)
    ]


def _names_used(rules: list[Rule]) -> NamesUsed:
    names = {rule.name for rule in rules} - _ANY_NAME
    patterns = {parse_name_pattern(name) for name in names if name is not None}
    return NamesUsed(
        exact=frozenset(each.text for each in patterns if each.kind == "exact"),
        subtrees=frozenset(each.base for each in patterns if each.kind == "subtree"),
        # Which names may be seen by their owner alone, only a look at all of them tells.
        globs=any(each.kind == "glob" for each in patterns) or _owner_decides_sight(rules),
    )


def _owner_decides_sight(rules: list[Rule]) -> bool:
    """Say whether names that no rule says may be seen or not by who owns them."""
    if any(Access.SEE in rule.access and rule.name is None and rule.peer for rule in rules):
        return True
    sight = _for_sight(rules)
    # An owner that is not known passes for the host, so it must be known where the host is let through.
    unnamed = [rule for rule in sight if not rule.deny and rule.name in _ANY_NAME]
    if any(rule.peer is not None and rule.peer.kind == "host" for rule in unnamed):
        return True
    # What is denied for one of an owner's names is for all of them.
    denied = any(rule.deny and (rule.peer or rule.name not in _ANY_NAME) for rule in sight)
    return denied and any(rule.peer is None for rule in unnamed)


class _Table:
    """The rules that one kind of question goes to."""

    __slots__ = ("_allow", "_deny", "_no_match")

    def __init__(self, rules: list[Rule], me: Identity, heed: _Heed, no_match: Verdict) -> None:
        self._allow = _Index(_find_in)
        self._deny = _Index(_find_denied)
        self._no_match = no_match
        for rule in rules:
            index = self._deny if rule.deny else self._allow
            index.add(_Compiled(rule, me, heed), rule.name if _Heed.NAME in heed else None)

    def judge(self, names: Collection[str], question: _Question) -> Verdict:
        if question.path is not None and len(question.path) > MAX_PATH:
            return LONG_PATH
        found = self._deny.find(names, question) or self._allow.find(names, question)
        return self._no_match if found is None else found.verdict()


class _Compiled:
    """A rule as predicates. A predicate that is None need not be asked."""

    __slots__ = (
        "_rule",
        "_verdict",
        "interface",
        "interface_stem",
        "literal",
        "member",
        "path",
        "path_stem",
        "peer",
    )

    def __init__(self, rule: Rule, me: Identity, heed: _Heed) -> None:
        self._rule = rule
        self._verdict: Verdict | None = None
        message = _Heed.MESSAGE in heed
        self.path = _compile(compile_path, rule.path, heeded=message)
        self.interface = _compile(compile_interface, rule.interface, heeded=message)
        self.member = _compile(compile_member_glob, rule.member, heeded=message)
        self.peer = _compile_peer(rule.peer, me) if _Heed.PEER in heed else None
        self.path_stem = stem(rule.path or "") if message else ""
        self.interface_stem = stem(rule.interface or "") if message else ""
        # Filed under a literal interface, the rule need not be asked about it again.
        self.literal: str | None = None
        if self.interface is not None and self.interface_stem == rule.interface:
            self.literal, self.interface = rule.interface, None

    def verdict(self) -> Verdict:
        if self._verdict is None:
            rule = self._rule
            word = "denied" if rule.deny else "allowed"
            origin = f" ({rule.origin})" if rule.origin else ""
            reason = f"{word} by {format_rule(rule)}{origin}"
            self._verdict = Verdict(allowed=not rule.deny, rule=rule, reason=reason)
        return self._verdict


def _compile(
    compile_pattern: Callable[[str], Predicate], pattern: str | None, *, heeded: bool
) -> Predicate | None:
    if pattern is None:
        return None
    # Compiled even if nobody asks it: a list with one bad pattern is refused whole.
    predicate = compile_pattern(pattern)
    return predicate if heeded else None


def _compile_peer(peer: Peer | None, me: Identity) -> Callable[[Identity | None], bool] | None:
    if peer is None:
        return None
    match peer.kind:
        case "host":
            return lambda other: other is None
        case "same-app":
            kind, app, component = me.type, me.app, None
        case "app":
            kind, app, component = peer.type, peer.app, peer.component
    return lambda other: (
        other is not None
        and other.type == kind
        and other.app == app
        and (component is None or other.component == component)
    )


# Rules by their interface if it is literal, the others under None.
_Bucket = dict[str | None, list[_Compiled]]
_Find = Callable[[_Bucket, _Question], _Compiled | None]


class _Index:
    """Rules by what they name. See the module's docstring."""

    __slots__ = ("_any", "_exact", "_find_unnamed", "_globs", "_known", "_subtrees")

    def __init__(self, find_unnamed: _Find) -> None:
        # How a call that names no interface is looked for.
        self._find_unnamed = find_unnamed
        self._any: _Bucket = {}
        self._exact: dict[str, _Bucket] = {}
        self._subtrees: dict[str, _Bucket] = {}  # by their base
        self._globs: dict[str, tuple[Predicate, _Bucket]] = {}  # by their text
        self._known: dict[str, list[_Bucket]] = {}

    def add(self, compiled: _Compiled, name: str | None) -> None:
        bucket = self._any
        if name is not None:
            pattern = parse_name_pattern(name)
            match pattern.kind:
                case "exact":
                    bucket = self._exact.setdefault(name, {})
                case "subtree":
                    bucket = self._subtrees.setdefault(pattern.base, {})
                case "glob":
                    _, bucket = self._globs.setdefault(name, (compile_name(name), {}))
        bucket.setdefault(compiled.literal, []).append(compiled)

    def find(self, names: Collection[str], question: _Question) -> _Compiled | None:
        """Return a rule that matches, or None."""
        find_in = _find_in if question.interface is not None else self._find_unnamed
        if self._any and (found := find_in(self._any, question)) is not None:
            return found
        for name in names:
            buckets = self._known.get(name)
            if buckets is None:
                buckets = self._learn(name)
            for bucket in buckets:
                if (found := find_in(bucket, question)) is not None:
                    return found
        return None

    def _learn(self, name: str) -> list[_Bucket]:
        buckets = [self._exact[name]] if name in self._exact else []
        if self._subtrees:
            elements = name.split(".")
            bases = (".".join(elements[:end]) for end in range(1, len(elements) + 1))
            buckets += [self._subtrees[base] for base in bases if base in self._subtrees]
        buckets += [bucket for matches, bucket in self._globs.values() if matches(name)]
        # The app chooses the names: what is remembered of them is bounded, and cheap to find again.
        if len(self._known) >= MAX_KNOWN_NAMES:
            self._known.clear()
        self._known[name] = buckets
        return buckets


def _find_in(bucket: _Bucket, question: _Question) -> _Compiled | None:
    path, interface, member, peer = question
    path_text, interface_text = path or "", interface or ""
    for filed in (interface, None) if interface is not None else (None,):
        # One loop without calls to ours: this is where all the time of a judgement goes.
        for rule in bucket.get(filed, ()):
            if (
                path_text.startswith(rule.path_stem)
                and interface_text.startswith(rule.interface_stem)
                and (rule.peer is None or rule.peer(peer))
                and (rule.interface is None or (interface and rule.interface(interface)))
                and (rule.member is None or (member and rule.member(member)))
                and (rule.path is None or (path and rule.path(path)))
            ):
                return rule
    return None


def _find_denied(bucket: _Bucket, question: _Question) -> _Compiled | None:
    """Find a denial of a call that names no interface: the service takes the member from any of its."""
    path, _, member, peer = question
    for rules in bucket.values():
        for rule in rules:
            if (
                (rule.peer is None or rule.peer(peer))
                and (rule.member is None or (member and rule.member(member)))
                and (rule.path is None or (path and rule.path(path)))
            ):
                return rule
    return None
