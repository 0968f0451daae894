"""The row about a bus that labels: what it costs a new sandbox that the bus makes a server of its own for it."""

import contextlib
from functools import partial

from integration.bench import parties
from integration.bench.client import BenchError, Client
from integration.bench.measure import Column, Effort, Result, Series, interleave
from integration.bench.parties import Scene
from integration.bench.sandboxes import A_BLOCK, MILLISECONDS, open_sandbox, time_adding
from integration.harness.buses import (
    CONTAINERS1_DAEMON,
    open_containers1_daemon,
    why_no_containers1,
)


def measure_labelled_adding(scene: Scene, effort: Effort) -> list[Result]:
    """Measure the time to a first answered Hello: in a new sandbox on a bus that labels, and (peer) on one that does not.

    Raises BenchError if there is no such bus.
    """
    if not CONTAINERS1_DAEMON.exists():
        raise BenchError(why_no_containers1())
    folder = scene.folder / "labelling"
    folder.mkdir()
    labelling = Scene(folder=folder, bus=folder / "bus")
    with contextlib.ExitStack() as stack:
        stack.enter_context(open_containers1_daemon(folder))
        stack.enter_context(parties.open_service(labelling))
        creators = []
        for one in (labelling, scene):
            stack.enter_context(parties.open_supervisor(one))
            creators.append(stack.enter_context(Client(one.bus)))

        def add_sandbox(creator: Client, stack: contextlib.ExitStack) -> None:
            stack.enter_context(Client(stack.enter_context(open_sandbox(creator))))

        columns = [
            Column(run=partial(time_adding, partial(add_sandbox, creator)), count=A_BLOCK)
            for creator in creators
        ]
        interleave(columns, effort)
    mine, plain = (Series([value * MILLISECONDS for value in column.wall]) for column in columns)
    return [Result(unit="ms", gate=mine, peer=plain)]
