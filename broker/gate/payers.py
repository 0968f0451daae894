"""Who pays for what a bus brings: the budgets of the sandboxes behind its connections. No I/O.

A message of the bus is work for each connection that hears it, and whoever caused it pays for all of that work from the
budget of messages of its sandbox: who sent it; of an owner change, who asked for it; of an answer to a question of the
gate's own, whose connection it was asked on. What hosts cause is nobody's.
"""

from collections import OrderedDict
from typing import Final

from broker.gate.budgets import MessageBudget
from broker.gate.handover import PayersDump

# Connections that are closed and whose names still go, for those who read slowly: as in bus.py.
MAX_LATE: Final = 4096
# Names that somebody asked for, or gave back. Pushing one out takes as many requests, each of which is paid for.
MAX_MOVERS: Final = 4096
# Connections that others heard of before the answer to their Hello was read.
MAX_ARRIVING: Final = 256


class Payers:
    """The payers of one bus."""

    def __init__(self) -> None:
        # By unique name; what has none is a host's. Whoever passes on what is known looks here without asking us.
        self.budgets: Final[dict[str, MessageBudget]] = {}
        self._late: Final[OrderedDict[str, str]] = OrderedDict()  # -> id of its sandbox
        self._movers: Final[OrderedDict[str, str]] = OrderedDict()
        self._arriving: Final[OrderedDict[str, int]] = OrderedDict()  # -> what it owes
        # Of another gate's late ones, whose sandboxes are still to come: sandbox id -> unique names.
        self._orphans: Final[dict[str, list[str]]] = {}

    def joined(self, unique_name: str, budget: MessageBudget) -> None:
        """Let that budget pay for what the connection causes."""
        self._late.pop(unique_name, None)
        self.budgets[unique_name] = budget
        if owed := self._arriving.pop(unique_name, 0):
            budget.charge(owed)

    def left(self, unique_name: str, sandbox: str, names: list[str]) -> None:
        """Note that a connection is closed; its names go with it, at its cost."""
        if unique_name not in self.budgets:
            return
        for name in names:
            self.moves(unique_name, name)
        self._late[unique_name] = sandbox
        if len(self._late) > MAX_LATE:
            oldest, _ = self._late.popitem(last=False)
            del self.budgets[oldest]

    def clear(self) -> None:
        """Forget all: the bus has started anew."""
        for known in (self.budgets, self._late, self._movers, self._arriving, self._orphans):
            known.clear()

    def moves(self, unique_name: str, name: str) -> None:
        """Note that a connection asks for a name, or gives it back: the owner changes that follow are its doing.

        "" is whoever is no sandbox.
        """
        self._movers[name] = unique_name
        self._movers.move_to_end(name)
        if len(self._movers) > MAX_MOVERS:
            self._movers.popitem(last=False)

    def who_moved(self, name: str, *owners: str) -> str:
        """Return which of the owners, the new one first, made a name go from one to the other; "" is nobody we know."""
        if name[:1] == ":":
            return name  # who connects or leaves
        mover = self._movers.get(name)
        if mover == "":
            return ""
        known = [owner for owner in owners if owner in self.budgets]
        return mover if mover in known else next(iter(known), "")

    def who_asked(self, name: str) -> str:
        """Return who has asked for a name, or given it back, last; "" is nobody we know."""
        mover = self._movers.get(name, "")
        return mover if mover in self.budgets else ""

    def charge(self, unique_name: str, cost: int) -> None:
        """Have the sandbox of that connection pay, if it is one's."""
        budget = self.budgets.get(unique_name)
        if budget is not None:
            budget.charge(cost)

    def charge_arrival(self, unique_name: str, cost: int) -> None:
        """The same for one that is new on the bus: if it is a sandbox's, that may not be known yet."""
        if unique_name in self.budgets:
            self.charge(unique_name, cost)
            return
        self._arriving[unique_name] = self._arriving.get(unique_name, 0) + cost
        if len(self._arriving) > MAX_ARRIVING:
            self._arriving.popitem(last=False)

    # -- handing over --------------------------------------------------------------------------

    def dump(self) -> PayersDump:
        """Return all but the connections, which bring their budgets with them."""
        # In no order, since sandboxes come in their own; and with those whose sandboxes have ended, which nobody adopts.
        late = dict(self._late)
        for sandbox, names in self._orphans.items():
            late.update(dict.fromkeys(names, sandbox))
        return PayersDump(
            late=tuple(sorted(late.items())[-MAX_LATE:]),
            movers=tuple(self._movers.items()),
            arriving=tuple(self._arriving.items()),
        )

    def load(self, dump: PayersDump) -> None:
        """Know what the one knew that made the dump."""
        self._movers.update(dump.movers)
        self._arriving.update(dump.arriving)
        for unique_name, sandbox in dump.late:
            self._orphans.setdefault(sandbox, []).append(unique_name)

    def adopt(self, sandbox: str, budget: MessageBudget) -> None:
        """Let a sandbox that was handed over pay for those of its connections that are closed."""
        for unique_name in self._orphans.pop(sandbox, ()):
            self.joined(unique_name, budget)
            self.left(unique_name, sandbox, [])
