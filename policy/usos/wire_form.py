"""Rules in the form of Containers1, a(usos): (flags, name, path, interface) <-> Rule.

docs/policy.md has the table of flags. The form has no globs, no bus and no origin, and has a single
string for a bus name or an app, but not for both. `make_usos` lists the rules that the form cannot
express, and never widens a rule.
"""

import enum
from collections.abc import Iterable
from typing import Final

from policy.globs import (
    PatternError,
    check_bus_name,
    check_interface,
    check_member,
    check_path,
    is_literal,
    parse_name_pattern,
)
from policy.rules import Access, Peer, Rule
from policy.text import misfit

Usos = tuple[int, str, str, str]

# `/org/example` and everything below it, as a glob.
_BELOW: Final = "{,/**}"


class Flag(enum.IntFlag):
    """The first member of an entry."""

    SEE = 0x1
    SEND = 0x2
    RECEIVE = 0x4
    OWN = 0x8
    NAME_SUBTREE = 0x10
    PATH_SUBTREE = 0x20
    INTERFACE_IS_MEMBER = 0x40  # the last string is `interface.Member`
    DENY = 0x80
    PEER_HOST = 0x100
    PEER_SAME_APP = 0x200
    PEER_APP = 0x400  # the name is `TYPE/ID` or `TYPE/ID#COMPONENT`


_ALL: Final = sum(Flag)
_ACCESS: Final = {
    Flag.SEE: Access.SEE,
    Flag.SEND: Access.SEND,
    Flag.RECEIVE: Access.RECEIVE,
    Flag.OWN: Access.OWN,
}
_PEERS: Final = Flag.PEER_HOST | Flag.PEER_SAME_APP | Flag.PEER_APP


def parse_usos(entries: Iterable[Usos], *, origin: str, first: int = 0) -> tuple[Rule, ...]:
    """Return the rules.

    Raises ValueError with the number of the bad entry, counted from `first`.
    """
    rules = []
    for index, entry in enumerate(entries, first):
        try:
            rules.append(_parse(entry, origin))
        except ValueError as exc:
            raise ValueError(f"rule {index}: {exc}") from None
    return tuple(rules)


def make_usos(rules: Iterable[Rule]) -> tuple[list[Usos], list[tuple[Rule, str]]]:
    """Return entries for the rules that the form can express, and the other rules with reasons."""
    said: list[Usos] = []
    unsaid: list[tuple[Rule, str]] = []
    for rule in rules:
        reason = _unsayable(rule)
        if reason is None:
            said.append(_make(rule))
        else:
            unsaid.append((rule, reason))
    return said, unsaid


def _parse(entry: Usos, origin: str) -> Rule:
    flags, name, path, interface = entry
    if unknown := flags & ~_ALL:
        raise ValueError(f"unknown flags {unknown:#x}")
    access = frozenset(access for flag, access in _ACCESS.items() if flags & flag)
    if not access:
        raise ValueError("none of SEE, SEND, RECEIVE and OWN")
    peer, name = _parse_peer(flags, name)
    iface, member = _parse_interface(flags, interface)
    rule = Rule(
        access=access,
        deny=bool(flags & Flag.DENY),
        name=_parse_name(flags, name),
        path=_parse_path(flags, path),
        interface=iface,
        member=member,
        peer=peer,
        origin=origin,
    )
    if (problem := misfit(rule)) is not None:
        raise ValueError(problem)
    return rule


def _parse_peer(flags: int, name: str) -> tuple[Peer | None, str]:
    """Return the peer, and the string if the string is a bus name."""
    match flags & _PEERS:
        case 0:
            return None, name
        case Flag.PEER_HOST:
            return Peer(kind="host"), name
        case Flag.PEER_SAME_APP:
            return Peer(kind="same-app"), name
        case Flag.PEER_APP:
            return _parse_app(flags, name), ""
        case _:
            raise ValueError("more than one of PEER_HOST, PEER_SAME_APP and PEER_APP")


