"""The match rules of an app, indexed so that an owner change is looked up and no rule is tried. No I/O.

The bus delivers the signals that any match rule of the connection asks for, and the gate adds more rules for owner
changes. So the gate finds out for each owner change whether a rule of the app asks for the change. Many connections hear
each change, and each may have a thousand rules. So the rules are indexed by their conditions on the arguments.
"""

from collections import Counter
from collections.abc import ItemsView, Iterator
from typing import Final, TypeVar

from broker.wire.interfaces import DRIVER, DRIVER_PATH
from broker.wire.matchrule import MatchRule

_OWNER_CHANGED: Final = "NameOwnerChanged"
# The arguments of NameOwnerChanged: name, old owner and new owner. A rule names some of them.
_ARGUMENTS: Final = 3
_CHOICES: Final = tuple(
    tuple(n for n in range(_ARGUMENTS) if choice >> n & 1) for choice in range(2**_ARGUMENTS)
)
_CHOICES_BUT_NAME: Final = tuple(choice for choice in _CHOICES if 0 not in choice)

_Key = TypeVar("_Key")
# The conditions of a rule on the arguments: an arg0namespace or None, and indexes of arguments with values.
_Place = tuple[str | None, tuple[tuple[int, str], ...]]


class Subscriptions:
    """The match rules of an app, each with a count of its additions."""

    def __init__(self) -> None:
        self._counts: Final[dict[MatchRule, int]] = {}
        # The number of rules that an owner change can match, by their conditions.
        self._filed: Final[Counter[_Place]] = Counter()
        self._spaces: Final[Counter[str]] = Counter()
        self.count = 0  # the number of rules, repeated ones included

    def __contains__(self, rule: MatchRule) -> bool:
        return rule in self._counts

    def __len__(self) -> int:
        return len(self._counts)

    def items(self) -> ItemsView[MatchRule, int]:
        """Return the rules, and how often each was added."""
        return self._counts.items()

    def add(self, rule: MatchRule, count: int = 1) -> None:
        """Add a rule `count` times."""
        self.count += count
        if rule in self._counts:
            self._counts[rule] += count
            return
        self._counts[rule] = count
        if _is_about_owners(rule):
            self._filed[_place(rule)] += 1
            if rule.arg0namespace is not None:
                self._spaces[rule.arg0namespace] += 1

    def drop(self, rule: MatchRule) -> None:
        """Remove a rule once."""
        self.count -= 1
        self._counts[rule] -= 1
        if self._counts[rule]:
            return
        del self._counts[rule]
        if _is_about_owners(rule):
            _take_one(self._filed, _place(rule))
            if rule.arg0namespace is not None:
                _take_one(self._spaces, rule.arg0namespace)

    def want_owner_change(self, name: str, old: str, new: str) -> bool:
        """Return whether a rule of the app matches this owner change."""
        filed = self._filed
        if not filed:
            return False
        arguments = ((0, name), (1, old), (2, new))
        if any((None, tuple(arguments[n] for n in choice)) in filed for choice in _CHOICES):
            return True
        return any(
            (base, tuple(arguments[n] for n in choice)) in filed
            for base in (_bases(name) if self._spaces else ())
            if base in self._spaces
            for choice in _CHOICES_BUT_NAME
        )


def _is_about_owners(rule: MatchRule) -> bool:
    """Return whether the rule matches owner changes with some arguments."""
    space = rule.path_namespace
    return (
        rule.sender in (None, DRIVER)
        and rule.interface in (None, DRIVER)
        and rule.member in (None, _OWNER_CHANGED)
        and rule.path in (None, DRIVER_PATH)
        and (space in (None, "/", DRIVER_PATH) or DRIVER_PATH.startswith(f"{space}/"))
        and all(index < _ARGUMENTS for index, _, _ in rule.args)
    )


def _place(rule: MatchRule) -> _Place:
    # A name has no slash in it, so a condition on it as a path matches the same value alone.
    return rule.arg0namespace, tuple((index, value) for index, value, _ in rule.args)


def _bases(name: str) -> Iterator[str]:
    """Return the name, and the part before each dot."""
    at = len(name)
    while at > 0:
        yield name[:at]
        at = name.rfind(".", 0, at)


def _take_one(counter: Counter[_Key], key: _Key) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
