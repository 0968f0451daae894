"""A match rule is refused by a declared error, or its canonical text says the same to a plain reader."""

import re
from typing import Final

from broker.wire.errors import (
    ACCESS_DENIED,
    LIMITS_EXCEEDED,
    MATCH_RULE_INVALID,
    CallRefusedError,
)
from broker.wire.matchrule import MAX_RULE, MatchRule, parse_match_rule
from integration.fuzz.pieces import text_of

_ERRORS: Final = (ACCESS_DENIED, LIMITS_EXCEEDED, MATCH_RULE_INVALID)
# How a canonical rule looks: values in quotes, an apostrophe outside of them behind a backslash.
_PAIR: Final = re.compile(r"([a-z_0-9]+)='((?:[^']|'\\'')*)'(?:,|$)")


def check(data: bytes) -> None:
    """Hold the invariant."""
    text = text_of(data)
    try:
        rule = parse_match_rule(text)
    except CallRefusedError as exc:
        assert exc.dbus_name in _ERRORS
        assert str(exc).isprintable()
        return
    canonical = rule.canonical()
    assert len(canonical.encode()) <= MAX_RULE
    assert parse_match_rule(canonical) == rule
    keys = read_plainly(canonical)
    assert keys.pop("type") == "signal"
    assert keys == said_by(rule)
    assert hears_its_own(rule)


def read_plainly(text: str) -> dict[str, str]:
    """Read a canonical rule in the simplest way."""
    pairs = list(_PAIR.finditer(text))
    assert "".join(pair[0] for pair in pairs) == text
    keys = {pair[1]: pair[2].replace(r"'\''", "'") for pair in pairs}
    assert len(keys) == len(pairs)
    return keys


def said_by(rule: MatchRule) -> dict[str, str]:
    """Return what a rule has, as keys and values."""
    plain = {
        "sender": rule.sender,
        "interface": rule.interface,
        "member": rule.member,
        "path": rule.path,
        "path_namespace": rule.path_namespace,
        "arg0namespace": rule.arg0namespace,
    }
    args = {f"arg{index}{'path' * is_path}": value for index, value, is_path in rule.args}
    return {key: value for key, value in plain.items() if value is not None} | args


def hears_its_own(rule: MatchRule) -> bool:
    """Say whether a rule matches the signal that it describes."""
    args = [""] * 64
    for index, value, _ in rule.args:
        args[index] = value
    if rule.arg0namespace is not None:
        args[0] = rule.arg0namespace
    return rule.matches(
        sender_names=[rule.sender or ":1.1"],
        path=rule.path or rule.path_namespace or "/",
        interface=rule.interface or "a.b",
        member=rule.member or "M",
        args=args,
    )


def seeds() -> list[bytes]:
    """Return rules with every key and every way to quote."""
    return [
        b"type='signal',sender='org.freedesktop.DBus',interface='a.b',member='M',path='/a'",
        b"type=signal,path_namespace='/a/b',arg0namespace='org.x',arg1='a',arg63path='/x/',",
        rb"arg0='it'\''s',arg2=a\b\'\n , member = 'M' ",
        b"eavesdrop='true',destination=':1.5'",
        "arg0='\u00e9\U0001f41b,=',eavesdrop=false".encode(),
    ]
