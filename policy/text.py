"""Rules as people write them, on the command line and in D-Bus arguments: text <-> Rule.

    ACCESS[+ACCESS...]:[NAME][@PATH][:[INTERFACE.]MEMBER][,peer=PEER][,bus=BUS]

docs/policy.md explains the grammar with examples. Allow or deny is not part of the text.

The separators (`:` `@` `,` outside braces) cannot occur in the parts, with two exceptions. A unique
name begins with `:` and a digit. The free text of a PEER or BUS may contain separators, written as
`%XX`.
"""

import re
from collections.abc import Callable, Iterator
from typing import Final

from policy.globs import (
    PatternError,
    check_interface,
    compile_interface,
    compile_member_glob,
    compile_path,
    parse_name_pattern,
)
from policy.rules import Access, Peer, Rule

# Characters that must be escaped in the free text of a peer or bus.
_UNSAFE: Final = re.compile(r"[\x00-\x20%,#\x7f]")
_ESCAPE: Final = re.compile(r"%([0-7][0-9A-Fa-f])")
_BAD_ESCAPE: Final = re.compile(r"%(?![0-7][0-9A-Fa-f])")
_NAME: Final = re.compile(r"(?::(?=[0-9]))?[^@:]*")
_PATH: Final = re.compile(r"[^:]*")
_BRACKETS: Final = re.compile(r"[{},.]|\[[^\]]*\]")
_WORDS: Final = {str(access): access for access in Access}
_SHOWN: Final = 200  # characters of a bad rule in the error


class RuleSyntaxError(ValueError):
    """A rule cannot be read. `position` counts characters from 1."""

    def __init__(self, text: str, position: int, problem: str) -> None:
        shown = (text if text.isprintable() else ascii(text)[1:-1])[:_SHOWN]
        super().__init__(f'bad rule "{shown}": character {position}: {problem}')
        self.text: Final = text
        self.position: Final = position
        self.problem: Final = problem


def parse_rule(text: str, *, deny: bool = False, origin: str = "") -> Rule:
    """Return the rule. Raises RuleSyntaxError."""
    try:
        rule = _read_rule(text, deny=deny, origin=origin)
    except PatternError as exc:
        raise RuleSyntaxError(text, exc.position + 1, exc.problem) from None
    if (problem := misfit(rule)) is not None:
        raise RuleSyntaxError(text, 1, problem)
    return rule


def format_rule(rule: Rule) -> str:
    """Return text that `parse_rule` reads as this rule, or as a rule of the same meaning."""
    parts = ["+".join(access for access in Access if access in rule.access), ":", rule.name or ""]
    if rule.path is not None:
        parts += "@", rule.path
    if rule.interface is not None:
        # `*` alone means any interface or none. `**` requires an interface.
        interface = "**" if rule.interface == "*" else rule.interface
        parts += ":", interface, ".", rule.member or "*"
    elif rule.member is not None:
        parts += ":", rule.member
    if rule.peer is not None:
        parts += ",peer=", _format_peer(rule.peer)
    if rule.bus is not None:
        parts += ",bus=", _escape(rule.bus)
    return "".join(parts)


def misfit(rule: Rule) -> str | None:
    """Describe a condition that a rule's access can never meet; None if all conditions fit.

    Such rules are refused, because without the condition the rule would silently be wider than
    written.
    """
    about_messages = any(part is not None for part in (rule.path, rule.interface, rule.member))
    if Access.OWN in rule.access and about_messages:
        return "own is about a name: no path, interface or member"
    if Access.OWN in rule.access and rule.peer is not None:
        return "own is about a name: no peer"
    if rule.access == {Access.SEE} and about_messages:
        return "see is about a name: no path, interface or member"
    return None


def _read_rule(text: str, *, deny: bool, origin: str) -> Rule:
    colon = text.find(":")
    if colon < 0:
        raise PatternError("':' missing after the access", len(text))
    access = _read_access(text[:colon])
    # The patterns end, and the options begin, at the first comma outside braces.
    end = next(_outside_brackets(text, ",", colon + 1), len(text))
    name, at = _read_name(text, colon + 1, end)
    path, at = _read_path(text, at, end)
    interface, member = _read_member(text, at, end)
    options = _read_options(text, end)
    peer = options.get("peer")
    bus = options.get("bus")
    return Rule(
        access=access,
        deny=deny,
        bus=None if bus is None else _unescape(text, *bus),
        name=name,
        path=path,
        interface=interface,
        member=member,
        peer=None if peer is None else _read_peer(text, *peer),
        origin=origin,
    )


