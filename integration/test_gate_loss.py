"""A gate that dies takes connections with it, and nothing else: sockets, ids, rules and callers' patience stay."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from broker.control_protocol.messages import Connected
from integration.harness.apps import MARKS, App, Traffic, rules_of
from integration.harness.buses import Bus
from integration.harness.processes import wait_gone
from integration.harness.rawclient import CallError, RawClient
from integration.harness.service import ECHO, running_service
from integration.harness.supervised import CONTAINERS, Warden, open_warden, stop_and_check, wait_for
from integration.harness.values import Variant
from integration.test_upgrade_failures import Told, add_sandbox, engine_with

KEEP = Variant("b", True)
KILLS = 20
SANDBOXES = 8
DOUBLE_DEATHS = 8
LONGEST_REPLACING = 0.4  # seconds


def gate_pid(warden: Warden) -> int:
    (status,) = warden.manage("Status")
    return int(status["gate_pid"])


def crashes(warden: Warden) -> list[Path]:
    return sorted(warden.folder.glob("gate-crash-*"))


def count_fds(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def kill_gate(warden: Warden, number: int = signal.SIGKILL) -> None:
    """Kill the gate and wait for the next one: by asking, since calls wait for it."""
    pid = warden.gate_pid
    os.kill(pid, number)
    assert wait_gone(pid)
    warden.gate_pid = gate_pid(warden)
    assert warden.gate_pid != pid


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process stand still: what happens meanwhile it finds when it goes on."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_twenty_deaths_under_load_cost_connections_only(bus: Bus, folder: Path) -> None:
    with (
        running_service(bus.address),
        RawClient.connect(bus.address) as host,
        open_warden(bus, folder / "run", orderly=False) as warden,
    ):
        host.add_match(f"interface='{CONTAINERS}'")
        apps = [
            App(warden.add_server(f"org.example.A{n}", allow=[rules_of(0)], KeepAfterCreator=KEEP))
            for n in range(SANDBOXES)
        ]
        with Traffic(comes_back=True) as traffic:
            for app in apps:
                traffic.add(app)
            traffic.wait_calls()
            before = count_fds(warden.process.pid)
            for n in range(KILLS):
                kill_gate(warden, signal.SIGSEGV if n % 2 else signal.SIGKILL)
                app = apps[n % SANDBOXES]
                warden.set_access(app.sandbox, rules_of(app.begin()))
                app.done()
                traffic.wait_calls()
                assert count_fds(warden.process.pid) == before
        assert not traffic.failures
        assert all(app.connections > KILLS for app in apps)
        assert [one["id"] for one in warden.list_sandboxes()] == [app.sandbox.id for app in apps]
        assert not [m for m in host.drain() if m.header.member == "InstanceRemoved"]
        assert len(crashes(warden)) == 5
        assert "served again" in warden.log
        assert warden.process.stop() == 0
        assert not [path for path in warden.runtime.rglob("*") if path.is_socket()]


def test_clients_and_pipes_of_the_gap_are_seen_to_afterwards(bus: Bus, folder: Path) -> None:
    with running_service(bus.address), open_warden(bus, folder / "run") as warden:
        read_end, write_end = os.pipe()
        kept = warden.add_server("kept", allow=[rules_of(0)], KeepAfterCreator=KEEP)
        piped = warden.add_server("piped", fds={"CloseNotify": read_end})
        os.close(read_end)
        # Neither of these listens any more, and only one has a connection.
        closing = warden.add_server("closing", KeepAfterCreator=KEEP)
        last = warden.connect(closing)
        warden.stop_listening(closing)
        app = App(kept)
        with stopped(warden.process.pid):
            os.kill(warden.gate_pid, signal.SIGKILL)
            assert wait_gone(warden.gate_pid)
            assert last.is_closed()
            os.close(write_end)
            connecting = threading.Thread(target=app.connect)
            connecting.start()  # the socket takes it, and nobody answers yet
            connecting.join(0.2)
            assert connecting.is_alive()
        connecting.join(20)
        app.ask(0)
        app.ask(1)
        wait_for(lambda: [one["id"] for one in warden.list_sandboxes()] == [kept.id])
        assert f"{piped.id}: ended (close-notify)" in warden.log
        assert f"{closing.id}: ended (last-connection)" in warden.log
        app.close()
        warden.gate_pid = gate_pid(warden)


def test_calls_wait_for_the_next_gate(warden: Warden) -> None:
    sandbox = warden.add_server(KeepAfterCreator=KEEP)
    for _ in range(3):
        os.kill(warden.gate_pid, signal.SIGKILL)
        added = warden.add_server(KeepAfterCreator=KEEP)  # at once
        warden.set_access(sandbox, rules_of(0))
        assert warden.who(warden.connect(added).unique_name) == added.path
        with pytest.raises(CallError):
            warden.who(warden.host.unique_name)
        warden.gate_pid = gate_pid(warden)
        warden.stop_instance(added)


def test_nobody_who_adds_changes_and_stops_meanwhile_gets_an_error(bus: Bus, folder: Path) -> None:
    with (
        open_warden(bus, folder / "run") as warden,
        RawClient.connect(bus.address) as host,
        ThreadPoolExecutor(1) as pool,
    ):
        done = threading.Event()
        counting = pool.submit(come_and_go, Warden(**(fields_of(warden) | {"host": host})), done)
        try:
            for _ in range(8):
                kill_gate(warden)
        finally:
            done.set()
        assert counting.result() > 0
        assert warden.list_sandboxes() == []


def fields_of(warden: Warden) -> dict[str, Any]:
    return {name: getattr(warden, name) for name in ("bus", "runtime", "process")}


def come_and_go(warden: Warden, done: threading.Event) -> int:
    """Add, change and stop sandboxes, and return how many."""
    count = 0
    while not done.is_set():
        sandbox = warden.add_server(KeepAfterCreator=KEEP)
        warden.set_access(sandbox, rules_of(count))
        warden.stop_instance(sandbox)
        count += 1
    return count


def test_crash_is_on_record_without_bodies(bus: Bus, folder: Path) -> None:
    with running_service(bus.address), open_warden(bus, folder / "run") as warden:
        sandbox = warden.add_server(allow=[rules_of(0)])
        client = warden.connect(sandbox)
        secret = "do not write this down"
        for _ in range(3):  # the first one is judged, the last one known
            client.call(ECHO, "/org/example/Secret", MARKS[0], "Echo", "s", (secret,))
        assert last_crash(warden) == "none"
        first = warden.gate_pid
        kill_gate(warden, signal.SIGSEGV)
        (record,) = crashes(warden)
        assert record.stat().st_mode & 0o777 == 0o600
        text = record.read_text()
        assert text.startswith(f"the gate (process {first}) was killed by SIGSEGV at 20")
        assert f"'{sandbox.id}' app to bus method_call" in text
        assert "member='Echo'" in text
        assert "path='/org/example/Secret'" in text
        assert "bus to app" in text
        call, answer = text.splitlines()[-2:]
        assert f"'{sandbox.id}' app to bus known method_call" in call
        assert f"'{sandbox.id}' bus to app known method_return" in answer
        assert secret not in text
        assert "SIGSEGV" in last_crash(warden)
        assert str(record) in last_crash(warden)
        assert f"process {first}) was killed by SIGSEGV" in warden.log


def last_crash(warden: Warden) -> str:
    return warden.cli("status").out.split("last crash:")[1].splitlines()[0].strip()


def test_gate_and_supervisor_together_end_the_sandboxes(bus: Bus, folder: Path) -> None:
    runtime = folder / "run"
    with RawClient.connect(bus.address) as host, open_warden(bus, runtime, orderly=False) as first:
        host.add_match(f"interface='{CONTAINERS}'")
        sandboxes = [first.add_server(KeepAfterCreator=KEEP) for _ in range(3)]
        first.process.send_signal(signal.SIGSTOP)
        os.kill(first.gate_pid, signal.SIGKILL)
        first.kill()
        with open_warden(bus, runtime) as second:
            assert second.list_sandboxes() == []
            removed = [m for m in host.drain() if m.header.member == "InstanceRemoved"]
            assert [m.values[0] for m in removed] == [one.path for one in sandboxes]
            assert second.log.count("ended (gate-lost)") == 3
            assert not any(one.socket.exists() for one in sandboxes)
            new = second.add_server()
            assert int(new.id[1:]) > int(sandboxes[-1].id[1:])


def test_supervisor_dies_while_it_replaces_the_gate(bus: Bus, folder: Path) -> None:
    chance = random.Random(bus.pid)
    print(f"seed {bus.pid}")
    with ExitStack() as stack:
        warden = stack.enter_context(open_warden(bus, folder / "run", orderly=False))
        for _ in range(DOUBLE_DEATHS):
            for _ in range(5):
                warden.add_server(KeepAfterCreator=KEEP)
            os.kill(gate_pid(warden), signal.SIGKILL)
            time.sleep(chance.random() * LONGEST_REPLACING)
            warden.kill()
            warden.host.close()
            warden = stack.enter_context(open_warden(bus, folder / "run", orderly=False))
            # Of those that there were some were served again. Which ones, all agree on.
            left = warden.list_sandboxes()
            assert len(list((warden.folder / "containers").iterdir())) == len(left)
            for one in left:
                with RawClient.connect(one["addresses"]["session"]) as client:
                    assert warden.who(client.unique_name) == one["path"]
        assert "Traceback" not in warden.log
        stop_and_check(warden)


def test_gate_dies_after_the_supervisor_was_replaced(bus: Bus, folder: Path) -> None:
    runtime = folder / "run"
    with (
        running_service(bus.address),
        open_warden(bus, runtime, orderly=False) as first,
    ):
        sandbox = first.add_server(allow=[rules_of(0)], KeepAfterCreator=KEEP)
        read_end, write_end = os.pipe()
        piped = first.add_server(fds={"CloseNotify": read_end})
        os.close(read_end)
        first.kill()
        with open_warden(bus, runtime) as second:
            kill_gate(second)  # whose sockets the second one has from the gate
            assert [one["id"] for one in second.list_sandboxes()] == [sandbox.id, piped.id]
            app = App(sandbox)
            app.connect()
            app.ask(0)
            app.ask(1)
            os.close(write_end)
            wait_for(lambda: not piped.socket.exists())
            app.close()


def test_gate_dies_after_an_upgrade(bus: Bus, folder: Path) -> None:
    with running_service(bus.address), open_warden(bus, folder / "run") as warden:
        app = App(warden.add_server(allow=[rules_of(0)], KeepAfterCreator=KEEP))
        app.connect()
        assert warden.cli("upgrade").ok
        assert not crashes(warden)
        warden.gate_pid = gate_pid(warden)
        app.ask(0)
        app.close()
        pid = warden.gate_pid
        kill_gate(warden)
        assert f"(process {pid}) was killed by SIGKILL" in last_crash(warden)
        (record,) = crashes(warden)
        assert f"'{app.sandbox.id}' app to bus method_call" in record.read_text()
        app.connect()
        app.ask(0)
        app.ask(1)
        app.close()


async def test_a_defect_is_a_crash_and_no_end_of_sandboxes(
    bus: Bus, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    told = Told()
    async with engine_with(bus, folder, "defect", told) as engine:
        with RawClient.connect(await add_sandbox(engine, folder)) as app:
            first = engine.pid
            with trio.fail_after(20):
                assert not (await engine.use()).connections  # says the next one
            assert app.is_closed()
        assert [type(event) for event in told.events] == [Connected]
        assert (folder / "app").exists()
        assert f"the gate (process {first}) exited with 1" in engine.last_crash
