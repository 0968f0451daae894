"""The rows about messages: calls through a gate of their own, xdg-dbus-proxy, and neither.

The gate is driven over its control socket, without a supervisor, which has no part in any message.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker.wire.marshal import make_call
from integration.bench import parties
from integration.bench.client import Client
from integration.bench.measure import Column, Effort, Result, Series, interleave
from integration.bench.parties import Scene
from policy.rules import Access, Peer, Rule

MICROSECONDS: Final = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the client sends."""

    payload: int = 0  # bytes of body, there and back
    batch: int = 1  # calls in one write, two of which are under way; 1: one call at a time

    def make_call(self) -> bytes:
        """Return the call; its serial is still to be set."""
        body = ("x" * (self.payload - 5),) if self.payload else ()  # 4 of length, 1 of NUL
        return make_call(
            1,
            destination=parties.SERVICE,
            path="/org/buswarden/Bench",
            interface=parties.SERVICE,
            member="Echo",
            signature="s" * len(body),
            values=body,
        )


ROUNDTRIP: Final = Load()
PIPELINED: Final = Load(batch=64)
PIPELINED_1K: Final = Load(batch=64, payload=1024)
PIPELINED_64K: Final = Load(batch=8, payload=65536)


def measure_load(load: Load, scene: Scene, effort: Effort) -> list[Result]:
    """Measure a load: the time on the clock, and the processor time of whoever is in between."""
    with contextlib.ExitStack() as stack:
        gate = stack.enter_context(parties.open_gate(scene))
        sandbox = gate.add("c0", (parties.TALK,))
        proxy = scene.folder / "proxy"
        proxy_pid = stack.enter_context(parties.open_proxy(scene, proxy))
        ends = ((sandbox, gate.pid), (proxy, proxy_pid), (scene.bus, None))
        columns = [_make_column(stack, path, load, pid) for path, pid in ends]
        interleave(columns, effort)
    wall = _make_result([column.wall for column in columns])
    return [wall, _make_result([column.cpu for column in columns[:2]])]


def measure_rules(scene: Scene, effort: Effort) -> list[Result]:
    """Measure round trips under 1000 rules; the peer is the same gate with 10 of them."""
    with contextlib.ExitStack() as stack:
        gate = stack.enter_context(parties.open_gate(scene))
        many = gate.add("c0", (*make_rules(999), parties.TALK))
        few = gate.add("c1", (*make_rules(9), parties.TALK))
        columns = [_make_column(stack, path, ROUNDTRIP) for path in (many, few, scene.bus)]
        interleave(columns, effort)
    return [_make_result([column.wall for column in columns])]


def make_rules(count: int) -> tuple[Rule, ...]:
    """Return rules of all kinds, none of which is about the service."""
    send = frozenset({Access.SEND})
    both = frozenset({Access.SEND, Access.RECEIVE})
    kinds = (
        lambda n: Rule(access=both, name=f"org.example.App{n}"),
        lambda n: Rule(access=both, name=f"org.example.Family{n}.*"),
        lambda n: Rule(access=send, name=f"org.example.Item{n}-*", path=f"/item/{n}/**"),
        lambda n: Rule(access=send, path=f"/thing/{n}/*", interface=f"org.example.T{n}"),
        lambda n: Rule(access=send, deny=True, name=f"org.example.No{n}", member="Erase*"),
        lambda n: Rule(
            access=both,
            interface=f"org.example.P{n}",
            peer=Peer(kind="app", type=parties.SERVICE, app=f"app{n}"),
        ),
    )
    return tuple(kinds[n % len(kinds)](n) for n in range(count))


def _make_column(
    stack: contextlib.ExitStack, path: Path, load: Load, pid: int | None = None
) -> Column:
    client = stack.enter_context(Client(path))
    client.settle()
    call = load.make_call()
    size = client.measure_reply(call)

    def run(count: int) -> float:
        if load.batch == 1:
            return client.roundtrips(call, size, count)
        return client.pipelined(call, size, count // load.batch, load.batch)

    return Column(run=run, check=lambda: client.measure_reply(call), pid=pid, step=load.batch)


def _make_result(columns: Sequence[Sequence[float]]) -> Result:
    scaled = [Series([value * MICROSECONDS for value in column]) for column in columns]
    return Result(unit="us", gate=scaled[0], peer=scaled[1], bus=(*scaled, None)[2])
