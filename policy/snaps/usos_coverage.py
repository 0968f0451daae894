"""Catalogue entries that a(usos) can express: `python -m policy.snaps.usos_coverage`.

An entry counts if the form can express everything that the entry allows on a bus, for any snap.
docs/policy.md contains the printed numbers.
"""

import sys
from collections import Counter
from typing import Final

import msgspec

from policy.rules import Peer
from policy.snaps.catalogue_schema import SYSTEMS
from policy.snaps.installed import SNAP_TYPE, samples
from policy.snaps.library import Known, Library, load_library
from policy.snaps.templates import Template, fill
from policy.usos.convert import make_list

NO_RULE: Final = "it gives no rule"
_SOME_APP: Final = Peer(kind="app", type=SNAP_TYPE, app="some", component="app")
_PEERS: Final = {None: None, "host": Peer(kind="host"), "same-snap": Peer(kind="same-app")}


def count(library: Library) -> Counter[str]:
    """Return the number of expressible entries (under ""), and of other entries by reason."""
    return Counter(
        _reason(known, template)
        for known in (*library.interfaces.values(), library.every_snap)
        for templates in known.sections.values()
        for template in templates
    )


def report(counted: Counter[str]) -> str:
    """Return the numbers as lines of text."""
    lines = [f"a(usos) suffices for {counted['']} of {counted.total()} entries of the catalogue."]
    lines += [f"{number:5} not: {reason}" for reason, number in counted.most_common() if reason]
    return "\n".join(lines) + "\n"


def _reason(known: Known, template: Template) -> str:
    if template.entry.never is not None:
        return NO_RULE
    ends = {end for system in SYSTEMS for end in template.entry.other_ends(system)}
    peers = [_PEERS.get(end, _SOME_APP) for end in ends]
    rules, _ = fill(template, peers, "", samples(known.interface, ("plug", "slot")))
    unsaid = make_list(msgspec.structs.replace(rule, bus=None) for rule in rules).unsaid
    return min((reason for _, reason in unsaid), default="")


if __name__ == "__main__":
    sys.stdout.write(report(count(load_library())))
