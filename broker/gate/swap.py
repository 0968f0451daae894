"""A change of rules on a connection: what the app is told of it, and what is taken from it. No I/O."""

from typing import Final

from broker.gate.core import Core
from broker.gate.handover import Then
from broker.gate.incoming import Incoming
from broker.gate.owners import Owners
from broker.gate.sight import Sight
from policy.match import Judge


class Swap:
    """The changes of one connection, one after the other."""

    def __init__(self, core: Core, owners: Owners, sight: Sight, incoming: Incoming) -> None:
        self._core: Final = core
        self._owners: Final = owners
        self._sight: Final = sight
        self._incoming: Final = incoming
        # Names that the app saw when the rules changed, until it has been told what the change brought.
        self.told: frozenset[str] | None = None

    def use(self, judge: Judge) -> None:
        """Judge every message from now on by these rules."""
        core = self._core
        seen = self._sight.visible_owners()
        if self.told is not None:  # it has not heard yet of what the last change brought
            seen = {name: owner for name, owner in seen.items() if name in self.told}
        core.judge = judge
        core.forget_verdicts()
        if not core.unique_name:
            return
        if core.bus.speaks(core.unique_name, judge):
            for member in core.bus.members:
                member.forget_verdicts()
        now = self._sight.visible_owners()
        for name, owner in seen.items():
            if name not in now:
                self._incoming.tell_owner_change(name, owner, "")
        self._release_names()
        # What comes into sight is told when all owners are known: another name of an owner may hide it.
        self.told = frozenset(name for name in now if name in seen)
        kept = self.told
        self._owners.use(judge.uses, self.tell_new)
        for name in [name for name in now if name in kept and name not in self._owners.names]:
            # Seen because of its owner alone, who is nobody to ask for any more.
            self._incoming.tell_owner_change(name, now[name], "")

    def _release_names(self) -> None:
        """Give back the names that the app may own no more."""
        core = self._core
        for name in [name for name in core.requested_names if not core.judge.own(name).allowed]:
            del core.requested_names[name]
            core.bus.payers.moves("", name)  # who changed the rules did it
            core.call_driver("ReleaseName", "s", (name,), Then("ignore"))

    def tell_new(self) -> None:
        """Tell of the names that came into sight with the rules."""
        told, self.told = self.told or frozenset(), None
        for name, owner in self._sight.visible_owners().items():
            if name not in told:
                self._incoming.tell_owner_change(name, "", owner)
