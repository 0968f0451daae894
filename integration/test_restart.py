"""What outlives what: the gate its supervisor, the supervisor its gate; and that neither forgets nor tells twice."""

import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from integration.buses import Bus, open_dbus_daemon
from integration.clients import run
from integration.processes import PYTHON, is_running, wait_gone
from integration.rawclient import CallError, RawClient
from integration.service import ECHO, PATH, running_service
from integration.supervised import (
    CONTAINERS,
    SEND,
    Warden,
    open_warden,
    wait_for,
)
from integration.values import Variant

KEEP = Variant("b", True)


def echo(client: RawClient) -> str | None:
    return client.call(ECHO, PATH, ECHO, "Echo", "s", ("hello",)).error


def removals(host: RawClient) -> list[str]:
    """Return what was told to have ended since the last time."""
    return [m.values[0] for m in host.drain() if m.header.member == "InstanceRemoved"]


def listen(bus: Bus) -> RawClient:
    host = RawClient.connect(bus.address)
    host.add_match(f"interface='{CONTAINERS}'")
    return host


def test_killed_supervisor_costs_no_app_its_connection(bus: Bus, folder: Path) -> None:
    runtime = folder / "run"
    with (
        running_service(bus.address),
        listen(bus) as host,
        open_warden(bus, runtime, orderly=False) as first,
    ):
        kept = first.add_server("kept", rules=[f"send:{ECHO}"], KeepAfterCreator=KEEP)
        followers = first.add_server("follower", rules=[f"send:{ECHO}"])
        read_end, write_end = os.pipe()
        piped = first.add_server("piped", fds={"CloseNotify": read_end})
        os.close(read_end)
        client, follower = first.connect(kept), first.connect(followers)
        stopped = first.add_server("stopped")
        first.stop_instance(stopped)
        assert removals(host) == [stopped.path]
        first.kill()
        assert is_running(first.gate_pid)
        assert echo(client) is None
        late = first.connect(kept)  # the gate goes on taking connections
        assert echo(late) is None
        os.close(write_end)  # the gate ends it without any supervisor
        wait_for(lambda: not piped.socket.exists())
        first.host.close()  # the creator of all leaves meanwhile
        with open_warden(bus, runtime) as second:
            assert second.gate_pid == first.gate_pid
            assert removals(host) == [piped.path]
            for one in (client, late):
                assert second.who(one.unique_name) == kept.path
                assert echo(one) is None
            assert second.show(kept)["metadata"] == {}
            wait_for(lambda: not second.show(followers)["listening"])
            assert second.who(follower.unique_name) == followers.path
            second.set_access(kept)
            assert echo(client) is not None
            new = second.add_server("new", KeepAfterCreator=KEEP)
            assert int(new.id[1:]) > int(stopped.id[1:])
            for sandbox in (kept, followers, new):
                second.stop_instance(sandbox)
            assert client.is_closed(2)
            told = removals(host)
            assert sorted(told) == sorted([kept.path, followers.path, new.path])


def test_killed_gate_is_told_and_replaced(bus: Bus, folder: Path) -> None:
    with listen(bus) as host, open_warden(bus, folder / "run", orderly=False) as warden:
        sandboxes = [warden.add_server() for _ in range(3)]
        clients = [warden.connect(sandbox) for sandbox in sandboxes]
        os.kill(warden.gate_pid, signal.SIGKILL)
        assert all(client.is_closed(5) for client in clients)
        wait_for(lambda: _gate_pid(warden) not in (0, warden.gate_pid))
        assert warden.list_sandboxes() == []
        assert sorted(removals(host)) == sorted(sandbox.path for sandbox in sandboxes)
        assert not any(sandbox.socket.exists() for sandbox in sandboxes)
        new = warden.add_server()
        assert warden.who(warden.connect(new).unique_name) == new.path
        assert new.id not in {sandbox.id for sandbox in sandboxes}
        gate = _gate_pid(warden)
        assert warden.process.stop() == 0
        assert wait_gone(gate)
        assert removals(host) == [new.path]


def _gate_pid(warden: Warden) -> int:
    try:
        (status,) = warden.manage("Status")
    except CallError:  # there is none at the moment
        return 0
    return int(status["gate_pid"])


def test_orderly_end_tells_and_leaves_nothing(bus: Bus, folder: Path) -> None:
    with listen(bus) as host:
        with open_warden(bus, folder / "run") as warden:
            sandboxes = [warden.add_server(KeepAfterCreator=KEEP) for _ in range(3)]
            client = sandboxes[0].connect()  # not closed at the end of the block
        with client:
            assert client.is_closed(1)
        assert sorted(removals(host)) == sorted(sandbox.path for sandbox in sandboxes)
        with open_warden(bus, folder / "run") as again:
            assert again.list_sandboxes() == []
            new = again.add_server()
            assert int(new.id[1:]) == int(sandboxes[-1].id[1:]) + 1  # ids are not given again


def test_rules_are_stored_before_the_answer(bus: Bus, folder: Path) -> None:
    runtime = folder / "run"
    with open_warden(bus, runtime, orderly=False) as first:
        sandbox = first.add_server(KeepAfterCreator=KEEP)
        for n in range(20):
            first.set_access(sandbox, (SEND, f"org.example.N{n}", "/", ""))
        first.kill()
        with open_warden(bus, runtime) as second:
            assert second.show(sandbox)["access"] == [(False, "send:org.example.N19@/")]


def test_descriptors_of_the_supervisor_come_back(shared: Warden) -> None:
    def count() -> int:
        return len(list(Path(f"/proc/{shared.process.pid}/fd").iterdir()))

    shared.stop_instance(shared.add_server())
    before = count()
    read_end, write_end = os.pipe()
    for _ in range(20):
        fds = {"CloseNotify": read_end, "ReadyNotify": write_end}
        shared.stop_instance(shared.add_server(fds=fds))
        # Refused, with descriptors: and ones that no argument names.
        values: tuple[Any, ...] = ("nodots", "x", {}, {"CloseNotify": Variant("h", 0)})
        call = ("org.buswarden.Broker1", "/org/freedesktop/DBus", CONTAINERS)
        more = [read_end, write_end, read_end]
        reply = shared.host.call(*call, "AddServer", "ssa{sv}a{sv}", values, fds=more)
        assert reply.error is not None
        shared.host.call(*call, "Nonsense", "h", (0,), fds=more)
    wait_for(lambda: count() == before)
    for fd in (read_end, write_end):
        os.close(fd)


@pytest.mark.parametrize("damage", ["version", "tables", "record", "noise"])
def test_damaged_state_is_one_line(folder: Path, damage: str) -> None:
    runtime = folder / "run"
    with open_dbus_daemon(folder) as bus:
        with open_warden(bus, runtime):
            pass
        _damage(runtime / "buswarden" / "state.db", damage)
        argv = (PYTHON, "-m", "broker.cli", "run", "--bus", f"session={bus.address}")
        outcome = run(*argv, env={"XDG_RUNTIME_DIR": str(runtime)})
    assert outcome.code in (1, 2)
    assert outcome.err.startswith("buswarden: ")
    assert outcome.err.count("\n") == 1


def _damage(path: Path, how: str) -> None:
    if how == "noise":
        path.write_bytes(b"no database" * 1000)
        return
    with closing(sqlite3.connect(path)) as db, db:
        match how:
            case "version":
                db.execute("PRAGMA user_version = 99")
            case "tables":
                db.execute("DROP TABLE counter")
            case _:
                db.execute("INSERT INTO sandbox VALUES (7, x'00')")
