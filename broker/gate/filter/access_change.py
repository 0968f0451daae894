"""A change of rules on a connection: what the app is told of it, and what is taken from it. No I/O.

Every message is judged by the new rules from `use` on. What the app has to be told takes a look at each name that is
followed, old rules against new: that is a chore, and until it is done nobody's names change and no list is given.
"""

from typing import Final

from broker.gate.dumps import ReplyAction
from broker.gate.filter.chores import NAME_WORK, STEP_WORK, Work
from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.name_owners import NameOwners
from broker.gate.filter.visibility import NameVisibility
from policy.match import Judge


class AccessChange:
    """The changes of one connection, one after the other."""

    def __init__(
        self,
        state: ConnectionState,
        owners: NameOwners,
        visibility: NameVisibility,
    ) -> None:
        self._state: Final = state
        self._owners: Final = owners
        self._visibility: Final = visibility
        # Names that the app saw when the rules changed, until it has been told what the change brought.
        self.known_to_app: frozenset[str] | None = None
        self.changing = 0  # changes of which the app has not yet been told what they took

    def apply(self, judge: Judge) -> None:
        """Judge every message from now on by these rules."""
        state = self._state
        before, state.judge = state.judge, judge
        state.verdicts.forget_all()
        if not state.unique_name:
            return
        if state.bus.set_broadcast_judge(state.unique_name, judge):
            for member in state.bus.members:
                member.forget_all()
        self._release_names()
        self.changing += 1
        self._owners.hold(self._change(before, judge))

    def _change(self, before: Judge, judge: Judge) -> Work:
        """Tell of the names that went out of sight, and follow those of the new rules."""
        known = self.known_to_app
        kept: dict[str, str] = {}
        for owner in sorted(self._owners.views.owners()):
            steps = before.steps + judge.steps
            saw = self._visibility.visible(before, owner)
            if known is not None:  # it has not heard yet of what the last change brought
                saw &= known
            sees = self._visibility.visible(judge, owner)
            for name in sorted(saw - sees):
                self._visibility.tell_owner_change(name, owner, "")
            kept.update(dict.fromkeys(saw & sees, owner))
            names = len(self._owners.names_of(owner))
            yield NAME_WORK * names + STEP_WORK * (before.steps + judge.steps - steps)
        # What comes into sight is told when all owners are known: another name of an owner may hide it.
        self.known_to_app = frozenset(kept)
        yield from self._owners.follow(judge.uses, self.tell_new)
        for name in sorted(kept.keys() - self._owners.names.keys()):
            # Seen because of its owner alone, who is nobody to ask for any more.
            self._visibility.tell_owner_change(name, kept[name], "")
            yield NAME_WORK
        self.changing -= 1

    def _release_names(self) -> None:
        """Give back the names that the app may own no more."""
        state = self._state
        for name in [name for name in state.requested_names if not state.judge.own(name).allowed]:
            del state.requested_names[name]
            state.bus.payers.moves("", name)  # the change of rules is the cause
            state.call_driver("ReleaseName", "s", (name,), ReplyAction("ignore"))

    def tell_new(self) -> Work:
        """Tell of the names that came into sight with the rules that are in force now."""
        return self._tell_new(self._state.judge)

    def _tell_new(self, judge: Judge) -> Work:
        told, self.known_to_app = self.known_to_app or frozenset(), None
        for owner in sorted(self._owners.views.owners()):
            steps = judge.steps
            for name in sorted(self._visibility.visible(judge, owner) - told):
                self._visibility.tell_owner_change(name, "", owner)
            names = len(self._owners.names_of(owner))
            yield NAME_WORK * names + STEP_WORK * (judge.steps - steps)
