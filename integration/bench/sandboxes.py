"""The rows about whole sandboxes: through the real supervisor, against an xdg-dbus-proxy for each."""

import contextlib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from broker.wire.header import MessageType, parse_header
from integration.bench import parties
from integration.bench.client import BenchError, Client
from integration.bench.measure import Column, Effort, Result, Series, interleave
from integration.bench.parties import Scene
from integration.harness.messages import make_header, make_message
from integration.harness.values import Variant, decode
from policy.usos.wire_form import Usos

BROKER: Final = "org.buswarden.Broker1"
OBJECT: Final = "/org/freedesktop/DBus"
INTERFACE: Final = "org.freedesktop.DBus.Containers1"
# SEE, SEND, RECEIVE and PATH_SUBTREE of "/", which is any: what --talk lets through.
TALK_FLAGS: Final = 0x27
MILLISECONDS: Final = 1e3
A_BLOCK: Final = 4  # sandboxes
# Processes that have just started still give memory back.
CALM: Final = 1.0  # seconds


def measure_adding(scene: Scene, effort: Effort) -> list[Result]:
    """Measure the time to a first answered Hello: in a new sandbox, by a new proxy, on the bus."""
    numbers = itertools.count()
    with parties.open_supervisor(scene), Client(scene.bus) as creator:

        def add_sandbox(stack: contextlib.ExitStack) -> None:
            stack.enter_context(Client(stack.enter_context(open_sandbox(creator))))

        def add_proxy(stack: contextlib.ExitStack) -> None:
            path = scene.folder / f"new-proxy-{next(numbers)}"
            stack.enter_context(parties.open_proxy(scene, path))
            stack.enter_context(Client(path))

        def connect(stack: contextlib.ExitStack) -> None:
            stack.enter_context(Client(scene.bus))

        columns = [
            Column(run=partial(time_adding, add), count=A_BLOCK)
            for add in (add_sandbox, add_proxy, connect)
        ]
        interleave(columns, effort)
    gate, peer, bus = (
        Series([value * MILLISECONDS for value in column.wall]) for column in columns
    )
    return [Result(unit="ms", gate=gate, peer=peer, bus=bus)]


def measure_memory(count: int, scene: Scene, effort: Effort) -> list[Result]:
    """Measure the memory that so many sandboxes take, each with one idle client."""
    del effort  # it is the same every time
    with contextlib.ExitStack() as stack:
        supervisor = stack.enter_context(parties.open_supervisor(scene))
        creator = stack.enter_context(Client(scene.bus))
        for _ in range(count):
            stack.enter_context(Client(stack.enter_context(open_sandbox(creator)))).settle()
        time.sleep(CALM)
        ours = family_pss(supervisor)
    with contextlib.ExitStack() as stack:
        proxies = []
        for number in range(count):
            path = scene.folder / f"idle-proxy-{number}"
            proxies.append(stack.enter_context(parties.open_proxy(scene, path)))
            stack.enter_context(Client(path)).settle()
        time.sleep(CALM)
        theirs = sum(map(pss, proxies))
    return [Result(unit="KiB", gate=Series([ours]), peer=Series([theirs]))]


@contextlib.contextmanager
def open_sandbox(
    creator: Client, name: str = parties.SERVICE, *, rules: Sequence[Usos] = ()
) -> Iterator[Path]:
    """Open a sandbox for as long as the block lasts; yield its socket.

    The sandbox may talk to that name, or do what the rules allow if there are any.
    """
    allow = {"Allow": Variant("a(usos)", list(rules) or [(TALK_FLAGS, name, "/", "")])}
    call = make_broker_call("AddServer", "ssa{sv}a{sv}", (parties.SERVICE, "bench", {}, allow))
    reply = creator.ask(call)
    instance, path, _ = decode("oays", reply[parse_header(reply).size :])
    try:
        yield Path(os.fsdecode(path.rstrip(b"\0")))
    finally:
        creator.ask(make_broker_call("StopInstance", "o", (instance,)))


def family_pss(pid: int) -> float:
    """Return the KiB of memory of a process and all that descend from it."""
    total = pss(pid)
    for member in parties.family(pid)[1:]:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # ended meanwhile
            total += pss(member)
    return total


def pss(pid: int) -> float:
    """Return the KiB of memory of a process, with its share of what it shares."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    if not (found := re.search(r"^Pss: +(\d+) kB$", text, re.MULTILINE)):
        raise BenchError("/proc/PID/smaps_rollup has no Pss")
    return float(found[1])


def time_adding(add: Callable[[contextlib.ExitStack], None], count: int) -> float:
    """Return the seconds that adding takes that many times, without taking away again."""
    taken = 0.0
    for _ in range(count):
        with contextlib.ExitStack() as stack:
            start = time.perf_counter()
            add(stack)
            taken += time.perf_counter() - start
    return taken


def make_broker_call(member: str, signature: str, values: Sequence[object]) -> bytes:
    header = make_header(
        MessageType.METHOD_CALL,
        1,  # the client sets it
        path=OBJECT,
        interface=INTERFACE,
        member=member,
        destination=BROKER,
        signature=signature,
    )
    return make_message(header, values)
