"""Prepared entries of the catalogue, and filling in of placeholders.

Alternatives of an entry are joined in a pattern or multiplied to several rules.

A template is made once, when the catalogue is loaded, and filled in for each app and connection.
`policy.snaps.installed` checks the texts for placeholders. These texts have no wildcards, so a snap
cannot add a pattern. A filled-in text may be illegal on D-Bus (a path with a `-`). No message could
match such a rule, so the rule is left out.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from policy.globs import (
    MAX_ALTERNATIVES,
    MAX_PATTERN,
    PatternError,
    compile_interface,
    compile_member_glob,
    compile_path,
    expand_braces,
    parse_name_pattern,
    stem,
)
from policy.rules import Access, Peer, Rule
from policy.snaps.catalogue_schema import Entry, Texts
from policy.text import misfit

# The name condition of a rule about apps only. A rule without a name would let broadcasts out, and
# the host would receive the broadcasts. Every snap may send to itself, so every snap could
# broadcast anything.
ANY_CONNECTION: Final = "*"
PLACEHOLDER: Final = re.compile(r"<([^<>]*)>")
_ANY_BRACKET: Final = re.compile(r"[<>]")


class EntryError(ValueError):
    """An entry makes no sense. `key` and `value` are the place in the entry."""

    def __init__(self, problem: str, key: str, value: str = "") -> None:
        super().__init__(problem)
        self.key: Final = key
        self.value: Final = value


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A rule without peer and origin. The texts may have placeholders."""

    access: frozenset[Access]
    deny: bool
    bus: str | None
    name: str | None
    path: str | None
    interface: str | None
    member: str | None


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """A prepared entry."""

    entry: Entry
    shapes: tuple[Shape, ...]
    placeholders: frozenset[str]


def make_template(entry: Entry, known: Mapping[str, str], attributes: Collection[str]) -> Template:
    """Return the template of an entry. Raises EntryError.

    `known` has a sample for each placeholder.
    """
    if not entry.access:
        raise EntryError("no access at all", "access")
    used = _check_texts(entry, known)
    for need in entry.needs:
        if need not in attributes:
            raise EntryError(f"needs an attribute that is not declared: {need!r}", "needs", need)
    shapes = tuple(_shapes(entry))
    for shape in shapes:
        if (problem := misfit(_rule(shape, None, ""))) is not None:
            raise EntryError(problem, "access")
    return Template(entry=entry, shapes=shapes, placeholders=frozenset(used))


def fill(
    template: Template,
    peers: Sequence[Peer | None],
    origin: str,
    values: Mapping[str, str],
    *,
    to_host: bool = True,
) -> tuple[list[Rule], list[str]]:
    """Return the rules, and descriptions of rules left out because no message could match.

    Without `to_host`, a rule about apps lets no broadcast out, because the host would receive the
    broadcast as well.
    """
    if not template.placeholders:
        shapes = template.shapes
        return [_rule(one, peer, origin, to_host=to_host) for one in shapes for peer in peers], []
    if missing := sorted(template.placeholders - values.keys()):
        return [], [f"{origin}: a rule that needs {missing[0]} is left out"]
    rules, left_out = [], []
    for shape in template.shapes:
        filled = _filled(shape, values)
        try:
            _check_shape(filled)
        except PatternError as exc:
            left_out.append(f"{origin}: a rule that no message can match is left out: {exc}")
        else:
            rules += [_rule(filled, peer, origin, to_host=to_host) for peer in peers]
    return rules, left_out


def fill_text(text: str, values: Mapping[str, str]) -> str:
    """Return the text with placeholders filled in.

    Raises KeyError for an unknown placeholder.
    """
    return PLACEHOLDER.sub(lambda found: values[found[1]], text)


def find_placeholders(text: str) -> list[str]:
    """Return the placeholders of a text. Raises ValueError for an unpaired `<` or `>`."""
    if _ANY_BRACKET.search(PLACEHOLDER.sub("", text)):
        raise ValueError("'<' and '>' stand around a placeholder, in pairs")
    return PLACEHOLDER.findall(text)


def _rule(shape: Shape, peer: Peer | None, origin: str, *, to_host: bool = True) -> Rule:
    name = shape.name
    if name is None and peer is not None and Access.SEND in shape.access:
        is_apps_alone = peer.kind == "app" and not to_host and not shape.deny
        if peer.kind == "same-app" or is_apps_alone:
            name = ANY_CONNECTION
    return Rule(
        access=shape.access,
        deny=shape.deny,
        bus=shape.bus,
        name=name,
        path=shape.path,
        interface=shape.interface,
        member=shape.member,
        peer=peer,
        origin=origin,
    )


