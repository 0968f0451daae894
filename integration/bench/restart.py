"""The row about a supervisor that dies: how long until the next one answers, with a thousand sandboxes to take over."""

import contextlib
import os
import signal
import time

from integration.bench import parties
from integration.bench.client import Client
from integration.bench.many import MANY
from integration.bench.measure import Effort, Result, make_result
from integration.bench.parties import Scene
from integration.bench.sandboxes import MILLISECONDS, open_sandbox


def measure_restart(scene: Scene, effort: Effort) -> list[Result]:
    """Measure from the start of the program to its answer to a first AddServer. No peer has the like of it."""
    times: list[float] = []
    with contextlib.ExitStack() as supervisors, Client(scene.bus) as creator:
        supervisor = supervisors.enter_context(parties.open_supervisor(scene))
        with contextlib.ExitStack() as sandboxes:
            for _ in range(MANY):
                sandboxes.enter_context(open_sandbox(creator))
            for _ in range(max(3, effort.blocks // 4)):
                os.kill(supervisor, signal.SIGKILL)
                before = time.perf_counter()
                supervisor = supervisors.enter_context(parties.open_supervisor(scene))
                with open_sandbox(creator):
                    times.append(time.perf_counter() - before)
    return [make_result("ms", MILLISECONDS, [times])]
