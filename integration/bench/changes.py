"""The row about changes of rules: round trips while 1000 changes a second arrive, and while none do.

The changes are to the sandbox that is measured, which is the worst there is: each throws away what was judged
before. They come from another process, as those of the supervisor do.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

from integration.bench import parties
from integration.bench.client import BenchError
from integration.bench.measure import Column, Effort, Result, interleave, make_result
from integration.bench.parties import Process, Scene
from integration.bench.pusher import RATE
from integration.bench.traffic import MICROSECONDS, ROUNDTRIP, make_column, make_rules

# The rest of a second that a busy machine may take from the pushing process.
ENOUGH: Final = 0.9


def measure_changes(scene: Scene, effort: Effort) -> list[Result]:
    """Measure round trips during changes; the peer is the same sandbox without them."""
    with contextlib.ExitStack() as stack:
        gate = stack.enter_context(parties.open_gate(scene))
        sandbox = gate.add("c0", (*make_rules(9), parties.TALK))
        pusher = stack.enter_context(_open_pusher(gate, "c0"))
        quiet = make_column(stack, sandbox, ROUNDTRIP)
        bus = make_column(stack, scene.bus, ROUNDTRIP)
        pushing = _Pushing(quiet.run, pusher)
        changing = Column(run=pushing.run, check=quiet.check)
        interleave([changing, quiet, bus], effort)
    if pushing.rate < ENOUGH * RATE:
        raise BenchError(f"only {pushing.rate:.0f} changes of rules a second could be made")
    return [make_result("us", MICROSECONDS, [each.wall for each in (changing, quiet, bus)])]


class _Pushing:
    """Round trips with changes meanwhile."""

    def __init__(self, roundtrips: Callable[[int], float], pusher: Process) -> None:
        self._roundtrips: Final = roundtrips
        self._pusher: Final = pusher
        self._changes = 0
        self._seconds = 0.0

    @property
    def rate(self) -> float:
        return self._changes / self._seconds

    def run(self, count: int) -> float:
        assert self._pusher.stdout is not None
        start = time.perf_counter()
        self._tell()
        taken = self._roundtrips(count)
        self._tell()
        self._changes += int(self._pusher.stdout.readline())
        self._seconds += time.perf_counter() - start
        return taken

    def _tell(self) -> None:
        assert self._pusher.stdin is not None
        self._pusher.stdin.write(b"\n")
        self._pusher.stdin.flush()


@contextlib.contextmanager
def _open_pusher(gate: parties.Gate, sandbox: str) -> Iterator[Process]:
    fd = gate.connection.fileno()
    argv = [sys.executable, "-m", "integration.bench.pusher", str(fd), sandbox]
    gate.connection.setblocking(True)  # its time limit is the descriptor's, which both then have
    with parties.open_process(argv, fds=[fd]) as process:
        parties.wait_line(process, "ready")
        yield process
    gate.connection.settimeout(parties.START_TIMEOUT)
