"""Views of name owners by an app's rules, counted name by name. No I/O.

An owner is visible if a rule shows one of its names and no rule hides one. Names come and go one at a time, and an
owner may have hundreds. So a view counts the shown and the hidden names of the owner.
An owner of more than MAX_NAMES is not visible, because counting so many names would be too much work at a time, and no
rule allows a message to such an owner anyway.
"""

from typing import Final

from broker.gate.filter.bus_state import BusState
from policy.match import Judge
from policy.rules import Identity
from policy.tables import MAX_NAMES


class View:
    """The view of an owner by a list of rules."""

    __slots__ = ("hidden", "identity", "judge", "shown")

    def __init__(self, judge: Judge, identity: Identity | None) -> None:
        self.judge: Final = judge
        self.identity: Final = identity
        self.shown = self.hidden = 0

    def count(self, name: str, number: int) -> None:
        """Count a name that came (1) or went (-1)."""
        verdict = self.judge.see((name,), self.identity)
        if verdict.allowed:
            self.shown += number
        elif verdict.rule is not None:
            self.hidden += number


class Views:
    """The owners that a connection knows, with their names."""

    def __init__(self, bus: BusState) -> None:
        self._bus: Final = bus
        self._by_owner: Final[dict[str, set[str]]] = {}
        self._views: Final[dict[str, View]] = {}

    def names_of(self, unique_name: str) -> set[str]:
        """Return the unique name and the known names of that owner."""
        return {unique_name, *self._by_owner.get(unique_name, ())}

    def owners(self) -> list[str]:
        """Return the owners of names."""
        return list(self._by_owner)

    def give(self, owner: str, name: str) -> None:
        """Record that an owner has a name."""
        owned = self._by_owner.setdefault(owner, set())
        if name in owned:
            return
        owned.add(name)
        if (view := self._views.get(owner)) is not None:
            view.count(name, 1)

    def take(self, owner: str, name: str) -> None:
        """Record that an owner does not have a name any more."""
        owned = self._by_owner[owner]
        owned.discard(name)
        if not owned:
            del self._by_owner[owner]
            self._views.pop(owner, None)
        elif (view := self._views.get(owner)) is not None:
            view.count(name, -1)

    def sees(self, judge: Judge, owner: str) -> bool:
        """Return whether an owner is visible by these rules, by all names and the unique name."""
        identity = self._bus.peer(owner)
        if owner not in self._by_owner:
            return judge.see((owner,), identity).allowed
        if len(self._by_owner[owner]) >= MAX_NAMES:  # the unique name is not counted
            self._views.pop(owner, None)
            return False
        view = self._views.get(owner)
        # A Judge and an Identity never change. But the rules may have changed, or the identity become known or unknown.
        if view is None or view.judge is not judge or view.identity is not identity:
            view = self._views[owner] = View(judge, identity)
            for name in self.names_of(owner):
                view.count(name, 1)
        return view.shown > 0 and not view.hidden
