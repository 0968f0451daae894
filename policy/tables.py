"""Rules filed by names, peer and interface, so that a question looks at few rules. Pure.

policy.match.Tables files the rules of a list one by one, so that a caller can do other work between
rules. `Cost` is the number of steps that a question to the rules takes in the worst case.
"""

from collections.abc import Callable, Collection, Generator, Iterable
from typing import Final, NamedTuple

import msgspec

from policy.globs import (
    compile_interface,
    compile_member_glob,
    compile_name,
    compile_path,
    parse_name_pattern,
)
from policy.matcher import Pattern, Subject, reading_cost
from policy.rules import Access, Identity, Peer, Rule

# D-Bus has no limit on the length of a path.
MAX_PATH: Final = 2048
MAX_TEXT: Final = 255  # characters of interfaces, members and names
# The limit on names of an owner. The default of the sandbox limit `names` is the same.
MAX_NAMES: Final = 256
# Limits on remembered names with the patterns that cover each, and on these patterns in all.
MAX_KNOWN_NAMES: Final = 512
MAX_KNOWN_PATTERNS: Final = 16_384
_LENGTHS: Final = {"path": MAX_PATH, "interface": MAX_TEXT, "member": MAX_TEXT}
# Work of sorting in a pattern, when the cost of a list is added up.
_SORTING: Final = 16
# Look-ups in the time of a step.
_LOOKUPS: Final = 8
_MAX_ELEMENTS: Final = 128  # elements of a name
# The upper bound of steps for a name without globs: look-ups of the name's elements, and of fixed
# beginnings of each length.
NAME_STEPS: Final = 2 + (_MAX_ELEMENTS + MAX_TEXT + 1) // _LOOKUPS

# The key of a rule's peer: any, the host, an app, or a component of an app.
PeerKey = str | tuple[str, str] | tuple[str, str, str | None]
ANYBODY: Final = "anybody"
HOST: Final = "host"


