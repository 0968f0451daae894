"""A list for a bus that enforces one itself, behind a gate that enforces the exact one: belt and braces.

The bus must never refuse what the gate lets through, and its form (a(usos), policy.containers1) says less than ours. So
an allow that it cannot say is said more widely, and a deny that it cannot say is left to the gate. Nor does it know
peers as we do: whom the gate alone serves on that bus is a host there, and whom another program has the bus label is a
host to us. So no entry is about a peer.
"""

import msgspec

from policy.containers1 import Flag, Usos, make_usos, on_the_wire
from policy.rules import AccessList
from policy.usos import expand, wider


def make_superset(access: AccessList, bus: str) -> tuple[Usos, ...]:
    """Return entries for that bus that allow all that the list allows there, and as little more as can be said."""
    entries: dict[Usos, None] = {}
    for rule in access.rules:
        if rule.bus not in {None, bus} or (rule.deny and rule.peer is not None):
            continue
        for part in expand(msgspec.structs.replace(rule, bus=None, peer=None)):
            said, unsaid = make_usos([part])
            if unsaid and not part.deny:
                said, _ = make_usos([wider(part)])
            entries.update(dict.fromkeys(map(on_the_wire, said)))
    if access.receive_from_host:
        entries[on_the_wire((int(Flag.RECEIVE), "", "", ""))] = None
    return tuple(entries)
