"""The rows about a thousand sandboxes, and about starting: how long it takes, and what memory it is then."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from integration.bench import parties
from integration.bench.client import Client
from integration.bench.measure import Column, Effort, Result, interleave, make_result
from integration.bench.parties import Scene
from integration.bench.sandboxes import CALM, MILLISECONDS, family_pss, open_sandbox, pss

if TYPE_CHECKING:
    from pathlib import Path

MANY: Final = 1000
A_BLOCK: Final = 50  # of them


def measure_many(scene: Scene, effort: Effort) -> list[Result]:
    """Measure adding so many, time for each, and then the memory of all of them with an idle client each."""
    del effort  # it is the same every time
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:
        supervisor = stack.enter_context(parties.open_supervisor(scene))
        creator = stack.enter_context(Client(scene.bus))
        sandboxes: list[Path] = []
        proxies: list[Path] = []
        pids: list[int] = []

        def add_sandbox() -> None:
            sandboxes.append(stack.enter_context(open_sandbox(creator)))

        def add_proxy() -> None:
            proxies.append(scene.folder / f"many-{next(numbers)}")
            pids.append(stack.enter_context(parties.open_proxy(scene, proxies[-1])))

        columns = [
            Column(run=functools.partial(_time, add), count=A_BLOCK)
            for add in (add_sandbox, add_proxy)
        ]
        interleave(columns, Effort(blocks=MANY // A_BLOCK))
        # The two that warmed up are among them, and left out here.
        for path in (*sandboxes[1:], *proxies[1:]):
            stack.enter_context(Client(path)).settle()
        time.sleep(CALM)
        memory = [[family_pss(supervisor)], [sum(map(pss, pids[1:]))]]
    walls = [column.wall for column in columns]
    return [make_result("ms", MILLISECONDS, walls), make_result("KiB", 1, memory)]


def measure_startup(scene: Scene, effort: Effort) -> list[Result]:
    """Measure from the start of a program to its word that it is ready: gate, supervisor, xdg-dbus-proxy."""
    numbers = itertools.count()

    def start_gate(stack: contextlib.ExitStack) -> None:
        path = scene.folder / f"started-{next(numbers)}"
        stack.enter_context(parties.open_gate_process(path))

    def start_proxy(stack: contextlib.ExitStack) -> None:
        path = scene.folder / f"started-{next(numbers)}"
        stack.enter_context(parties.open_proxy(scene, path))

    def start_supervisor(stack: contextlib.ExitStack) -> None:
        stack.enter_context(parties.open_supervisor(scene))

    starts = (start_gate, start_supervisor, start_proxy)
    columns = [Column(run=functools.partial(_time_start, start), count=1) for start in starts]
    interleave(columns, Effort(blocks=max(3, effort.blocks // 4)))
    gate, supervisor, proxy = (column.wall for column in columns)
    rows: list[Sequence[Sequence[float]]] = [(gate, proxy), (supervisor, proxy)]
    return [make_result("ms", MILLISECONDS, row) for row in rows]


def _time(add: Callable[[], None], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        add()
    return time.perf_counter() - start


def _time_start(start: Callable[[contextlib.ExitStack], None], count: int) -> float:
    taken = 0.0
    for _ in range(count):
        with contextlib.ExitStack() as stack:
            before = time.perf_counter()
            start(stack)
            taken += time.perf_counter() - before
    return taken
