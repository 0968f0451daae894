"""The match rules of one app, filed so that none has to be tried for an owner change. No I/O.

The bus delivers what any rule of the connection asks for, those of the gate's own included; so for owner changes, which the
gate asks for itself, it has to be found out whether the app wants them as well. Each change is heard by many connections,
and each may have a thousand rules: they are filed by the arguments that they name.
"""

from collections import Counter
from collections.abc import ItemsView, Iterator
from typing import Final, TypeVar

from broker.wire.interfaces import DRIVER, DRIVER_PATH
from broker.wire.matchrule import MatchRule

_OWNER_CHANGED: Final = "NameOwnerChanged"
# Name, old and new owner. Which of them a rule names.
_ARGUMENTS: Final = 3
_CHOICES: Final = tuple(
    tuple(n for n in range(_ARGUMENTS) if choice >> n & 1) for choice in range(2**_ARGUMENTS)
)
_CHOICES_BUT_NAME: Final = tuple(choice for choice in _CHOICES if 0 not in choice)

_Key = TypeVar("_Key")
# What a rule asks of the arguments: a name space (None: nothing), and some of them with their values.
_Place = tuple[str | None, tuple[tuple[int, str], ...]]


class Subscriptions:
    """Match rules, each with how often it was added."""

    def __init__(self) -> None:
        self._counts: Final[dict[MatchRule, int]] = {}
        # Of the rules that an owner change can match: how many ask for this of its arguments.
        self._filed: Final[Counter[_Place]] = Counter()
        self._spaces: Final[Counter[str]] = Counter()
        self.count = 0  # each as often as it was added

    def __contains__(self, rule: MatchRule) -> bool:
        return rule in self._counts

    def __len__(self) -> int:
        return len(self._counts)

    def items(self) -> ItemsView[MatchRule, int]:
        """Return the rules, and how often each was added."""
        return self._counts.items()

    def add(self, rule: MatchRule, count: int = 1) -> None:
        """Add a rule, so often."""
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
        """Take a rule away, once."""
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
        """Say whether the app wants to hear that a name goes from one owner to another."""
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
    """Say whether an owner change can match, as far as one differs from another in its arguments alone."""
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
    # A name has no slash in it: as a path it is matched by its like alone.
    return rule.arg0namespace, tuple((index, value) for index, value, _ in rule.args)


def _bases(name: str) -> Iterator[str]:
    """Return the name, and what stands before each of its dots."""
    at = len(name)
    while at > 0:
        yield name[:at]
        at = name.rfind(".", 0, at)


def _take_one(counter: Counter[_Key], key: _Key) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