def _read_access(text: str) -> frozenset[Access]:
    found, at = set(), 0
    for word in text.split("+"):
        if word not in _WORDS:
            raise PatternError(f"unknown access {word!r}: not one of {', '.join(_WORDS)}", at)
        found.add(_WORDS[word])
        at += len(word) + 1
    return frozenset(found)


def _read_name(text: str, start: int, end: int) -> tuple[str | None, int]:
    found = _NAME.match(text, start, end)
    assert found is not None  # the expression also matches an empty text
    if not found[0]:
        return None, start
    _checked(parse_name_pattern, found[0], start)
    return found[0], found.end()


def _read_path(text: str, at: int, end: int) -> tuple[str | None, int]:
    if at == end or text[at] != "@":
        return None, at
    found = _PATH.match(text, at + 1, end)
    assert found is not None
    if not found[0]:
        raise PatternError("empty path after '@'", at)
    _checked(compile_path, found[0], at + 1)
    return found[0], found.end()


def _read_member(text: str, at: int, end: int) -> tuple[str | None, str | None]:
    """Return interface and member of `:INTERFACE.MEMBER`, where `*` or an empty text means any."""
    if at == end:
        return None, None
    start = at + 1
    if start == end:
        raise PatternError("nothing after ':'", at)
    spec = text[start:end]
    dot = max(_outside_brackets(spec, ".", 0), default=-1)
    interface, member = spec[: max(dot, 0)], spec[dot + 1 :]
    if not member:
        raise PatternError("no member after '.': '*' is any", start + dot)
    if interface not in {"", "*"}:
        _checked(compile_interface, interface, start)
    if member != "*":
        _checked(compile_member_glob, member, start + dot + 1)
    return (
        None if interface in {"", "*"} else interface,
        None if member == "*" else member,
    )


def _read_options(text: str, at: int) -> dict[str, tuple[int, int]]:
    """Return the start and end of each option's value."""
    found: dict[str, tuple[int, int]] = {}
    while at < len(text):
        start = at + 1
        comma = text.find(",", start)
        at = len(text) if comma < 0 else comma
        key, equals, value = text[start:at].partition("=")
        if key not in {"peer", "bus"} or not equals:
            raise PatternError("expected peer=... or bus=...", start)
        if key in found:
            raise PatternError(f"{key}= a second time", start)
        if not value:
            raise PatternError(f"nothing after {key}=", at - 1)
        found[key] = (at - len(value), at)
    return found


def _read_peer(text: str, start: int, end: int) -> Peer:
    value = text[start:end]
    if value == "host":
        return Peer(kind="host")
    if value == "same-app":
        return Peer(kind="same-app")
    if not value.startswith("app:"):
        raise PatternError("peer is not host, same-app or app:TYPE/ID", start)
    start += len("app:")
    slash = text.find("/", start, end)
    if slash < 0:
        raise PatternError("'/' missing between type and app", end)
    _checked(check_interface, text[start:slash], start)
    hash_sign = text.find("#", slash, end)
    component = None
    if hash_sign >= 0:
        if hash_sign + 1 == end:
            raise PatternError("empty component after '#'", hash_sign)
        component = _unescape(text, hash_sign + 1, end)
        end = hash_sign
    app = _unescape(text, slash + 1, end)
    return Peer(kind="app", type=text[start:slash], app=app, component=component)


def _format_peer(peer: Peer) -> str:
    if peer.kind != "app":
        return peer.kind
    component = "" if peer.component is None else f"#{_escape(peer.component)}"
    return f"app:{peer.type}/{_escape(peer.app)}{component}"


def _escape(text: str) -> str:
    return _UNSAFE.sub(lambda found: f"%{ord(found[0]):02X}", text)


def _unescape(text: str, start: int, end: int) -> str:
    if (bad := _BAD_ESCAPE.search(text, start, end)) is not None:
        raise PatternError("'%' without two hexadecimal digits below 80", bad.start())
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text[start:end])


def _checked(check: Callable[[str], object], value: str, start: int) -> None:
    try:
        check(value)
    except PatternError as exc:
        raise PatternError(exc.problem, exc.position + start) from None


def _outside_brackets(text: str, char: str, start: int) -> Iterator[int]:
    depth = 0
    for found in _BRACKETS.finditer(text, start):
        match found[0]:
            case "{":
                depth += 1
            case "}":
                depth -= 1
            case str(other) if other == char and depth == 0:
                yield found.start()
            case _:
                pass
