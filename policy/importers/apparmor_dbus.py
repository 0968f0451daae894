"""A `dbus` rule of AppArmor's language: text -> DbusRule, with AppArmor's own checks."""

import re
from typing import Final

import msgspec

from policy.importers.apparmor_lexer import (
    CONDITION,
    KEYWORD,
    PEER_WORD,
    PLACEHOLDER,
    QUOTED,
    WORD,
    Cursor,
    unquote,
)
from policy.importers.report import cut

_ACCESS: Final = {
    "bind": "bind",
    "eavesdrop": "eavesdrop",
    "r": "receive",
    "read": "receive",
    "receive": "receive",
    "send": "send",
    "w": "send",
    "write": "send",
}
_SUBJECT: Final = frozenset({"bus", "name", "path", "interface", "member"})
_PEER: Final = frozenset({"name", "label"})
_OF_MESSAGES: Final = frozenset({"path", "interface", "member", "label", "peer name"})
_GAP: Final = re.compile(r"(?>(?:[ \t\r\n,]+|(?>#[^\n]*))+)")


class DbusRule(msgspec.Struct, frozen=True, kw_only=True):
    """A dbus rule as written, with AppArmor's patterns, and variables not yet replaced."""

    access: frozenset[str]  # send receive bind eavesdrop
    qualifiers: frozenset[str]
    # bus; path, interface, member, "peer name" and label; or name, the name to be owned
    conditions: dict[str, str]
    cursor: Cursor
    at: int
    end: int

    @classmethod
    def make(
        cls, cursor: Cursor, qualifiers: frozenset[str], access: frozenset[str], *, at: int
    ) -> "DbusRule":
        """Return a rule without conditions."""
        return cls(
            access=access,
            qualifiers=qualifiers,
            conditions={},
            cursor=cursor,
            at=at,
            end=cursor.at,
        )

    @property
    def deny(self) -> bool:
        """Return whether the rule denies."""
        return "deny" in self.qualifiers

    @property
    def file(self) -> str:
        """Return the file that contains the rule."""
        return self.cursor.source.name

    @property
    def line(self) -> int:
        """Return the line in which the rule begins."""
        return self.cursor.line(self.at)

    @property
    def text(self) -> str:
        """Return the text of the rule, shortened."""
        return cut(self.cursor.text[self.at : min(self.end, self.at + 1000)])


def parse_dbus_rule(cursor: Cursor, qualifiers: frozenset[str], *, at: int) -> DbusRule:
    """Read a rule after the word `dbus`. Raises ImportFileError."""
    access = _read_access(cursor)
    conditions = _read_conditions(cursor, at)
    return DbusRule(
        access=_checked_access(cursor, access, frozenset(conditions), at),
        qualifiers=qualifiers,
        conditions=conditions,
        cursor=cursor,
        at=at,
        end=cursor.at,
    )


def _read_access(cursor: Cursor) -> frozenset[str]:
    cursor.skip_blanks()
    found: set[str] = set()
    if cursor.peek() == "(":
        start = cursor.at
        cursor.at += 1
        while True:
            cursor.take(_GAP)
            if cursor.peek() == ")":
                cursor.at += 1
                return frozenset(found)
            word = cursor.take(KEYWORD)
            if word is None:
                raise cursor.error("'(' without ')' after 'dbus'", start)
            found |= _accesses(cursor, word)
    word = KEYWORD.match(cursor.text, cursor.at)
    if word is not None and CONDITION.match(cursor.text, cursor.at) is None:
        cursor.at = word.end()
        found |= _accesses(cursor, word)
    return frozenset(found)


def _accesses(cursor: Cursor, word: re.Match[str]) -> set[str]:
    if word[0] in _ACCESS:
        return {_ACCESS[word[0]]}
    if set(word[0]) <= {"r", "w"}:
        return {_ACCESS[letter] for letter in word[0]}
    raise cursor.error(f"unknown access {word[0]!r} of a dbus rule", word.start())