def _parse_app(flags: int, text: str) -> Peer:
    if flags & Flag.NAME_SUBTREE:
        raise ValueError("NAME_SUBTREE with PEER_APP, whose name is no bus name")
    kind, slash, rest = text.partition("/")
    if not slash:
        raise ValueError(f"app {_cut(text)} is not TYPE/ID or TYPE/ID#COMPONENT")
    try:
        check_interface(kind)
    except PatternError as exc:
        raise ValueError(f"type of app {_cut(text)}: {exc.problem}") from None
    app, hash_sign, component = rest.partition("#")
    if hash_sign and not component:
        raise ValueError(f"app {_cut(text)} with an empty component")
    return Peer(kind="app", type=kind, app=app, component=component if hash_sign else None)


def _parse_name(flags: int, name: str) -> str | None:
    if not name:
        return None
    pattern = name + ".*" if flags & Flag.NAME_SUBTREE and is_literal(name) else name
    try:
        if pattern == name:
            check_bus_name(name)
        else:
            parse_name_pattern(pattern)
    except PatternError as exc:
        raise ValueError(f"name {_cut(name)}: {exc.problem}") from None
    return pattern


def _parse_path(flags: int, path: str) -> str | None:
    below = bool(flags & Flag.PATH_SUBTREE)
    if not path or (path == "/" and below):
        return None
    try:
        check_path(path)
    except PatternError as exc:
        raise ValueError(f"path {_cut(path)}: {exc.problem}") from None
    return path + _BELOW if below else path


def _parse_interface(flags: int, text: str) -> tuple[str | None, str | None]:
    if not text:
        return None, None
    try:
        if not flags & Flag.INTERFACE_IS_MEMBER:
            check_interface(text)
            return text, None
        interface, _, member = text.rpartition(".")
        check_interface(interface)
        check_member(member)
    except PatternError as exc:
        raise ValueError(f"interface {_cut(text)}: {exc.problem}") from None
    return interface, member


def _unsayable(rule: Rule) -> str | None:
    if rule.bus is not None:
        return "it is about one bus"
    if rule.member is not None and rule.interface is None:
        return "it has a member but no interface"
    patterns = (rule.path or "").removesuffix(_BELOW), rule.interface or "", rule.member or ""
    if not all(map(is_literal, patterns)):
        return "it has a glob"
    if rule.name is not None and parse_name_pattern(rule.name).kind == "glob":
        return "it has a glob for a name"
    if rule.peer is not None and rule.peer.kind == "app":
        if rule.name is not None:
            return "it has a name and an app as the peer"
        if "#" in rule.peer.app:
            return "the app's identifier has a '#'"
    return None


def _make(rule: Rule) -> Usos:
    flags = Flag.DENY if rule.deny else Flag(0)
    for flag, access in _ACCESS.items():
        if access in rule.access:
            flags |= flag
    name = rule.name or ""
    if name and parse_name_pattern(name).kind == "subtree":
        flags |= Flag.NAME_SUBTREE
        name = parse_name_pattern(name).base
    path = rule.path or ""
    if path.endswith(_BELOW):
        flags |= Flag.PATH_SUBTREE
        path = path.removesuffix(_BELOW)
    interface = rule.interface or ""
    if rule.member is not None:
        flags |= Flag.INTERFACE_IS_MEMBER
        interface = f"{interface}.{rule.member}"
    if rule.peer is not None:
        flag, app = _make_peer(rule.peer)
        flags |= flag
        name = app or name
    return int(flags), name, path, interface


def _make_peer(peer: Peer) -> tuple[Flag, str]:
    match peer.kind:
        case "host":
            return Flag.PEER_HOST, ""
        case "same-app":
            return Flag.PEER_SAME_APP, ""
        case "app":
            component = "" if peer.component is None else f"#{peer.component}"
            return Flag.PEER_APP, f"{peer.type}/{peer.app}{component}"


def on_the_wire(entry: Usos) -> Usos:
    """Return an entry that can be sent.

    An empty text is no object path, so an entry without a path gets the subtree of the root.
    """
    flags, name, path, interface = entry
    return entry if path else (flags | int(Flag.PATH_SUBTREE), name, "/", interface)


def _cut(text: str) -> str:
    return repr(text[:80])
