"""AppArmor profiles, as snapd generates them -> rules.

    imported = import_apparmor(Source("snap.foo.app", text), resolve=look_up)

AppArmor denies everything that a profile does not allow, and so do the imported rules: calls and
signals from the host need a rule (`receive_from_host` is false). docs/importers.md lists where the
two languages differ.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import msgspec

from policy.globs import parse_name_pattern
from policy.importers.aare import AareError, Budget, BudgetError, UnsayableError, Wild, alternatives
from policy.importers.aare_patterns import INTERFACE, MEMBER, NAME, PATH, Kind, join, say
from policy.importers.apparmor_dbus import DbusRule
from policy.importers.apparmor_labels import Labels
from policy.importers.apparmor_lexer import PLACEHOLDER, USED_VARIABLE
from policy.importers.apparmor_parser import PROFILE_NAME, Profile, Resolver, parse_profiles
from policy.importers.report import Imported, ImportFileError, Source, Unsaid, cut
from policy.match import BUS_NAME
from policy.rules import Access, AccessList, Peer, Rule
from policy.snaps.templates import ANY_CONNECTION

MAX_RULES: Final = 50_000
MAX_WRITTEN: Final = 2**24  # characters of all patterns, alternatives written out
MAX_VALUE: Final = 2**12  # characters that variables may add to a pattern

MAX_NESTED: Final = 50  # nesting of variables
MAX_UNSAID: Final = 1000  # entries of a report

_ACCESS: Final = {"send": Access.SEND, "receive": Access.RECEIVE, "bind": Access.OWN}
_NOT_ENFORCED: Final = frozenset({"complain", "default_allow", "prompt", "unconfined"})


class _NothingError(Exception):
    """No part of a rule is left. The reason has been reported."""


def import_apparmor(
    source: Source,
    *,
    resolve: Resolver | None = None,
    profile: str | None = None,
    known_labels: Collection[str] = (),
    placeholders: Mapping[str, str] | None = None,
) -> Imported:
    """Return the rules of a profile of a file. Raises ImportFileError.

    `profile` names the profile if the file has several. Patterns of labels stand for labels of
    `known_labels`. `placeholders` has the texts for placeholders of snapd's templates, such as
    `###SLOT_SECURITY_TAGS###`.
    """
    parsed = parse_profiles(source, resolve)
    chosen = _choose(source, parsed.profiles, profile)
    variables = parsed.variables | {PROFILE_NAME: [chosen.name]}
    chosen.name = _own_name(chosen, variables)
    importer = _Importer(
        variables=variables | {PROFILE_NAME: [chosen.name]},
        labels=Labels(own=chosen.name, known=known_labels),
        placeholders=placeholders or {},
    )
    for file, line, name in parsed.unread:
        importer.note(file, line, f"include {name}", "not read: includes are not looked up")
    for flag in sorted(_NOT_ENFORCED & set(chosen.flags)):
        reason = "AppArmor would not enforce the profile; the rules are imported all the same"
        importer.note(chosen.file, chosen.line, f"flags=({flag})", reason)
    for rule in chosen.rules:
        importer.add(rule)
    return Imported(
        access=AccessList(rules=tuple(importer.rules.values()), receive_from_host=False),
        unsaid=tuple(importer.unsaid),
    )


def _choose(source: Source, profiles: Collection[Profile], name: str | None) -> Profile:
    found = [each for each in profiles if name is None or each.name == name]
    if len(found) == 1:
        return found[0]
    if not found:
        what = "no profile" if name is None else f"no profile {name!r}"
        raise ImportFileError(source.name, 1, f"{what} in the file")
    names = ", ".join(cut(each.name) for each in found[:10])
    raise ImportFileError(source.name, found[1].line, f"choose a profile of these: {names}")


def _own_name(profile: Profile, variables: Mapping[str, list[str]]) -> str:
    try:
        return _Variables(variables).replace(profile.name)
    except (LookupError, UnsayableError):
        return profile.name


class _Variables:
    """The values of variables. A variable with several values becomes `{a,b}`."""

    def __init__(self, values: Mapping[str, list[str]]) -> None:
        self._values: Final = values
        self._known: Final[dict[str, str]] = {}
        self._open: Final[list[str]] = []

    def replace(self, text: str) -> str:
        """Return the text without variables. Raises LookupError and UnsayableError."""
        if "@{" not in text:
            return text
        parts: list[str] = []
        at = length = 0
        for found in USED_VARIABLE.finditer(text):
            value = self._value(found[1])
            parts += text[at : found.start()], value
            at, length = found.end(), length + len(value)
            if length > MAX_VALUE:
                raise UnsayableError("the variables make the text too long")
        return "".join([*parts, text[at:]])

    def _value(self, name: str) -> str:
        known = self._known.get(name)
        if known is not None:
            return known
        if name in self._open:
            raise LookupError(f"variable @{{{name}}} contains itself")
        if len(self._open) > MAX_NESTED:
            raise LookupError(f"more than {MAX_NESTED} variables in each other")
        if name not in self._values:
            raise LookupError(f"variable @{{{name}}} is not set")
        self._open.append(name)
        try:
            values = [self.replace(value) for value in dict.fromkeys(self._values[name])]
        finally:
            self._open.pop()
        text = values[0] if len(values) == 1 else f"{{{','.join(values)}}}"
        if len(text) > MAX_VALUE:
            raise UnsayableError("the variables make the text too long")
        self._known[name] = text
        return text


class _Said(msgspec.Struct, frozen=True, kw_only=True):
    """The conditions of a rule, each as a list of patterns. None means no condition."""

    buses: list[str] | None
    names: list[str] | None
    paths: list[str] | None
    interfaces: list[str] | None
    members: list[str] | None
    peers: tuple[Peer | None, ...]


class _Importer:
    """An importer of the dbus rules of a profile."""

    def __init__(
        self, *, variables: Mapping[str, list[str]], labels: Labels, placeholders: Mapping[str, str]
    ) -> None:
        # By the rule without origin, because included rules repeat.
        self.rules: Final[dict[Rule, Rule]] = {}
        self.unsaid: Final[list[Unsaid]] = []
        self._variables: Final = _Variables(variables)
        self._labels: Final = labels
        self._placeholders: Final = placeholders
        self._budget: Final = Budget(MAX_WRITTEN)
        self._seen: Final[set[tuple[object, ...]]] = set()

    def note(self, file: str, line: int, text: str, reason: str) -> None:
        if len(self.unsaid) >= MAX_UNSAID:
            reason = "more could not be expressed: the report ends here"
            self.unsaid[MAX_UNSAID:] = [Unsaid(file=file, line=line, text=text, reason=reason)]
            return
        self.unsaid.append(Unsaid(file=file, line=line, text=text, reason=reason))

    def add(self, rule: DbusRule) -> None:
        """Add the rules for a dbus rule. Raises ImportFileError."""
        # Abstractions are included many times.
        key = (rule.access, rule.qualifiers, *rule.conditions.items())
        if key in self._seen:
            return
        self._seen.add(key)
        if "prompt" in rule.qualifiers:
            self._note(rule, "no user can be asked: left out")
            return
        if "priority" in rule.qualifiers:
            self._note(rule, "rules have no priority: a denial always wins")
        if "eavesdrop" in rule.access and not rule.deny:
            self._note(rule, "eavesdropping is never allowed")
        access = frozenset(_ACCESS[each] for each in rule.access if each in _ACCESS)
        if not access:
            return
        try:
            said = self._say(rule)
        except _NothingError:
            return
        except (AareError, BudgetError, LookupError) as exc:
            raise ImportFileError(rule.file, rule.line, str(exc.args[0])) from None
        else:
            self._make(rule, access, said)

    def _note(self, rule: DbusRule, reason: str) -> None:
        self.note(rule.file, rule.line, rule.text, reason)

    def _say(self, rule: DbusRule) -> _Said:
        subject = rule.conditions.get("name")
        name = rule.conditions.get("peer name") if subject is None else subject
        names = self._patterns(rule, "name", name, NAME)
        if names is not None and "send" in rule.access:
            names = _with_bus(names)
        paths = self._patterns(rule, "path", rule.conditions.get("path"), PATH)
        interfaces = self._patterns(rule, "interface", rule.conditions.get("interface"), INTERFACE)
        members = self._patterns(rule, "member", rule.conditions.get("member"), MEMBER)
        return _Said(
            buses=self._buses(rule),
            names=names,
            paths=None if paths is None else join(paths),
            interfaces=None if interfaces is None else join(interfaces),
            members=None if members is None else join(members),
            peers=self._peers(rule),
        )

    def _text(self, value: str) -> str:
        found = PLACEHOLDER.fullmatch(value)
        if found is not None:
            if value not in self._placeholders:
                raise UnsayableError(f"no text is given for {value}")
            value = self._placeholders[value].strip('"')
        return self._variables.replace(value)

    def _patterns(
        self, rule: DbusRule, what: str, value: str | None, kind: Kind
    ) -> list[str] | None:
        if value is None:
            return None
        return self._said(rule, what, lambda: say(self._path(value, kind), kind, self._budget))

    def _path(self, value: str, kind: Kind) -> str:
        text = self._text(value)
        if kind is PATH:
            while "//" in text:
                text = text.replace("//", "/")
        return text

    def _said(
        self, rule: DbusRule, what: str, patterns: Callable[[], tuple[list[str] | None, list[str]]]
    ) -> list[str] | None:
        """Return the patterns of a condition.

        If a deny rule has patterns that cannot be expressed, the condition is dropped, which denies
        more.
        """
        try:
            found, left_out = patterns()
        except UnsayableError as exc:
            found, left_out = [], [str(exc)]
        if left_out and rule.deny:
            self._note(rule, f"{what}: {left_out[0]}; denied whatever the {what}")
            return None
        if left_out:
            self._note(rule, f"left out: {what}: {left_out[0]}")
        elif found == []:
            self._note(rule, f"can match nothing: no {what} has this form")
        if found == []:
            raise _NothingError
        return found

    def _buses(self, rule: DbusRule) -> list[str] | None:
        value = rule.conditions.get("bus")
        if value is None:
            return None
        return self._said(rule, "bus", lambda: _bus_names(self._text(value), self._budget))

    def _peers(self, rule: DbusRule) -> tuple[Peer | None, ...]:
        label = rule.conditions.get("label")
        if label is None:
            return (None,)
        try:
            # Future labels are unknown, so a deny covers all labels that the pattern may match.
            labels = msgspec.structs.replace(self._labels, known=()) if rule.deny else self._labels
            peers, left_out = labels.peers(self._text(label), self._budget)
        except UnsayableError as exc:
            peers, left_out = (), str(exc)
        if not left_out:
            return peers
        if rule.deny:
            self._note(rule, f"{left_out}; denied whatever the peer")
            return (None,)
        self._note(rule, f"left out: {left_out}")
        return peers

    def _make(self, rule: DbusRule, access: frozenset[Access], said: _Said) -> None:
        base = Rule(access=access, deny=rule.deny)
        origin = f"{rule.file}:{rule.line}"
        for key in (
            msgspec.structs.replace(
                base, bus=bus, peer=peer, name=name, path=path, interface=interface, member=member
            )
            for bus in _or_any(said.buses)
            for peer in said.peers
            for name in self._names(rule, said.names, peer)
            for path in _or_any(said.paths)
            for interface in _or_any(said.interfaces)
            for member in _or_any(said.members)
        ):
            self.rules.setdefault(key, msgspec.structs.replace(key, origin=origin))
            if len(self.rules) > MAX_RULES:
                raise ImportFileError(rule.file, rule.line, f"more than {MAX_RULES} rules")

    def _names(
        self, rule: DbusRule, names: list[str] | None, peer: Peer | None
    ) -> Sequence[str | None]:
        # Without a name, the rule would let broadcasts out, and the host would receive the
        # broadcasts.
        if names is None and "send" in rule.access and not rule.deny and self._labels.is_own(peer):
            return (ANY_CONNECTION,)
        return _or_any(names)


def _or_any(patterns: list[str] | None) -> Sequence[str | None]:
    return (None,) if patterns is None else patterns


def _bus_names(text: str, budget: Budget) -> tuple[list[str] | None, list[str]]:
    found: list[str] = []
    for pieces in alternatives(text, budget):
        name = "".join(piece for piece in pieces if isinstance(piece, str))
        if len(pieces) == 1 and pieces[0] in {Wild("*"), Wild("**")}:
            return None, []
        if not all(isinstance(piece, str) for piece in pieces):
            raise UnsayableError(f"{text[:40]!r} is a pattern")
        found.append(name)
    return list(dict.fromkeys(found)), []


def _with_bus(names: list[str]) -> list[str]:
    """Add the bus itself if a pattern covers the bus.

    Only then is the rule about broadcasts, too.
    """
    patterns = [parse_name_pattern(name) for name in names]
    if BUS_NAME not in names and any(pattern.matches(BUS_NAME) for pattern in patterns):
        return [*names, BUS_NAME]
    return names