class Work:
    """A counter of the steps of all questions to a list."""

    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps = 0


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of a list of rules."""

    steps: int = 0  # for a message, in the worst case
    pieces: int = 0  # of all kept patterns
    rule: Rule | None = None  # the rule with the highest cost
    rule_steps: int = 0  # steps of that rule


class Question:
    """The fields of a message that rules ask for, and the identity of the other end."""

    __slots__ = ("_subjects", "interface", "keys", "member", "path", "peer")

    def __init__(
        self, path: str | None, interface: str | None, member: str | None, peer: Identity | None
    ) -> None:
        self.path: Final = path
        self.interface: Final = interface
        self.member: Final = member
        self.peer: Final = peer
        self.keys: Final = keys_of(peer)
        self._subjects: dict[str, Subject] | None = None

    def fits(self, pattern: Pattern, text: str) -> bool:
        """Return whether a pattern covers a text of the message."""
        subjects = self._subjects
        if subjects is None:
            subjects = self._subjects = {}
        subject = subjects.get(text)
        if subject is None:
            subject = subjects[text] = Subject(text)
        return pattern.fits(subject)

    @property
    def steps(self) -> int:
        """Return the number of steps that the patterns took."""
        return sum(one.steps for one in self._subjects.values()) if self._subjects else 0


def keys_of(peer: Identity | None) -> tuple[PeerKey, ...]:
    """Return the keys under which rules about an other end are filed."""
    if peer is None:
        return ANYBODY, HOST
    app = peer.type, peer.app
    return ANYBODY, app, (*app, peer.component)


def _key(peer: Peer | None, me: Identity) -> PeerKey:
    if peer is None:
        return ANYBODY
    match peer.kind:
        case "host":
            return HOST
        case "same-app":
            return me.type, me.app
        case "app":
            app = peer.type, peer.app
            return app if peer.component is None else (*app, peer.component)


class Entry:
    """A rule with compiled patterns. A pattern that is None needs no check."""

    __slots__ = (
        "filed",
        "interface",
        "interface_stem",
        "key",
        "member",
        "path",
        "path_stem",
        "rule",
    )

    def __init__(self, rule: Rule, me: Identity) -> None:
        """Compile a rule. Raises PatternError."""
        self.rule: Final = rule
        self.key: Final = _key(rule.peer, me)
        self.path: Final = None if rule.path is None else compile_path(rule.path)
        self.member: Final = None if rule.member is None else compile_member_glob(rule.member)
        interface = None if rule.interface is None else compile_interface(rule.interface)
        self.path_stem: Final = "" if self.path is None else self.path.stem
        self.interface_stem: Final = "" if interface is None else interface.stem
        # A rule that is filed under a literal interface needs no further check of the interface.
        self.filed: Final = rule.interface if self.interface_stem == rule.interface else None
        self.interface: Final = interface if self.filed is None else None

    @property
    def is_about_messages(self) -> bool:
        """Return whether the rule names a path, an interface or a member."""
        rule = self.rule
        return not (rule.path is None and rule.interface is None and rule.member is None)


class Names:
    """The name patterns of a list. The patterns that cover a name are remembered."""

    def __init__(self, work: Work) -> None:
        self._work: Final = work
        self.exact: Final[set[str]] = set()
        self.subtrees: Final[dict[str, str]] = {}  # base -> pattern
        # By the fixed beginning of the patterns. `_lengths` has the lengths of these beginnings.
        self._globs: Final[dict[str, list[tuple[str, Pattern]]]] = {}
        self._lengths: Final[dict[int, None]] = {}
        self._known: Final[dict[str, tuple[str, ...]]] = {}
        self._known_patterns = 0

    def add(self, text: str) -> None:
        """Add a pattern. Raises PatternError."""
        parsed = parse_name_pattern(text)
        if parsed.kind == "exact":
            self.exact.add(text)
        elif parsed.kind == "subtree":
            self.subtrees[parsed.base] = text
        else:
            pattern = compile_name(text)
            alike = self._globs.setdefault(pattern.stem, [])
            if all(known != text for known, _ in alike):
                alike.append((text, pattern))
            self._lengths[len(pattern.stem)] = None

    def covering(self, names: Collection[str]) -> Iterable[str]:
        """Return the patterns that cover any of the names."""
        if len(names) == 1:
            (name,) = names
            return self._known[name] if name in self._known else self._learn(name)
        found: dict[str, None] = {}
        for name in names:
            found.update(dict.fromkeys(self._known.get(name) or self._learn(name)))
        return found

    def _learn(self, name: str) -> tuple[str, ...]:
        if name in self._known:
            return self._known[name]
        found = [name] if name in self.exact else []
        found += self._subtrees_of(name) if self.subtrees else []
        found += self._globs_of(name) if self._globs else []
        # The app chooses the names. So the memory is bounded, and forgotten patterns are cheap to
        # find again.
        self._known_patterns += len(found)
        if len(self._known) >= MAX_KNOWN_NAMES or self._known_patterns > MAX_KNOWN_PATTERNS:
            self._known.clear()
            self._known_patterns = len(found)
        self._known[name] = tuple(found)
        return self._known[name]

    def _subtrees_of(self, name: str) -> list[str]:
        self._work.steps += 1 + name.count(".") // _LOOKUPS
        ends = [at for at, char in enumerate(name) if char == "."]
        bases = (name[:end] for end in (*ends, len(name)))
        return [self.subtrees[base] for base in bases if base in self.subtrees]

    def _globs_of(self, name: str) -> list[str]:
        subject = Subject(name)
        alike = (self._globs.get(name[:length], ()) for length in self._lengths)
        found = [text for globs in alike for text, glob in globs if glob.fits(subject)]
        self._work.steps += subject.steps + 1 + len(self._lengths) // _LOOKUPS
        return found

    def cost(self) -> int:
        """Return the steps for the largest number of names that an owner may have."""
        one = 1 + _MAX_ELEMENTS // _LOOKUPS if self.subtrees else 0
        if self._globs:
            one += 1 + len(self._lengths) // _LOOKUPS
            one += chain_cost(pattern for alike in self._globs.values() for _, pattern in alike)
        return MAX_NAMES * one

    @property
    def has_globs(self) -> bool:
        """Return whether there is a glob other than `*`, which every name fits."""
        return any(text != "*" for alike in self._globs.values() for text, _ in alike)


class Bill:
    """A sum of the costs of a list's rules."""

    def __init__(self) -> None:
        self._send: Final = _Texts()
        self._receive: Final = _Texts()
        self._names: Final[dict[str, int]] = {}
        # The rule with the most expensive name, and the rule with the most expensive other
        # patterns, each with the steps.
        self._by_name: tuple[int, Rule | None] = (0, None)
        self._by_texts: tuple[int, Rule | None] = (0, None)

    def add(self, entry: Entry) -> None:
        """Add a rule."""
        rule = entry.rule
        if rule.name is not None and parse_name_pattern(rule.name).kind == "glob":
            pattern = compile_name(rule.name)
            self._names[rule.name] = pattern.pieces
            steps = MAX_NAMES * pattern.cost(MAX_TEXT)
            if steps > self._by_name[0]:
                self._by_name = steps, rule
        texts = _texts_of(entry)
        steps = 1 + sum(pattern.cost(_LENGTHS[field]) for field, _, pattern in texts)
        if steps > self._by_texts[0]:
            self._by_texts = steps, rule
        if Access.SEND in rule.access:
            self._send.add(entry)
        if Access.RECEIVE in rule.access:
            self._receive.add(entry)

    def total(
        self, names: Names, send: "MessageTable", receive: "MessageTable"
    ) -> Generator[int, None, Cost]:
        """Return the total cost, and yield the work of each step."""
        of_names = names.cost()
        yield _SORTING * len(self._names)
        most = 0
        for table, texts in ((send, self._send), (receive, self._receive)):
            most = max(most, table.tries + (yield from texts.cost()))
        pieces = sum(self._names.values()) + self._send.pieces + self._receive.pieces
        steps, rule = self._by_name if of_names > most and self._by_name[0] else self._by_texts
        return Cost(steps=of_names + most, pieces=pieces, rule=rule, rule_steps=steps)


