"""The rows about many sandboxes at once: calls of 1, 10 and 100 of them, and signals to as many.

One gate has all of the sandboxes; for xdg-dbus-proxy each is a process. The same client drives either, and the
plain bus: one process with a blocking socket for each sandbox, and an epoll over them.
"""

import contextlib
import functools
import select
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from broker.wire.header import MessageType, parse_header
from integration.bench import parties
from integration.bench.client import BUFFER, SERIAL_AT, TIMEOUT, BenchError, Client
from integration.bench.measure import Column, Effort, Result, interleave, make_result
from integration.bench.parties import Scene
from integration.bench.traffic import MICROSECONDS, ROUNDTRIP
from integration.harness.messages import make_header, make_message
from policy.rules import Access, Rule

SIZES: Final = (1, 10, 100)
NEWS: Final = "org.buswarden.BenchNews"  # who emits the signals; the service's loop only answers
_PACK: Final = struct.Struct("<I").pack_into


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """Whoever is in between, with a client in each of the sandboxes."""

    clients: Sequence[Client]
    pids: Sequence[int] = ()  # one for all of the clients, or one for each

    def take(self, count: int) -> "Party":
        """Return the same with so many clients."""
        return Party(clients=self.clients[:count], pids=self.pids[:count])


def measure_callers(scene: Scene, effort: Effort) -> list[Result]:
    """Measure calls of so many at once, for each size: time on the clock, then processor time."""
    with contextlib.ExitStack() as stack:
        everybody = _open_parties(stack, scene)
        sizes = [
            [_make_calling(party.take(count)) for party in everybody]  # gate, peer, bus
            for count in SIZES
        ]
        interleave([column for columns in sizes for column in columns], effort)
    walls = [make_result("us", MICROSECONDS, [each.wall for each in columns]) for columns in sizes]
    cpus = [make_result("us", MICROSECONDS, [each.cpu for each in row[:2]]) for row in sizes]
    # What a call among those of a hundred costs the gate, against what it costs with one caller.
    growth = make_result("us", MICROSECONDS, [sizes[-1][0].cpu, sizes[0][0].cpu])
    return [*walls, *cpus, growth]


def measure_signals(scene: Scene, effort: Effort) -> list[Result]:
    """Measure a broadcast, from its emission to its arrival at all of the sandboxes, for each size."""
    with contextlib.ExitStack() as stack:
        emitter = stack.enter_context(Client(scene.bus))
        emitter.own(NEWS)
        everybody = _open_parties(stack, scene)
        rows = []
        for count in SIZES:
            # Each column has a signal of its own, or each would be delivered to all of the columns.
            members = [f"{name}{count}" for name in ("Gate", "Proxy", "Bus")]
            rows.append(
                [
                    _make_news(emitter, party.take(count), member)
                    for party, member in zip(everybody, members, strict=True)
                ]
            )
        interleave([column for row in rows for column in row], effort)
    return [make_result("us", MICROSECONDS, [each.wall for each in row]) for row in rows]


def _open_parties(stack: contextlib.ExitStack, scene: Scene) -> tuple[Party, Party, Party]:
    """Open all there is between the clients and the bus: a gate, the proxies, and nothing."""
    numbers = range(SIZES[-1])
    news = Rule(access=frozenset({Access.SEND, Access.RECEIVE}), name=NEWS)
    gate = stack.enter_context(parties.open_gate(scene))
    sandboxes = [gate.add(f"c{number}", (news, parties.TALK)) for number in numbers]
    proxies = [scene.folder / f"crowd-{number}" for number in numbers]
    pids = [stack.enter_context(parties.open_proxy(scene, path, [NEWS])) for path in proxies]
    ends = ((sandboxes, (gate.pid,)), (proxies, pids), ([scene.bus for _ in numbers], ()))
    gate_party, proxy_party, bus_party = (
        Party(clients=[stack.enter_context(Client(path)) for path in paths], pids=own)
        for paths, own in ends
    )
    for client in (*gate_party.clients, *proxy_party.clients, *bus_party.clients):
        client.settle()
    return gate_party, proxy_party, bus_party


def _make_calling(party: Party) -> Column:
    call = ROUNDTRIP.make_call()
    # Unique names may be of two or of three digits: replies are not all of one length.
    sizes = [client.measure_reply(call) for client in party.clients]
    crowd = Crowd(party.clients)
    return Column(
        run=functools.partial(crowd.call, call, sizes),
        check=lambda: [client.measure_reply(call) for client in party.clients],
        pids=party.pids,
        step=len(party.clients),
    )


def _make_news(emitter: Client, party: Party, member: str) -> Column:
    header = make_header(
        MessageType.SIGNAL, 1, path="/org/buswarden/Bench", interface=NEWS, member=member
    )
    signal = make_message(header)
    for client in party.clients:
        client.add_match(f"type='signal',interface='{NEWS}',member='{member}'")
    crowd = Crowd(party.clients)

    def send() -> None:
        emitter.send(signal)

    def check() -> int:
        send()
        arrived = [client.next_message() for client in party.clients]
        if {parse_header(message).member for message in arrived} != {member}:
            raise BenchError(f"something else than {member} arrived")
        return len(arrived[0])

    return Column(run=functools.partial(crowd.hear, send, check()), check=check, pids=party.pids)


class Crowd:
    """Clients that are driven together."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._clients: Final = {client.connection.fileno(): client for client in clients}
        self._poll: Final = select.epoll()
        for fd in self._clients:
            self._poll.register(fd, select.EPOLLIN)

    def call(self, template: bytes, sizes: Sequence[int], count: int) -> float:
        """Have each make one call at a time until so many are answered; return the seconds."""
        call = bytearray(template)
        ends = {
            fd: (each.connection.recv_into, each.connection.send, each.take_serial)
            for fd, each in self._clients.items()
        }
        expected = dict(zip(ends, sizes, strict=True))
        missing = dict(expected)
        unsent, unanswered = count - len(ends), count
        start = time.perf_counter()
        for _, send, serial in ends.values():
            _PACK(call, SERIAL_AT, serial())
            send(call)
        while unanswered:
            for fd in self._wait():
                receive, send, serial = ends[fd]
                missing[fd] -= receive(BUFFER)
                if missing[fd] > 0:
                    continue
                missing[fd] = expected[fd]
                unanswered -= 1
                if unsent > 0:
                    unsent -= 1
                    _PACK(call, SERIAL_AT, serial())
                    send(call)
        return time.perf_counter() - start

    def hear(self, emit: Callable[[], None], size: int, count: int) -> float:
        """Emit so many signals, each when the one before has arrived at all; return the seconds."""
        receivers = {fd: each.connection.recv_into for fd, each in self._clients.items()}
        start = time.perf_counter()
        for _ in range(count):
            emit()
            missing = size * len(receivers)
            while missing > 0:
                for fd in self._wait():
                    missing -= receivers[fd](BUFFER)
        return time.perf_counter() - start

    def _wait(self) -> list[int]:
        ready = self._poll.poll(TIMEOUT)
        if not ready or any(events & select.EPOLLHUP for _, events in ready):
            raise BenchError("a sandbox got no answer, or was cut off")
        return [fd for fd, _ in ready]
