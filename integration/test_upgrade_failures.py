"""An upgrade of the gate that fails, in whatever way: the old gate goes on as if nothing had been, and says why."""

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from broker.control_protocol.messages import (
    PROTOCOL,
    BusSpec,
    Event,
    Listener,
    SandboxSpec,
    Snapshot,
)
from broker.engines import gate_engine as gate_module, gate_upgrade as upgrade_module
from broker.engines.gate_engine import GateEngine
from broker.gate.dumps import VERSION
from broker.wire.errors import CallRefusedError
from integration.harness.bad_gate import OTHER_VERSION
from integration.harness.buses import Bus
from integration.harness.load import Talker, under_load
from integration.harness.processes import is_running
from integration.harness.rawclient import RawClient
from integration.harness.service import ECHO, running_service
from policy.rules import Access, AccessList, Identity, Rule

# How the new gate fails, and what the one line says then.
FAILURES = {
    "exit": "did not start",
    "test": "the self check failed: wrong verdicts",
    "corrupt": "the loaded state differs from the old gate",
    "version": f"the new gate reads hand-over version {OTHER_VERSION}, not {VERSION}",
    "mute": "nothing from the other gate for 1 s",
    "killed": "the other gate ended",
    "hang": "nothing from the other gate for 1 s",
    "refuse": "on second thoughts, no",
    "babble": "unexpected answer of the other gate",
}


class Told:
    """What the engine tells."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def take_event(self, event: Event) -> None:
        self.events.append(event)

    def take_snapshot(self, snapshot: Snapshot) -> None:
        """There is one gate all the time."""

    def missing(self) -> Sequence[tuple[SandboxSpec, Sequence[int]]]:
        return ()

    def instance_field_wishes(self) -> list[tuple[str, str]]:
        return []

    def lost(self, sandbox: str) -> None:
        raise AssertionError(sandbox)


@asynccontextmanager
async def engine_with(bus: Bus, folder: Path, how: str, told: Told) -> AsyncIterator[GateEngine]:
    """Run an engine whose gate serves, and whose next gates fail."""
    engine = GateEngine(
        control=folder / "gate.sock",
        buses=(BusSpec(name="session", address=bus.address),),
        command=(sys.executable, "-P", "-m", "integration.harness.bad_gate", how),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.keep_connected, told)
        try:
            yield engine
        finally:
            with trio.CancelScope(shield=True):
                await engine.shutdown()
            nursery.cancel_scope.cancel()


async def add_sandbox(engine: GateEngine, folder: Path) -> str:
    """Have a sandbox that may call the service; return its address."""
    path = folder / "app"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        status = path.stat()
        listener = Listener(
            bus="session", fd=0, path=str(path), device=status.st_dev, inode=status.st_ino
        )
        spec = SandboxSpec(
            id="c0",
            identity=Identity(type="org.example.Test", app="app"),
            uid=os.getuid(),
            listeners=(listener,),
            access=AccessList(rules=(Rule(access=frozenset({Access.SEND}), name=ECHO),)),
        )
        await engine.add(spec, [sock.fileno()])
    return f"unix:path={path}"


@pytest.mark.parametrize("how", FAILURES)
async def test_the_old_gate_goes_on(
    bus: Bus, folder: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrade_module, "HAND_OVER_TIMEOUT", 1.0)
    # So that the gate finds what it is made of.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    told = Told()
    with running_service(bus.address):
        async with engine_with(bus, folder, how, told) as engine:
            address = await add_sandbox(engine, folder)
            with (
                RawClient.connect(address) as one,
                RawClient.connect(address) as other,
                under_load([Talker(one, 1), Talker(other, 2)]),
            ):
                names = {one.unique_name, other.unique_name}
                pid = engine.pid
                for _ in range(3):
                    with pytest.raises(CallRefusedError, match=FAILURES[how]) as refused:
                        await engine.upgrade()
                    assert "\n" not in str(refused.value)
                    assert str(refused.value).startswith("the new gate cannot take over: ")
                    await trio.sleep(0.1)
                assert engine.pid == pid
                for name in names:
                    assert await engine.who("session", name) == "c0"
                assert (folder / "app").exists()
            assert [type(event).__name__ for event in told.events] == ["Connected"] * 2
            assert children_of(os.getpid(), "integration.harness.bad_gate") == [pid]


def children_of(parent: int, words: str) -> list[int]:
    """Return the processes below a process that have these words in their command line, and run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text().rpartition(") ")[2].split()
            command = (path / "cmdline").read_text()
        except OSError:
            continue  # it ended
        if int(stat[1]) == parent and words in command and is_running(int(path.name)):
            found.append(int(path.name))
    return found


async def test_a_gate_that_works_then_takes_over(bus: Bus, folder: Path) -> None:
    told = Told()
    with running_service(bus.address):
        async with engine_with(bus, folder, "none", told) as engine:
            address = await add_sandbox(engine, folder)
            old = engine.pid
            with RawClient.connect(address) as app, under_load([Talker(app, 1)]):
                assert await engine.upgrade() == (old, engine.pid)
                assert engine.pid != old


async def test_a_gate_newer_than_the_supervisor_is_refused_in_words(
    bus: Bus, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrade_module, "PROTOCOL", PROTOCOL - 1)  # of the supervisor
    async with engine_with(bus, folder, "none", Told()) as engine:
        with pytest.raises(CallRefusedError, match=f"the supervisor {PROTOCOL - 1}: restart"):
            await engine.upgrade()


async def test_a_gate_older_than_the_supervisor_hands_over(bus: Bus, folder: Path) -> None:
    command = (sys.executable, "-P", "-m", "integration.harness.bad_gate")
    buses = (BusSpec(name="session", address=bus.address),)
    control = folder / "gate.sock"
    older = GateEngine(control=control, buses=buses, command=(*command, "newer"))
    with running_service(bus.address):
        async with trio.open_nursery() as nursery:
            await nursery.start(older.keep_connected, Told())
            address = await add_sandbox(older, folder)
            app = RawClient.connect(address)
            nursery.cancel_scope.cancel()  # as by kill -9: the gate lives on
        first = older.pid
        with app, pytest.MonkeyPatch.context() as patch:
            for module in (gate_module, upgrade_module):
                patch.setattr(module, "PROTOCOL", PROTOCOL + 1)
            newer = GateEngine(control=control, buses=buses, command=(*command, "newer"))
            with under_load([Talker(app, 1)]):
                async with trio.open_nursery() as nursery:
                    await nursery.start(newer.keep_connected, Told())
                    assert newer.pid != first
                    assert await newer.who("session", app.unique_name) == "c0"
                    await newer.use()
                    await trio.sleep(0.1)
                    nursery.cancel_scope.cancel()
            os.kill(newer.pid, signal.SIGTERM)
            bury(first, newer.pid)


def bury(*pids: int) -> None:
    """Wait for the end of gates: they are our children, whichever supervisor started them."""
    for pid in pids:
        os.waitpid(pid, 0)