def _read_conditions(cursor: Cursor, at: int) -> dict[str, str]:
    conditions: dict[str, str] = {}
    while True:
        cursor.skip_blanks()
        if cursor.peek() == ",":
            cursor.at += 1
            return conditions
        found = cursor.take(CONDITION)
        if found is None:
            if not cursor.peek():
                raise cursor.error("',' missing at the end of a dbus rule", at)
            raise cursor.error(f"expected a condition or ',' in a dbus rule, not {cursor.shown()}")
        if found[1] != "peer":
            _put(cursor, conditions, found, known=_SUBJECT, value=_read_value(cursor))
            continue
        _read_peer(cursor, conditions, found)
        cursor.skip_blanks()
        if cursor.peek() != ",":
            raise cursor.error("',' missing after peer=(...), which ends a dbus rule")


def _read_value(cursor: Cursor) -> str:
    if cursor.peek() == "(":  # a list of a single value
        start = cursor.at
        cursor.at += 1
        cursor.take(_GAP)
        found = cursor.take(QUOTED) or cursor.take(PEER_WORD)
        cursor.take(_GAP)
        if found is None or cursor.peek() != ")":
            raise cursor.error("a condition of a dbus rule has a single value", start)
        cursor.at += 1
        return unquote(found[0])
    found = cursor.take(QUOTED) or cursor.take(PLACEHOLDER)
    if found is None and cursor.peek() != "#":
        found = cursor.take(WORD)
    if found is None:
        raise cursor.error(f"a value is missing after '=': {cursor.shown()}")
    return unquote(found[0])


def _read_peer(cursor: Cursor, conditions: dict[str, str], peer: re.Match[str]) -> None:
    if cursor.peek() != "(":
        raise cursor.error("'(' missing after peer=")
    cursor.at += 1
    while True:
        cursor.take(_GAP)
        if cursor.peek() == ")":
            cursor.at += 1
            return
        found = cursor.take(CONDITION)
        if found is None:
            raise cursor.error("peer=( without name=, label= or ')'", peer.start())
        value = cursor.take(QUOTED) or cursor.take(PLACEHOLDER) or cursor.take(PEER_WORD)
        if value is None:
            raise cursor.error(f"a value is missing after '=': {cursor.shown()}")
        _put(cursor, conditions, found, known=_PEER, value=unquote(value[0]))


def _put(
    cursor: Cursor,
    conditions: dict[str, str],
    found: re.Match[str],
    *,
    known: frozenset[str],
    value: str,
) -> None:
    name = found[1]
    if name not in known:
        where = "in peer=(...) of" if known is _PEER else "of"
        raise cursor.error(f"unknown condition {name!r} {where} a dbus rule", found.start())
    key = "peer name" if known is _PEER and name == "name" else name
    if key in conditions or (key == "peer name" and "name" in conditions):
        raise cursor.error(f"condition {name!r} a second time in a dbus rule", found.start())
    conditions[key] = value


def _checked_access(
    cursor: Cursor, access: frozenset[str], conditions: frozenset[str], at: int
) -> frozenset[str]:
    """Return the access of a rule.

    Without an explicit access the conditions determine the access.
    """
    messages = conditions & _OF_MESSAGES
    if messages and "name" in conditions:
        raise cursor.error(
            "name= says what may be owned; with conditions on messages it stands in peer=(...)", at
        )
    if not access:
        if messages:
            return frozenset({"send", "receive"})
        return frozenset({"bind"} if "name" in conditions else _ACCESS.values())
    if "bind" in access and messages:
        raise cursor.error("bind is about a name: no path, interface, member or peer", at)
    if access & {"send", "receive"} and "name" in conditions:
        raise cursor.error("send and receive are about messages: name= stands in peer=(...)", at)
    if "eavesdrop" in access and conditions - {"bus"}:
        raise cursor.error("eavesdrop has no condition but bus=", at)
    return access
