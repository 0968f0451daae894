"""The rows about the end of an app: from SIGKILL to the moment at which its connection and its sandbox's socket are gone.

The app is a process that does nothing. Of ours the sandbox watches that process; the peer is an xdg-dbus-proxy whose
`--fd` the app has, which is how it is used. Each figure is a percentile of the ends of one block.
"""

import contextlib
import functools
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from broker.wire.header import parse_header
from integration.bench import parties
from integration.bench.client import BenchError, Client
from integration.bench.measure import Effort, Result, make_result
from integration.bench.parties import Scene
from integration.bench.sandboxes import MILLISECONDS, make_broker_call
from integration.harness.values import Variant, decode

ENDS: Final = 50  # a block: its 99th percentile is its slowest
TIMEOUT: Final = 10.0  # seconds
_APP: Final = ["sleep", "1000"]
End = Callable[[], float]


def measure_ends(scene: Scene, effort: Effort) -> list[Result]:
    """Measure the time from the end of an app to the end of its sandbox: half of them, and 99 of 100, take no longer."""
    with parties.open_supervisor(scene), Client(scene.bus) as creator:
        columns: list[End] = [
            functools.partial(_end_sandbox, creator),
            functools.partial(_end_proxy, scene),
        ]
        for end in columns:
            end()
        blocks: list[list[Sequence[float]]] = [[], []]
        for _ in range(max(3, effort.blocks // 4)):
            for column, end in zip(blocks, columns, strict=True):
                column.append(sorted(end() for _ in range(ENDS)))
    return [
        make_result(
            "ms", MILLISECONDS, [[_percentile(b, share) for b in column] for column in blocks]
        )
        for share in (0.5, 0.99)
    ]


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _end_sandbox(creator: Client) -> float:
    pid = os.posix_spawnp(_APP[0], _APP, os.environ)
    named = {"Process": Variant("u", pid)}
    call = make_broker_call("AddServer", "ssa{sv}a{sv}", (parties.SERVICE, "bench", {}, named))
    reply = creator.ask(call)
    _, path, _ = decode("oays", reply[parse_header(reply).size :])
    return _time_end(Path(os.fsdecode(path.rstrip(b"\0"))), pid, unlinked=True)


def _end_proxy(scene: Scene) -> float:
    path = scene.folder / "ending-proxy"
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.ExitStack() as stack:
        argv = ["xdg-dbus-proxy", f"--fd={theirs.fileno()}", scene.address, str(path), "--filter"]
        stack.enter_context(parties.open_process(argv, fds=[theirs.fileno()]))
        theirs.close()
        ours.settimeout(parties.START_TIMEOUT)
        if not ours.recv(1):
            raise BenchError("xdg-dbus-proxy ended at its start")
        actions = [(os.POSIX_SPAWN_DUP2, ours.fileno(), ours.fileno())]
        os.set_inheritable(ours.fileno(), True)
        pid = os.posix_spawnp(_APP[0], _APP, os.environ, file_actions=actions)
        ours.close()
        # It leaves its socket file behind, where nobody listens any more.
        return _time_end(path, pid, unlinked=False)


def _time_end(path: Path, pid: int, *, unlinked: bool) -> float:
    try:
        with Client(path) as client:
            client.connection.settimeout(TIMEOUT)
            start = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            while client.connection.recv(4096):
                pass
            while unlinked and path.exists():
                if time.perf_counter() - start > TIMEOUT:
                    raise BenchError(
                        f"{path} is still there {TIMEOUT:.0f} s after its app has ended"
                    )
            return time.perf_counter() - start
    except TimeoutError:
        raise BenchError(f"the connection lives {TIMEOUT:.0f} s after its app has ended") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
