"""The names that a connection's app may see. No I/O.

An app sees itself, the bus, the owners that its rules show by any of their names, and the callers of its own objects as
long as they are connected. The app is told of an owner change as far as the old and the new owner are visible. So the app
may be told another change than the bus sent:

    the bus says                            the app may see           the app is told
    org.a moves from :1.2 to :1.3           both                      org.a: :1.2 -> :1.3
                                            :1.3 alone                org.a: ""   -> :1.3
                                            :1.2 alone                org.a: :1.2 -> ""
    org.a comes to :1.2, which has org.b    :1.2 because of org.a     org.a: ""   -> :1.2
                                                                      org.b: ""   -> :1.2
"""

from collections import OrderedDict
from typing import Final

from broker.gate.filter.connection_state import REPLY_SERIAL, ConnectionState
from broker.gate.filter.name_owners import NameOwners
from broker.wire import marshal
from broker.wire.interfaces import DRIVER, DRIVER_PATH
from policy.match import Judge

# Connections that lost the last name that made them visible. The end of such a connection is still told, because a client
# that knew the connection waits for the end.
MAX_LATELY_SEEN: Final = 256


class NameVisibility:
    """The names that an app may see."""

    def __init__(self, state: ConnectionState, owners: NameOwners) -> None:
        self._state: Final = state
        self._owners: Final = owners
        self.recently_visible: Final[OrderedDict[str, None]] = OrderedDict()

    def knows_enough(self, name: str) -> bool:
        """Return False if the verdict on `name` depends on an unknown owner."""
        return (
            name[:1] == ":"
            or name == DRIVER
            or name in self._owners.names
            or not self._state.judge.owner_matters
        )

    def sees(self, name: str) -> bool:
        """Return whether the app may see a name, by the owners known now."""
        return self.would_see(self._state.judge, name)

    def would_see(self, judge: Judge, name: str) -> bool:
        """Return whether the app might see a name by these rules."""
        state = self._state
        if name in (DRIVER, state.unique_name) or name in state.callers:
            return True
        replier = self._owners.names.get(name)
        owner = name if name[:1] == ":" else replier.owner if replier is not None else ""
        if owner and (owner in state.callers or owner == state.unique_name):
            return True
        if owner and (owner == name or not state.bus.judges_names_alone):
            return self._owners.views.sees(judge, owner)
        return judge.see((name,), state.bus.peer(owner)).allowed

    def visible(self, judge: Judge, owner: str) -> frozenset[str]:
        """Return the names of an owner that the app may see by these rules."""
        owned = self._owners.names_of(owner) - {owner}
        if self._state.bus.judges_names_alone:
            return frozenset(name for name in owned if self.would_see(judge, name))
        # All names of an owner are visible if one of them is. So the owner is judged once, however many names it has.
        return frozenset(owned) if self.would_see(judge, owner) else frozenset()

    def owner_changed(self, name: str, old: str, new: str) -> list[tuple[str, str, str]]:
        """Record a NameOwnerChanged; return the changes that the app may be told of.

        A name that moves to an invisible owner disappears for the app, which is told visible unique names alone. A name
        may make the new owner visible, or the loss of the name the old owner invisible, with all names of that owner.
        """
        if name[:1] == ":":
            told = (
                self._state.bus.tells_unique_names
                or self.sees(name)
                or name in self.recently_visible
            )
            if not new:
                self._state.callers.pop(name, None)
                self.recently_visible.pop(name, None)
            return [(name, old, new)] if told else []
        told_old = old if self.sees(name) else ""
        old_seen, new_seen = bool(old) and self.sees(old), bool(new) and self.sees(new)
        self._owners.owner_changed(name, new)
        if old_seen:
            self.recently_visible[old] = None
            if len(self.recently_visible) > MAX_LATELY_SEEN:
                self.recently_visible.popitem(last=False)
        told_new = new if self.sees(name) else ""
        changes = [(name, told_old, told_new)] if told_old or told_new else []
        for owner, before in ((old, old_seen), (new, new_seen)):
            if owner and self.sees(owner) is not before:
                others = sorted(self._owners.names_of(owner) - {name, owner})
                changes += [(each, *((owner, "") if before else ("", owner))) for each in others]
        return changes

    def tell_owner_change(self, name: str, old: str, new: str, said: bytes | None = None) -> None:
        """Tell the app of an owner change that a match rule of the app asks for.

        The match rules of the gate bring changes that the app did not ask for. `said` is the bus's own signal of this
        change. Without `said` the visibility has changed, and the gate makes the signal.
        """
        if self._state.matches.want_owner_change(name, old, new):
            self._state.deliver(said or _owner_changed(name, old, new))


def _owner_changed(name: str, old: str, new: str) -> bytes:
    return marshal.make_signal(
        REPLY_SERIAL,
        path=DRIVER_PATH,
        interface=DRIVER,
        member="NameOwnerChanged",
        sender=DRIVER,
        signature="sss",
        values=(name, old, new),
    )
