"""A change of rules on a connection: names are given back, and the app is told of hidden and shown ones. No I/O.

Every message is judged by the new rules from `apply` on. Finding the names that became visible or invisible takes a look
at each followed name. So that is a chore (chores.py), and owner changes and lists of names wait for its end:

    supervisor       gate                                                       bus
     | SetAccess --> | apply: the new judge, all verdicts forgotten             |
     |               | ReleaseName of names that the app may not own -------->  |
     |               | chore: tell the app of each name that is hidden now      |
     |               | AddMatch and GetNameOwner for the names of new rules -->  |
     |               | all owners are known <---------------------------------  |
     |               | chore: tell the app of each name that is visible now     |

A second change may come before the end of the first. `known_to_app` has the names that the app knows meanwhile, so that
no name is announced twice or withdrawn without having been announced.
"""

from typing import Final

from broker.gate.dumps import ReplyAction
from broker.gate.filter.chores import NAME_WORK, STEP_WORK, Work
from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.name_owners import NameOwners
from broker.gate.filter.visibility import NameVisibility
from policy.match import Judge


class AccessChange:
    """The changes of rules of a connection."""

    def __init__(
        self,
        state: ConnectionState,
        owners: NameOwners,
        visibility: NameVisibility,
    ) -> None:
        self._state: Final = state
        self._owners: Final = owners
        self._visibility: Final = visibility
        # Names that the app knows during a change: those that it saw before and sees after it. None: no change.
        self.known_to_app: frozenset[str] | None = None
        self.changing = 0  # changes whose hidden names the app has not been told of

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
        """Tell the app of hidden names, and follow the names of the new rules."""
        known = self.known_to_app
        kept: dict[str, str] = {}
        for owner in sorted(self._owners.views.owners()):
            steps = before.steps + judge.steps
            saw = self._visibility.visible(before, owner)
            if (
                known is not None
            ):  # the app has not been told of the names that the last change showed
                saw &= known
            sees = self._visibility.visible(judge, owner)
            for name in sorted(saw - sees):
                self._visibility.tell_owner_change(name, owner, "")
            kept.update(dict.fromkeys(saw & sees, owner))
            names = len(self._owners.names_of(owner))
            yield NAME_WORK * names + STEP_WORK * (before.steps + judge.steps - steps)
        # Shown names are told when all owners are known, because another name of the owner may hide it.
        self.known_to_app = frozenset(kept)
        yield from self._owners.follow(judge.uses, self.tell_new)
        for name in sorted(kept.keys() - self._owners.names.keys()):
            # The name was visible through its owner alone, and it is not followed any more.
            self._visibility.tell_owner_change(name, kept[name], "")
            yield NAME_WORK
        self.changing -= 1

    def _release_names(self) -> None:
        """Release the names that the app may not own any more."""
        state = self._state
        for name in [name for name in state.requested_names if not state.judge.own(name).allowed]:
            del state.requested_names[name]
            state.bus.payers.moves("", name)  # the change of rules is the cause
            state.call_driver("ReleaseName", "s", (name,), ReplyAction("ignore"))

    def tell_new(self) -> Work:
        """Tell the app of the names that the present rules show."""
        return self._tell_new(self._state.judge)

    def _tell_new(self, judge: Judge) -> Work:
        told, self.known_to_app = self.known_to_app or frozenset(), None
        for owner in sorted(self._owners.views.owners()):
            steps = judge.steps
            for name in sorted(self._visibility.visible(judge, owner) - told):
                self._visibility.tell_owner_change(name, "", owner)
            names = len(self._owners.names_of(owner))
            yield NAME_WORK * names + STEP_WORK * (judge.steps - steps)
