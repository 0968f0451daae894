"""Compiled lists in the form of Containers1, a(usos), for each bus.

The form has no globs and no bus. So alternations are written out, and each bus gets a list of its
own. There are two conversions:

- The exact conversion. A rule that the form cannot express is reported. An omission must not give
  the app more access. So an allow is left out, and a deny becomes wider.
- The superset, for a bus that itself enforces a list behind a gate with the exact list. The bus
  must never refuse a message that the gate lets through. So an allow that the form cannot express
  becomes wider, and a deny is left to the gate. Peer conditions are dropped, for two reasons. A
  sandbox that only the gate serves is unlabelled on that bus. And an app that another program has
  labelled is a host for the broker.
"""

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from policy.globs import expand_braces, is_literal, parse_name_pattern
from policy.rules import AccessList, Rule
from policy.usos.wire_form import Flag, Usos, make_usos, on_the_wire


def make_superset(access: AccessList, bus: str) -> tuple[Usos, ...]:
    """Return entries for a bus that allow all that the list allows there, and little more.

    The entries allow as little more as the form permits.
    """
    entries: dict[Usos, None] = {}
    for rule in access.rules:
        if rule.bus not in {None, bus} or (rule.deny and rule.peer is not None):
            continue
        for part in expand(msgspec.structs.replace(rule, bus=None, peer=None)):
            said, unsaid = make_usos([part])
            if unsaid and not part.deny:
                said, _ = make_usos([wider(part)])
            entries.update(dict.fromkeys(map(on_the_wire, said)))
    if access.receive_from_host:
        entries[on_the_wire((int(Flag.RECEIVE), "", "", ""))] = None
    return tuple(entries)


_BELOW: Final = "/**"
_WITH_BELOW: Final = "{,/**}"  # policy.usos.wire_form expresses this as PATH_SUBTREE


class UsosList(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of an app on a bus."""

    entries: tuple[Usos, ...]
    unsaid: tuple[tuple[Rule, str], ...]  # rules that the form cannot express, with reasons


def usos_list(access: AccessList, bus: str) -> UsosList:
    """Return the list's rules for a bus."""
    rules = [rule for rule in access.rules if rule.bus in {None, bus}]
    return make_list(msgspec.structs.replace(rule, bus=None) for rule in rules)


def make_list(rules: Iterable[Rule]) -> UsosList:
    """Return rules in the wire form. All rules must be about the same bus."""
    entries: dict[Usos, None] = {}
    unsaid: list[tuple[Rule, str]] = []
    for rule in rules:
        for part in expand(rule):
            said, cannot = make_usos([part])
            for left, reason in cannot:
                if left.deny:
                    more, _ = make_usos([wider(left)])
                    said += more
                    unsaid.append((left, f"{reason}, so more is denied"))
                else:
                    unsaid.append((left, reason))
            entries.update(dict.fromkeys(said))
    return UsosList(entries=tuple(entries), unsaid=tuple(unsaid))


def expand(rule: Rule) -> list[Rule]:
    """Return rules without alternations whose union is a rule."""
    return [
        msgspec.structs.replace(rule, path=path, interface=interface, member=member)
        for path in _paths(rule.path)
        for interface in _alternatives(rule.interface)
        for member in _alternatives(rule.member)
    ]


def _alternatives(pattern: str | None) -> Sequence[str | None]:
    return [None] if pattern is None else sorted(set(expand_braces(pattern)))


def _paths(pattern: str | None) -> Sequence[str | None]:
    if pattern is None:
        return [None]
    found = set(expand_braces(pattern))
    # A path with all paths below is a single entry.
    subtrees = {
        path for path in found if is_literal(path) and path != "/" and path + _BELOW in found
    }
    plain = found - subtrees - {path + _BELOW for path in subtrees}
    return sorted([*plain, *(path + _WITH_BELOW for path in subtrees)])


def wider(rule: Rule) -> Rule:
    """Return a rule that the form can express and that covers at least as much."""

    def literal(text: str | None) -> str | None:
        return text if text is not None and is_literal(text) else None

    interface = literal(rule.interface)
    glob = rule.name is not None and parse_name_pattern(rule.name).kind == "glob"
    return msgspec.structs.replace(
        rule,
        name=None if glob else rule.name,
        path=rule.path if rule.path and is_literal(rule.path.removesuffix(_WITH_BELOW)) else None,
        interface=interface,
        member=literal(rule.member) if interface is not None else None,
        # The form has a single text for a name or an app.
        peer=None if rule.peer is not None and rule.peer.kind == "app" else rule.peer,
    )