_CHECKS: Final[dict[str, Callable[[str], object]]] = {
    # This function makes all checks of a name. Making a predicate would take ten times as long.
    "name": parse_name_pattern,
    "path": compile_path,
    "interface": compile_interface,
    "member": compile_member_glob,
}


def _check_texts(entry: Entry, known: Mapping[str, str]) -> set[str]:
    """Return the placeholders of an entry."""
    used: set[str] = set()
    for key in ("bus", *_CHECKS):
        field: Texts | None = getattr(entry, key)
        if field is None:
            continue
        texts = _several(field)
        if not texts:
            raise EntryError(f"no {key} at all: without the key, any is meant", key)
        for text in texts:
            used |= _check_text(key, text, known)
    return used


def _check_text(key: str, text: str, known: Mapping[str, str]) -> set[str]:
    try:
        found = set(find_placeholders(text))
    except ValueError as exc:
        raise EntryError(f"{text!r}: {exc}", key, text) from None
    if unknown := sorted(found - known.keys()):
        choice = ", ".join(f"<{name}>" for name in sorted(known))
        raise EntryError(f"unknown placeholder <{unknown[0]}>: here there are {choice}", key, text)
    if not text:
        raise EntryError(f"an empty {key}", key, text)
    check = _CHECKS.get(key)
    if check is not None:
        try:
            check(fill_text(text, known))
        except PatternError as exc:
            raise EntryError(f"bad {key} {text!r}: {exc}", key, text) from None
    return found


def _check_shape(shape: Shape) -> None:
    for key, check in _CHECKS.items():
        text: str | None = getattr(shape, key)
        if text is not None:
            check(text)


def _shapes(entry: Entry) -> Iterable[Shape]:
    access = {Access(word) for word in entry.access}
    if entry.name is None and not entry.deny and access & {Access.SEND, Access.RECEIVE}:
        # Most entries name the other end's identity but not its bus name. An app that may talk to a
        # peer may also see the peer, because the bus tells every app in a snap.
        access.add(Access.SEE)
    for name in _optional(entry.name):
        for interface in _optional(entry.interface):
            for path in _joined(entry.path):
                for member in _joined(entry.member):
                    yield Shape(
                        access=frozenset(access),
                        deny=entry.deny,
                        bus=entry.bus,
                        name=name,
                        path=path,
                        interface=interface,
                        member=member,
                    )


def _filled(shape: Shape, values: Mapping[str, str]) -> Shape:
    changed = {
        key: fill_text(text, values)
        for key in ("bus", *_CHECKS)
        if (text := getattr(shape, key)) is not None and "<" in text
    }
    return msgspec.structs.replace(shape, **changed)


def _several(texts: Texts) -> tuple[str, ...]:
    return (texts,) if isinstance(texts, str) else texts


def _optional(texts: Texts | None) -> Sequence[str | None]:
    return (None,) if texts is None else _several(texts)


def _joined(texts: Texts | None) -> Sequence[str | None]:
    """Return few patterns whose union is the texts."""
    if texts is None:
        return (None,)
    texts = _several(texts)
    if len(texts) == 1:
        return texts
    joined = join(texts)
    # A filled-in placeholder makes the pattern longer. Half of the room is reserved for that.
    if len(joined) > MAX_PATTERN // 2 or sum(map(_count, texts)) > MAX_ALTERNATIVES:
        half = len(texts) // 2
        return [*_joined(texts[:half]), *_joined(texts[half:])]
    return (joined,)


def _count(text: str) -> int:
    return len(expand_braces(text))


def join(texts: Collection[str]) -> str:
    """Return a single pattern that is the union of patterns."""
    # The index compares the beginning of a pattern first, so the common text stands before the
    # braces.
    common = _common([PLACEHOLDER.split(stem(text))[0] for text in texts])
    rests = [text[len(common) :] for text in texts]
    return f"{common}{{{','.join(rests)}}}"


def _common(texts: list[str]) -> str:
    low, high = min(texts), max(texts)
    for at, char in enumerate(low):
        if char != high[at]:
            return low[:at]
    return low