class _Texts:
    """The patterns for messages in one direction."""

    def __init__(self) -> None:
        self._by_field: Final[dict[str, dict[str, Pattern]]] = {}
        self.pieces = 0

    def add(self, entry: Entry) -> None:
        for field, text, pattern in _texts_of(entry):
            known = self._by_field.setdefault(field, {})
            if text not in known:
                known[text] = pattern
                self.pieces += pattern.pieces

    def cost(self) -> Generator[int, None, int]:
        steps = 0
        for field, patterns in self._by_field.items():
            steps += chain_cost(patterns.values(), _LENGTHS[field])
            yield _SORTING * len(patterns)
        return steps


def _texts_of(entry: Entry) -> list[tuple[str, str, Pattern]]:
    """Return a rule's patterns for a message, each with the field and the pattern's text."""
    rule = entry.rule
    found = []
    if entry.path is not None:
        found.append(("path", str(rule.path), entry.path))
    if entry.interface is not None:
        found.append(("interface", str(rule.interface), entry.interface))
    if entry.member is not None:
        found.append(("member", str(rule.member), entry.member))
    return found


def chain_cost(patterns: Iterable[Pattern], length: int = MAX_TEXT) -> int:
    """Return the upper bound of steps that patterns take for a single text.

    The text is compared with the fixed beginnings first. Of two fixed beginnings of the same text,
    one is a prefix of the other. So the sum runs along such a chain of beginnings. A pattern with a
    fixed length is compared by length next, and a text has a single length. So only the most
    expensive length counts.
    """
    reading = reading_cost(length)
    # By beginning: steps in any case, and further steps by the length of the text.
    by_stem: dict[str, tuple[list[int], dict[int, int]]] = {}
    letters: set[str] = set()
    for pattern in patterns:
        cost = pattern.pieces + pattern.sets * reading
        always, of_length = by_stem.setdefault(pattern.stem, ([0], {}))
        always[0] += cost if pattern.length is None else 1
        if pattern.length is not None:
            of_length[pattern.length] = of_length.get(pattern.length, 0) + cost - 1
        letters.update(pattern.letters)
    most = total = 0
    chain: list[tuple[str, int]] = []
    for stem, (always, of_length) in sorted(by_stem.items()):
        while chain and not stem.startswith(chain[-1][0]):
            total -= chain.pop()[1]
        chain.append((stem, always[0] + max(of_length.values(), default=0)))
        total += chain[-1][1]
        most = max(most, total)
    return most + len(letters) * reading


class _Pair(NamedTuple):
    """Denials, and rules that allow."""

    deny: "_Index"
    allow: "_Index"


# Rules by literal interface, with the other rules under None; and these collections by peer.
_Filed = dict[str | None, list[Entry]]
_Bucket = dict[PeerKey, _Filed]
_Find = Callable[["_Bucket", Question, Work], Entry | None]


class MessageTable:
    """Rules about messages."""

    def __init__(self, names: Names, work: Work) -> None:
        self._names: Final = names
        self._work: Final = work
        self._pair: Final = _Pair(_Index(), _Index())
        self._tries: Final[dict[PeerKey, int]] = {}

    def add(self, entry: Entry) -> None:
        """File a rule."""
        self._file(entry, entry.rule.name, entry.key)

    def add_whoever(self, entry: Entry) -> None:
        """File a rule as if the rule had no name and no peer."""
        self._file(entry, None, ANYBODY)

    def _file(self, entry: Entry, name: str | None, key: PeerKey) -> None:
        index = self._pair.deny if entry.rule.deny else self._pair.allow
        filed = index.bucket(name).setdefault(key, {})
        filed.setdefault(entry.filed, []).append(entry)
        self._tries[key] = self._tries.get(key, 0) + 1

    def find(self, names: Collection[str], question: Question) -> Rule | None:
        """Return a matching rule, or None. A denial takes precedence."""
        return self.find_under(self._names.covering(names) if names else (), question)

    def find_under(self, patterns: Iterable[str], question: Question) -> Rule | None:
        """Return a matching rule whose name condition is among `patterns` or absent."""
        denied = _find_in if question.interface is not None else _find_denied
        pair, work = self._pair, self._work
        found = pair.deny.find(patterns, question, denied, work) or pair.allow.find(
            patterns, question, _find_in, work
        )
        work.steps += question.steps
        return None if found is None else found.rule

    @property
    def tries(self) -> int:
        """Return the largest number of rules that are tried for a message."""
        apps: dict[PeerKey, int] = {}
        components: dict[PeerKey, int] = {}
        for key, count in self._tries.items():
            if isinstance(key, tuple) and len(key) == 3:
                components[key[:2]] = max(components.get(key[:2], 0), count)
            elif isinstance(key, tuple):
                apps[key] = count
        either = [apps.get(key, 0) + components.get(key, 0) for key in {*apps, *components}]
        return self._tries.get(ANYBODY, 0) + max([self._tries.get(HOST, 0), *either])


