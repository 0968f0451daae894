"""Floods of one sandbox: its budget holds it back, all others are answered, and nobody else is slowed down.

Counts alone are checked here. How much longer the others wait during a flood is measured by `make bench`, rows `fair-*`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest

from integration.bench import parties
from integration.bench.flooder import FLOODS, MANY_NAMES, OWNED
from integration.bench.parties import Scene
from integration.harness.buses import Bus
from integration.harness.supervised import Sandbox, Warden, wait_for
from integration.harness.threats import open_limited

# A budget that the flood exceeds on a slow machine, too; the other limits are the usual ones.
LIMITS: Final = {
    "messages_per_second": 2000,
    "match_rules": 1024,
    "names": 256,
    "pending_calls": 4096,
}
CALLS: Final = 100  # of each of the others, while the flood goes on
TALK: Final = f"send:{parties.SERVICE}"
SEE_ALL: Final = f"see:{OWNED[:-1]}?.*"  # a glob, so that all names of the bus are followed
HEARERS: Final = 4
VILLAINS: Final[Mapping[str, Sequence[str]]] = {
    "flip": (f"own:{OWNED}.*", f"see:{OWNED}.*"),
    "flip-250": (f"own:{OWNED}.*", f"see:{OWNED}.*"),
    "broadcast": ("send:",),
    "churn": (SEE_ALL,),
}
# Floods that other limits stop before the budget of messages does: what is read, and what waits to be read.
OTHERWISE_LIMITED: Final = frozenset({"deaf", "huge"})


@pytest.mark.parametrize("kind", FLOODS)
def test_flood_of_one_sandbox_is_held_to_its_budget_and_all_others_are_answered(
    bus: Bus, folder: Path, kind: str
) -> None:
    scene = Scene(folder=folder, bus=folder / "bus")
    assert bus.address.startswith(scene.address)
    with open_limited(bus, folder, **LIMITS) as warden, parties.open_service(scene):
        other = warden.add_server("org.example.Other", rules=[TALK])
        villain = warden.add_server("org.example.Villain", rules=VILLAINS.get(kind, [TALK]))
        hearers = open_hearers(warden, kind)
        callers = [warden.connect(other), warden.connect_host()]
        argv = [sys.executable, "-m", "integration.bench.flooder", kind, str(villain.socket)]
        with parties.open_process(argv) as flooder:
            parties.wait_line(flooder, "ready")
            start(flooder)
            wait_for(lambda: kind in OTHERWISE_LIMITED or throttled(warden, villain), 30)
            for _ in range(CALLS):
                for caller in callers:
                    answer = caller.call(parties.SERVICE, "/", parties.SERVICE, "Echo")
                    assert answer.error is None
        assert not any(throttled(warden, box) for box in (other, *hearers))
        assert "Traceback" not in warden.log


def open_hearers(warden: Warden, kind: str) -> list[Sandbox]:
    """Make sandboxes that hear what a flood of names causes, and names of the host for a flood of connections."""
    if kind == "churn":
        owner = warden.connect_host()
        for number in range(MANY_NAMES):
            owner.request_name(f"{OWNED}.h{number}")
    if kind not in VILLAINS:
        return []
    boxes = [warden.add_server(f"org.example.Hearer{n}", rules=[SEE_ALL]) for n in range(HEARERS)]
    for box in boxes:
        warden.connect(box)
    return boxes


def start(flooder: parties.Process) -> None:
    """Tell the flooder to flood until it is ended."""
    assert flooder.stdin is not None
    flooder.stdin.write(b"f")
    flooder.stdin.flush()


def throttled(warden: Warden, box: Sandbox) -> bool:
    """Say whether the budget of messages has made a sandbox wait."""
    return bool(warden.show(box)["use"]["throttled"])
