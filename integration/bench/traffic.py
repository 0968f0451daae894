"""The rows about messages: calls through a gate of their own, xdg-dbus-proxy, and neither.

The gate is driven over its control socket, without a supervisor, which has no part in any message.
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker.wire.marshal import make_call
from integration.bench import parties
from integration.bench.client import Client
from integration.bench.measure import Column, Effort, Result, interleave, make_result
from integration.bench.parties import Scene
from policy.rules import Access, Peer, Rule

MICROSECONDS: Final = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the client sends."""

    payload: int = 0  # bytes of body, there and back
    batch: int = 1  # calls in one write
    is_pipelined: bool = False  # two writes are under way all the time

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
PIPELINED: Final = Load(batch=64, is_pipelined=True)
PIPELINED_1K: Final = Load(batch=64, payload=1024, is_pipelined=True)
PIPELINED_64K: Final = Load(batch=8, payload=65536, is_pipelined=True)
PIPELINED_1M: Final = Load(batch=1, payload=1024 * 1024, is_pipelined=True)
RULES: Final = (10, 1000, 10_000)


def measure_load(load: Load, scene: Scene, effort: Effort) -> list[Result]:
    """Measure a load: the time on the clock, and the processor time of whoever is in between."""
    with contextlib.ExitStack() as stack:
        gate = stack.enter_context(parties.open_gate(scene))
        sandbox = gate.add("c0", (parties.TALK,))
        proxy = scene.folder / "proxy"
        proxy_pid = stack.enter_context(parties.open_proxy(scene, proxy))
        ends = ((sandbox, (gate.pid,)), (proxy, (proxy_pid,)), (scene.bus, ()))
        columns = [make_column(stack, path, load, pids) for path, pids in ends]
        interleave(columns, effort)
        if gate.count_throttled():
            print(
                "the gate's budget of messages was reached: some of it is waiting", file=sys.stderr
            )
    wall = make_result("us", MICROSECONDS, [column.wall for column in columns])
    return [wall, make_result("us", MICROSECONDS, [column.cpu for column in columns[:2]])]


def measure_rules(scene: Scene, effort: Effort) -> list[Result]:
    """Measure round trips under 1000 rules; the peer is the same gate with 10 of them."""
    with contextlib.ExitStack() as stack:
        gate = stack.enter_context(parties.open_gate(scene))
        many = gate.add("c0", (*make_rules(999), parties.TALK))
        few = gate.add("c1", (*make_rules(9), parties.TALK))
        columns = [make_column(stack, path, ROUNDTRIP) for path in (many, few, scene.bus)]
        interleave(columns, effort)
    return [make_result("us", MICROSECONDS, [column.wall for column in columns])]


def measure_counts(scene: Scene, effort: Effort) -> list[Result]:
    """Measure round trips under so many rules that are names, for each count, and the last over the first."""
    with contextlib.ExitStack() as stack:
        gate = stack.enter_context(parties.open_gate(scene))
        pairs = []
        for count in RULES:
            names = [f"org.example.App{number}" for number in range(count - 1)]
            rules = [parties.TALK, *(Rule(access=parties.TALK.access, name=name) for name in names)]
            proxy = scene.folder / f"proxy-{count}"
            stack.enter_context(parties.open_proxy(scene, proxy, names))
            ends = (gate.add(f"c{count}", tuple(rules)), proxy)
            pairs.append([make_column(stack, path, ROUNDTRIP) for path in ends])
        bus = make_column(stack, scene.bus, ROUNDTRIP)
        interleave([*(column for pair in pairs for column in pair), bus], effort)
    rows = [(ours.wall, theirs.wall, bus.wall) for ours, theirs in pairs]
    rows.append((pairs[-1][0].wall, pairs[0][0].wall, bus.wall))
    return [make_result("us", MICROSECONDS, row) for row in rows]


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


def make_column(
    stack: contextlib.ExitStack, path: Path, load: Load, pids: Sequence[int] = ()
) -> Column:
    """Return calls of such a load by a new client of that socket."""
    client = stack.enter_context(Client(path))
    client.settle()
    call = load.make_call()
    size = client.measure_reply(call)

    def run(count: int) -> float:
        if not load.is_pipelined:
            return client.roundtrips(call, size, count)
        return client.pipelined(call, size, count // load.batch, load.batch)

    return Column(run=run, check=lambda: client.measure_reply(call), pids=pids, step=load.batch)
