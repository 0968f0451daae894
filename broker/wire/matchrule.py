"""Match rules: parsed strictly, and written in a form that every bus reads alike.

dbus-daemon and dbus-broker read odd rules in different ways. For example `=type='signal'` matches
*everything* on dbus-daemon. So no rule is passed on as received; the `canonical` text is passed on.
Every rule becomes a rule about signals, because only signals are broadcast. The key `destination`
is dropped, because `destination` is about unicast messages. Ambiguous rules and eavesdropping are
refused.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from broker.wire.errors import (
    ACCESS_DENIED,
    LIMITS_EXCEEDED,
    MATCH_RULE_INVALID,
    CallRefusedError,
)
from broker.wire.names import is_bus_name, is_interface, is_member, is_name_space, is_object_path

MAX_RULE: Final = 1024  # bytes; both buses refuse longer rules
MAX_KEYS: Final = 16  # dbus-daemon ignores further keys, and so would match more
MAX_ARGUMENT: Final = 63

_BLANKS: Final = " \t\r\n"
_TYPES: Final = frozenset({"signal", "method_call", "method_return", "error"})
_ARGUMENT: Final = re.compile(r"arg(0|[1-9][0-9]?)(path)?")
# Each alternative is a piece of a value. According to the specification '...' is literal, and \'
# outside of quotes is an apostrophe. A backslash before a comma or another backslash is no piece,
# because readers differ on such a backslash.
_PIECE: Final = re.compile(r"'(?P<quoted>[^']*)'|(?P<escaped>\\')|(?P<plain>[^',\\]+|\\(?![',\\]))")


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchRule:
    """A parsed match rule. A field that is None matches anything."""

    sender: str | None = None
    interface: str | None = None
    member: str | None = None
    path: str | None = None
    path_namespace: str | None = None
    arg0namespace: str | None = None
    # (index, value, whether the key is argNpath), sorted
    args: tuple[tuple[int, str, bool], ...] = ()

    def canonical(self) -> str:
        """Return the text of this rule. Equal rules have equal texts."""
        keys = {"type": "signal"}
        for key in _PLAIN_KEYS:
            value = getattr(self, key)
            if value is not None:
                keys[key] = value
        for index, value, is_path in self.args:
            keys[f"arg{index}path" if is_path else f"arg{index}"] = value
        return ",".join(f"{key}={_quote(value)}" for key, value in keys.items())

    def matches(
        self,
        *,
        sender_names: Collection[str],
        path: str | None,
        interface: str | None,
        member: str | None,
        args: Sequence[str],
    ) -> bool:
        """Return whether the rule matches a signal.

        `sender_names` are all names that the sender owns, including the unique name.
        """
        return (
            (self.sender is None or self.sender in sender_names)
            and self.interface in (None, interface)
            and self.member in (None, member)
            and self.path in (None, path)
            and (self.path_namespace is None or _is_below_path(path or "", self.path_namespace))
            and all(_argument_matches(args, argument) for argument in self.args)
            and (self.arg0namespace is None or _is_below_name(args, self.arg0namespace))
        )


def parse_match_rule(text: str) -> MatchRule:
    """Return the rule. Raises CallRefusedError with the error that a bus would return."""
    if len(text.encode()) > MAX_RULE:
        raise CallRefusedError(LIMITS_EXCEEDED, f"match rule of more than {MAX_RULE} bytes")
    keys = _split(text)
    # Eavesdropping is checked first, because this key is never a mere mistake in a rule.
    if keys.pop("eavesdrop", "false") != "false":
        raise CallRefusedError(ACCESS_DENIED, "eavesdropping is not allowed")
    args = []
    plain: dict[str, str] = {}
    for key, value in keys.items():
        if argument := _ARGUMENT.fullmatch(key):
            args.append((int(argument[1]), value, argument[2] is not None))
        elif key in _CHECKS and _CHECKS[key](value):
            plain[key] = value
        elif key in _CHECKS:
            raise _invalid(f"{key} cannot be {value[:40]!r}")
        else:
            raise _invalid(f"unknown key {key[:40]!r}")
    _check_together(plain, args)
    kept = {key: plain[key] for key in _PLAIN_KEYS if key in plain}
    rule = MatchRule(**kept, args=tuple(sorted(args)))
    # The text that goes to the bus always has the type, and quotes.
    if len(rule.canonical().encode()) > MAX_RULE or 1 + len(kept) + len(args) > MAX_KEYS:
        raise CallRefusedError(LIMITS_EXCEEDED, "match rule too long")
    return rule


_CHECKS: Final[Mapping[str, Callable[[str], bool]]] = {
    "type": _TYPES.__contains__,
    "sender": is_bus_name,
    "interface": is_interface,
    "member": is_member,
    "path": is_object_path,
    "path_namespace": is_object_path,
    "arg0namespace": is_name_space,
    "destination": is_bus_name,
}
_PLAIN_KEYS: Final = tuple(key for key in _CHECKS if key not in ("type", "destination"))


def _check_together(plain: Mapping[str, str], args: Sequence[tuple[int, str, bool]]) -> None:
    if "path" in plain and "path_namespace" in plain:
        raise _invalid("path and path_namespace together")
    indexes = [index for index, _, _ in args]
    if "arg0namespace" in plain:
        indexes.append(0)
    if len(set(indexes)) < len(indexes):
        raise _invalid("an argument matched twice")
    if max(indexes, default=0) > MAX_ARGUMENT:
        raise _invalid(f"an argument above {MAX_ARGUMENT}")


def _split(text: str) -> dict[str, str]:
    """Return the unquoted values by key."""
    keys: dict[str, str] = {}
    at = 0
    # Some generators of rules leave a comma at the end, and buses accept the comma.
    while text[at:].strip(_BLANKS):
        key, equals, _ = text[at:].partition("=")
        at += len(key) + 1
        key = key.strip(_BLANKS)
        if not equals or not key:
            raise _invalid(f"no key and value at {text[max(at - 20, 0) :][:40]!r}")
        if key in keys:
            raise _invalid(f"{key[:40]!r} twice")
        keys[key], at = _take_value(text, at)
        if at < len(text) and text[at] != ",":
            raise _invalid(f"bad quoting at {text[at : at + 20]!r}")
        at += 1
    return keys


def _take_value(text: str, at: int) -> tuple[str, int]:
    pieces = []
    while piece := _PIECE.match(text, at):
        at = piece.end()
        if piece["quoted"] is not None:
            pieces.append(piece["quoted"])
        else:
            pieces.append("'" if piece["escaped"] else piece["plain"])
    return "".join(pieces), at


def _quote(value: str) -> str:
    return "'" + value.replace("'", r"'\''") + "'"


def _invalid(text: str) -> CallRefusedError:
    return CallRefusedError(MATCH_RULE_INVALID, f"match rule: {text}")


def _is_below_path(path: str, base: str) -> bool:
    return path == base or path.startswith(base if base == "/" else base + "/")


def _is_below_name(args: Sequence[str], base: str) -> bool:
    return bool(args) and (args[0] == base or args[0].startswith(base + "."))


def _argument_matches(args: Sequence[str], argument: tuple[int, str, bool]) -> bool:
    index, value, is_path = argument
    if index >= len(args):
        return False
    found = args[index]
    if found == value or not is_path:
        return found == value
    # An argNpath matches a path when either of them ends in a slash and is a prefix of the other.
    return (value.endswith("/") and found.startswith(value)) or (
        found.endswith("/") and value.startswith(found)
    )