class _Index:
    """Rules by name condition."""

    __slots__ = ("_any", "_named")

    def __init__(self) -> None:
        self._any: _Bucket = {}
        self._named: dict[str, _Bucket] = {}

    def bucket(self, name: str | None) -> _Bucket:
        return self._any if name is None else self._named.setdefault(name, {})

    def find(
        self, patterns: Iterable[str], question: Question, find_in: _Find, work: Work
    ) -> Entry | None:
        if self._any and (found := find_in(self._any, question, work)) is not None:
            return found
        if self._named:
            for pattern in patterns:
                bucket = self._named.get(pattern)
                if bucket and (found := find_in(bucket, question, work)) is not None:
                    return found
        return None


def _find_in(bucket: _Bucket, question: Question, work: Work) -> Entry | None:
    path, interface, member = question.path, question.interface, question.member
    path_text, interface_text = path or "", interface or ""
    for key in question.keys:
        filed = bucket.get(key)
        if filed is None:
            continue
        for text in (interface, None) if interface is not None else (None,):
            entries = filed.get(text)
            if entries is None:
                continue
            work.steps += len(entries)
            # A loop without calls of other functions here, because judgements spend nearly all time
            # in this loop.
            for entry in entries:
                if (
                    path_text.startswith(entry.path_stem)
                    and interface_text.startswith(entry.interface_stem)
                    and (
                        entry.interface is None
                        or (interface and question.fits(entry.interface, interface))
                    )
                    and (entry.member is None or (member and question.fits(entry.member, member)))
                    and (entry.path is None or (path and question.fits(entry.path, path)))
                ):
                    return entry
    return None


def _find_denied(bucket: _Bucket, question: Question, work: Work) -> Entry | None:
    """Find a denial of a call without an interface.

    The service may take the member from any of its interfaces, so the interface conditions of
    denials are ignored.
    """
    path, member = question.path, question.member
    path_text = path or ""
    for key in question.keys:
        for entries in bucket.get(key, {}).values():
            work.steps += len(entries)
            for entry in entries:
                if (
                    path_text.startswith(entry.path_stem)
                    and (entry.member is None or (member and question.fits(entry.member, member)))
                    and (entry.path is None or (path and question.fits(entry.path, path)))
                ):
                    return entry
    return None


class NameTable:
    """Rules of which only the name and the peer count. A single rule of each pair is kept."""

    def __init__(self, names: Names, work: Work) -> None:
        self._names: Final = names
        self._work: Final = work
        self._deny: Final[dict[str | None, dict[PeerKey, Rule]]] = {}
        self._allow: Final[dict[str | None, dict[PeerKey, Rule]]] = {}

    def add(self, entry: Entry) -> None:
        """File a rule."""
        self._file(entry, entry.key)

    def add_whoever(self, entry: Entry) -> None:
        """File a rule as if the rule had no peer."""
        self._file(entry, ANYBODY)

    def _file(self, entry: Entry, key: PeerKey) -> None:
        rules = self._deny if entry.rule.deny else self._allow
        rules.setdefault(entry.rule.name, {}).setdefault(key, entry.rule)

    def find(self, names: Collection[str], peer: Identity | None) -> Rule | None:
        """Return a matching rule, or None. A denial takes precedence."""
        patterns = (None, *(self._names.covering(names) if names else ()))
        keys = keys_of(peer)
        for rules in (self._deny, self._allow):
            if not rules:
                continue
            self._work.steps += 1 + len(patterns) // _LOOKUPS
            for pattern in patterns:
                by_peer = rules.get(pattern)
                if by_peer is None:
                    continue
                for key in keys:
                    if (found := by_peer.get(key)) is not None:
                        return found
        return None
