"""The payers for messages of a bus: budgets of sandboxes, by unique name. No I/O.

A message of the bus is work on each connection that hears it. The sandbox that caused the message pays for all of that
work from its `messages_per_second`; the hearers pay nothing. The payer is found from the message alone:

    message                              payer
    call, signal, unexpected reply       the sender
    owner change of a well-known name    the mover: the owner that last requested or released the name;
                                         nobody after a change of rules; the new owner if none is known
    owner change of a unique name        the connection that came or left
    answer to a question of the gate     the connection on which the gate asked
    any of these caused by a host        nobody

A payer may be unknown when the bill comes, or gone:

    state      from                       to                         kept in
    arriving   others hear of it          the reply to its Hello     _arriving: its debt, charged by `joined`
    joined     `joined`                   its app closes             budgets
    late       `left`                     4096 others have left      budgets and _late
    orphan     `load` of a late one       `adopt` of its sandbox     _orphans

    A (sandbox)    gate                                 bus
     | RequestName -> | moves(":1.7", name)              |
     |                | -- RequestName ----------------> |
     |                | <- NameOwnerChanged, on B ------ | who_moved(): ":1.7"
     |                | charge(":1.7", work on B)        |
     | closes ------> | left(":1.7", its names)          |
     |                | <- NameOwnerChanged, on B ------ | A still pays: it is late
"""

from collections import OrderedDict
from typing import Final, Protocol

from broker.gate.dumps import PayersDump

# Late connections: their last owner changes may come long after they closed. As in bus_state.py.
MAX_LATE: Final = 4096
# Names with a known mover. Pushing one out takes as many requests, and each request is paid for.
MAX_MOVERS: Final = 4096
# Connections that others heard of before the reply to their Hello was read.
MAX_ARRIVING: Final = 256


class Budget(Protocol):
    """The budget of a sandbox."""

    def charge(self, cost: int) -> None:
        """Take away the cost of messages from the bus."""


class Payers:
    """The payers of a bus."""

    def __init__(self) -> None:
        # By unique name; a host's name has none. The fast path (filter.py) reads it directly.
        self.budgets: Final[dict[str, Budget]] = {}
        self._late: Final[OrderedDict[str, str]] = OrderedDict()  # unique name -> sandbox id
        self._movers: Final[OrderedDict[str, str]] = OrderedDict()
        self._arriving: Final[OrderedDict[str, int]] = OrderedDict()  # unique name -> debt
        # Late connections of the former gate, until their sandbox is loaded: sandbox id -> unique names.
        self._orphans: Final[dict[str, list[str]]] = {}

    def joined(self, unique_name: str, budget: Budget) -> None:
        """Charge the connection's messages to `budget` from now on, and its debt at once."""
        self._late.pop(unique_name, None)
        self.budgets[unique_name] = budget
        if owed := self._arriving.pop(unique_name, 0):
            budget.charge(owed)

    def left(self, unique_name: str, sandbox: str, names: list[str]) -> None:
        """Note that a connection is closed, which pays for the release of `names`."""
        if unique_name not in self.budgets:
            return
        for name in names:
            self.moves(unique_name, name)
        self._late[unique_name] = sandbox
        if len(self._late) > MAX_LATE:
            oldest, _ = self._late.popitem(last=False)
            del self.budgets[oldest]

    def clear(self) -> None:
        """Forget everything, because the bus has restarted."""
        for known in (self.budgets, self._late, self._movers, self._arriving, self._orphans):
            known.clear()

    def moves(self, unique_name: str, name: str) -> None:
        """Note that a connection requests or releases a name, and pays for the changes.

        `unique_name` is "" for a host, or for a change of rules.
        """
        self._movers[name] = unique_name
        self._movers.move_to_end(name)
        if len(self._movers) > MAX_MOVERS:
            self._movers.popitem(last=False)

    def who_moved(self, name: str, *owners: str) -> str:
        """Return the owner, new or old, that caused an owner change; "" if unknown."""
        if name[:1] == ":":
            return name  # the connection itself comes or leaves
        mover = self._movers.get(name)
        if mover == "":
            return ""
        known = [owner for owner in owners if owner in self.budgets]
        return mover if mover in known else next(iter(known), "")

    def who_asked(self, name: str) -> str:
        """Return the sandbox connection that last requested or released a name, or ""."""
        mover = self._movers.get(name, "")
        return mover if mover in self.budgets else ""

    def charge(self, unique_name: str, cost: int) -> None:
        """Charge the sandbox of a connection; a host's connection costs nothing."""
        budget = self.budgets.get(unique_name)
        if budget is not None:
            budget.charge(cost)

    def charge_arrival(self, unique_name: str, cost: int) -> None:
        """Charge a new connection, or note its debt until its sandbox is known."""
        if unique_name in self.budgets:
            self.charge(unique_name, cost)
            return
        self._arriving[unique_name] = self._arriving.get(unique_name, 0) + cost
        if len(self._arriving) > MAX_ARRIVING:
            self._arriving.popitem(last=False)

    # -- handing over --------------------------------------------------------------------------

    def dump(self) -> PayersDump:
        """Return the state without open connections, whose sandboxes bring budgets."""
        # Sorted by name: the order of leaving is lost when sandboxes adopt theirs. Orphans of ended sandboxes are included.
        late = dict(self._late)
        for sandbox, names in self._orphans.items():
            late.update(dict.fromkeys(names, sandbox))
        return PayersDump(
            late=tuple(sorted(late.items())[-MAX_LATE:]),
            movers=tuple(self._movers.items()),
            arriving=tuple(self._arriving.items()),
        )

    def load(self, dump: PayersDump) -> None:
        """Restore the state from `dump`."""
        self._movers.update(dump.movers)
        self._arriving.update(dump.arriving)
        for unique_name, sandbox in dump.late:
            self._orphans.setdefault(sandbox, []).append(unique_name)

    def adopt(self, sandbox: str, budget: Budget) -> None:
        """Charge a sandbox that was handed over for its late connections."""
        for unique_name in self._orphans.pop(sandbox, ()):
            self.joined(unique_name, budget)
            self.left(unique_name, sandbox, [])
