"""The rows about an upgrade of the gate: how long a client waits for an answer at the most while it goes on."""

import contextlib
import statistics
import threading
import time
from typing import Final

from broker.wire.marshal import make_call
from integration.bench import parties
from integration.bench.client import Client, make_driver_call
from integration.bench.measure import Effort, Result, make_result
from integration.bench.parties import Scene
from integration.bench.sandboxes import BROKER, MILLISECONDS, open_sandbox

UPGRADES: Final = 20
# What a hostile sandbox has waiting.
SILENT: Final = "org.buswarden.BenchSilent"
CONNECTIONS: Final = 15
WAITING: Final = 4000
STEP: Final = 200
CHANGES: Final = 60
# Seconds between two: the client has answers as usual again.
BETWEEN: Final = 0.05


def measure_upgrades(count: int, scene: Scene, effort: Effort) -> list[Result]:
    """Measure the longest wait in each upgrade, median and most of them all, with so many sandboxes.

    Each has an idle client, one of them asks without end. No peer has the like of it.
    """
    del effort  # the most of more would be more
    with contextlib.ExitStack() as stack:
        stack.enter_context(parties.open_supervisor(scene))
        creator = stack.enter_context(Client(scene.bus))
        clients = [
            stack.enter_context(Client(stack.enter_context(open_sandbox(creator))))
            for _ in range(count)
        ]
        pauses = [_upgrade(creator, clients[0]) for _ in range(UPGRADES)]
    return [
        make_result("ms", MILLISECONDS, [[statistics.median(pauses)]]),
        make_result("ms", MILLISECONDS, [[max(pauses)]]),
    ]


def measure_hostile_upgrades(scene: Scene, effort: Effort) -> list[Result]:
    """Measure the same while a sandbox has all that it may have waiting; the peer is our own, without it.

    Its fifteen connections have 4000 calls each that nobody answers, to a name that changed its owner 60 times since.
    """
    del effort
    with contextlib.ExitStack() as stack:
        stack.enter_context(parties.open_supervisor(scene))
        creator = stack.enter_context(Client(scene.bus))
        victim = stack.enter_context(Client(stack.enter_context(open_sandbox(creator))))
        calm = [_upgrade(creator, victim) for _ in range(UPGRADES)]
        path = stack.enter_context(open_sandbox(creator, SILENT))
        owner = stack.enter_context(Client(scene.bus))
        _request(owner)
        for _ in range(CONNECTIONS):
            _wait_for_ever(stack.enter_context(Client(path)), owner)
        for _ in range(CHANGES):
            _request(stack.enter_context(Client(scene.bus)))
        hostile = [_upgrade(creator, victim) for _ in range(UPGRADES)]
    medians = [[statistics.median(pauses)] for pauses in (hostile, calm)]
    return [make_result("ms", MILLISECONDS, medians)]


def _request(owner: Client) -> None:
    """Take the name from whoever has it."""
    replacing = 0x1 | 0x2 | 0x4  # ALLOW_REPLACEMENT, REPLACE_EXISTING, DO_NOT_QUEUE
    owner.ask(make_driver_call("RequestName", "su", (SILENT, replacing)))


def _wait_for_ever(caller: Client, owner: Client) -> None:
    """Make calls, and see them arrive, so that none waits on its way."""
    call = make_call(1, destination=SILENT, path="/", interface=SILENT, member="Wait")
    for _ in range(WAITING // STEP):
        for _ in range(STEP):
            caller.send(call)
        for _ in range(STEP):
            owner.next_message()


def _upgrade(creator: Client, client: Client) -> float:
    """Have the gate replaced; return the longest time that the client waited for an answer meanwhile."""
    done = threading.Event()
    waits: list[float] = []
    ask = make_driver_call("GetId")

    def ask_on() -> None:
        while not done.is_set():
            start = time.perf_counter()
            client.ask(ask)
            waits.append(time.perf_counter() - start)

    thread = threading.Thread(target=ask_on)
    thread.start()
    try:
        path = "/org/buswarden/Broker1"
        creator.ask(make_call(1, destination=BROKER, path=path, interface=BROKER, member="Upgrade"))
        time.sleep(BETWEEN)
    finally:
        done.set()
        thread.join()
    return max(waits)
