"""The units under a real `systemd --user`: what starts them, what restarts them, and what that costs whom."""

import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integration.harness.buses import DAEMON, KINDS, Bus
from integration.harness.processes import is_running, wait_gone
from integration.harness.rawclient import RawClient
from integration.harness.service import ECHO, PATH, running_service
from integration.harness.supervised import MANAGE, MANAGE_PATH, NAME, Sandbox, Warden, wait_for
from integration.harness.systemd_user import (
    GATE,
    GATE_SOCKET,
    RUNTIME,
    SERVICES,
    SUPERVISOR,
    Manager,
    UnavailableError,
    open_user_manager,
)
from integration.harness.values import Variant

KEEP = Variant("b", True)


@pytest.fixture
def manager(folder: Path, request: pytest.FixtureRequest) -> Iterator[Manager]:
    """A systemd of our own with the units installed; nothing of ours runs yet."""
    try:
        with open_user_manager(folder, getattr(request, "param", DAEMON)) as running:
            running.install()
            yield running
            print(running.said())
    except UnavailableError as exc:
        pytest.skip(str(exc))


@contextmanager
def host_of(manager: Manager) -> Iterator[Warden]:
    """Somebody on the session bus who asks the broker; the first call starts it."""
    with manager.connect() as host:
        bus = Bus(kind=DAEMON, address=manager.bus, pid=0)
        yield Warden(bus=bus, runtime=manager.outside(RUNTIME), process=manager.process, host=host)


def add(manager: Manager, warden: Warden) -> Sandbox:
    """Add a sandbox that may call the service, and say how it is reached from here."""
    made = warden.add_server(rules=[f"send:{ECHO}"], KeepAfterCreator=KEEP)
    path = manager.outside(made.socket)
    return Sandbox(path=made.path, socket=path, address=f"unix:path={path}")


def echo(client: RawClient) -> str | None:
    return client.call(ECHO, PATH, ECHO, "Echo", "s", ("hello",)).error


def connects(sandbox: Sandbox) -> RawClient:
    """Return a new connection, if need be after some tries."""
    found: list[RawClient] = []

    def attempt() -> bool:
        try:
            found.append(sandbox.connect())
        except (OSError, EOFError):
            return False
        return True

    wait_for(attempt, timeout=20.0)
    return found[0]


def test_systemd_takes_the_units(manager: Manager) -> None:
    units = [str(manager.units / name) for name in (*SERVICES, GATE_SOCKET)]
    outcome = manager.run("systemd-analyze", "--user", "verify", *units)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    for unit in SERVICES:
        outcome = manager.run("systemd-analyze", "--user", "security", "--no-pager", unit)
        level = re.search(r"Overall exposure level .*: ([0-9.]+) ", outcome.out)
        assert level is not None
        assert (
            float(level[1]) <= 6.5
        )  # what a user's service can have; docs/lifetime.md has the figures


@pytest.mark.parametrize("manager", KINDS, indirect=True)
def test_the_first_call_to_the_name_starts_both(manager: Manager) -> None:
    assert [manager.pid(unit) for unit in SERVICES] == [0, 0]
    with host_of(manager) as warden:
        (status,) = warden.manage("Status")
    assert [manager.pid(unit) for unit in SERVICES] == [status["pid"], status["gate_pid"]]
    assert manager.get(SUPERVISOR, "ActiveState") == "active"
    assert manager.cli("status").code == 0


def test_a_connection_to_its_socket_starts_the_gate_alone(manager: Manager) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(manager.outside(RUNTIME / "buswarden" / "gate.sock")))
        manager.wait_state(GATE, "active")
        assert manager.get(SUPERVISOR, "ActiveState") == "inactive"


def test_a_sandboxed_program_works_with_all_restrictions(manager: Manager) -> None:
    call = ("busctl", "--user", "call", ECHO, PATH, ECHO)
    with running_service(manager.bus):
        allowed = manager.cli("exec", "--allow", f"send:{ECHO}", "--", *call, "Echo", "s", "hello")
        assert (allowed.code, allowed.out) == (0, 's "hello"\n'), allowed.err + manager.said()
        denied = manager.cli("exec", "--", *call, "Echo", "s", "hello")
        assert denied.code != 0
    assert manager.get(SUPERVISOR, "NoNewPrivileges") == "yes"


def test_a_supervisor_that_dies_is_started_again_and_costs_nothing(manager: Manager) -> None:
    with running_service(manager.bus), host_of(manager) as warden:
        sandbox = add(manager, warden)
        gate = manager.pid(GATE)
        with sandbox.connect() as client:
            for _ in range(3):
                pid = manager.pid(SUPERVISOR)
                manager.kill(pid, signal.SIGKILL)
                assert echo(client) is None
                manager.wait_other(SUPERVISOR, pid)
                assert warden.who(client.unique_name) == sandbox.path
            assert echo(client) is None
        assert manager.pid(GATE) == gate
        assert manager.get(SUPERVISOR, "NRestarts") == "3"


def test_the_watchdog_ends_a_supervisor_that_is_stuck(manager: Manager) -> None:
    manager.drop_in(SUPERVISOR, "[Service]\nWatchdogSec=3\n")
    manager.systemctl("daemon-reload")
    with running_service(manager.bus), host_of(manager) as warden:
        sandbox = add(manager, warden)
        pid = manager.pid(SUPERVISOR)
        with sandbox.connect() as client:
            manager.kill(pid, signal.SIGSTOP)
            assert echo(client) is None
            manager.wait_other(SUPERVISOR, pid)
            assert warden.who(client.unique_name) == sandbox.path
            # One that is well is left alone.
            pid = manager.pid(SUPERVISOR)
            stays = not wait_gone(pid, timeout=5.0)
            assert stays, manager.said()


def test_the_watchdog_ends_a_gate_that_is_stuck(manager: Manager) -> None:
    manager.drop_in(GATE, "[Service]\nWatchdogSec=3\n")
    manager.systemctl("daemon-reload")
    with running_service(manager.bus), host_of(manager) as warden:
        sandbox = add(manager, warden)
        pid = manager.pid(GATE)
        with sandbox.connect() as client:
            manager.kill(pid, signal.SIGSTOP)
            assert client.is_closed(20.0)
        manager.wait_other(GATE, pid)
        with connects(sandbox) as again:
            assert echo(again) is None
            assert warden.who(again.unique_name) == sandbox.path


def test_sockets_outlive_both(manager: Manager) -> None:
    with running_service(manager.bus), host_of(manager) as warden:
        read_end, write_end = os.pipe()
        kept, ended = add(manager, warden), add(manager, warden)
        piped = warden.add_server(fds={"CloseNotify": read_end})
        os.close(read_end)
        wait_for(lambda: manager.get(SUPERVISOR, "NFileDescriptorStore") == "4")
        warden.stop_instance(ended)
        wait_for(lambda: manager.get(SUPERVISOR, "NFileDescriptorStore") == "3")
        pids = [manager.pid(unit) for unit in SERVICES]
        # Neither is to see the other's end.
        manager.kill(pids[0], signal.SIGSTOP)
        for pid in reversed(pids):
            manager.kill(pid, signal.SIGKILL)
        for unit, pid in zip(SERVICES, pids, strict=True):
            manager.wait_other(unit, pid)
        known = {one["path"] for one in warden.list_sandboxes()}
        assert known == {kept.path, piped.path}
        assert len(list(warden.folder.glob("gate-crash-*"))) == 1  # nobody saw it die
        with connects(kept) as client:
            assert echo(client) is None
            assert warden.who(client.unique_name) == kept.path
        # The pipe is watched as before, and what was kept is given up with the sandbox.
        os.close(write_end)
        wait_for(lambda: len(warden.list_sandboxes()) == 1)
        wait_for(lambda: manager.get(SUPERVISOR, "NFileDescriptorStore") == "1")


def test_a_pipe_that_closes_while_nobody_lives_ends_its_sandbox(manager: Manager) -> None:
    with host_of(manager) as warden:
        read_end, write_end = os.pipe()
        piped = warden.add_server(fds={"CloseNotify": read_end})
        os.close(read_end)
        warden.manage("Status")
        wait_for(lambda: manager.get(SUPERVISOR, "NFileDescriptorStore") == "2")
        pids = [manager.pid(unit) for unit in SERVICES]
        for pid in pids:
            manager.kill(pid, signal.SIGSTOP)
        os.close(write_end)
        for pid in pids:
            manager.kill(pid, signal.SIGKILL)
        manager.wait_other(SUPERVISOR, pids[0])
        wait_for(lambda: warden.list_sandboxes() == [])
        assert not manager.outside(piped.socket).exists()


def test_reload_replaces_the_gate_in_its_own_service(manager: Manager) -> None:
    with running_service(manager.bus), host_of(manager) as warden:
        sandbox = add(manager, warden)
        with sandbox.connect() as client:
            for _ in range(2):
                pid = manager.pid(GATE)
                manager.systemctl("reload", SUPERVISOR)
                assert manager.wait_other(GATE, pid)
                assert wait_gone(pid)
                assert echo(client) is None
                assert warden.who(client.unique_name) == sandbox.path
            group = manager.get(GATE, "ControlGroup")
            assert manager.get(GATE, "NRestarts") == "0"
            processes = Path(f"/proc/{manager.pid(GATE)}/cgroup").read_text()
            assert group.rpartition("/")[2] in processes
            # It is no part of the supervisor's service, and does not go with it.
            manager.systemctl("restart", SUPERVISOR)
            assert echo(client) is None
            assert warden.who(client.unique_name) == sandbox.path


def test_stopping_the_supervisor_leaves_the_gate(manager: Manager) -> None:
    with running_service(manager.bus), host_of(manager) as warden:
        sandbox = add(manager, warden)
        gate = manager.pid(GATE)
        with sandbox.connect() as client:
            manager.systemctl("stop", SUPERVISOR)
            assert manager.get(SUPERVISOR, "Result") == "success"
            assert echo(client) is None
            (status,) = warden.manage("Status")  # which starts it again
            assert (status["gate_pid"], status["sandboxes"]) == (gate, 1)
            manager.systemctl("stop", GATE_SOCKET, *SERVICES)
            assert client.is_closed(5.0)
    assert not is_running(gate)
    assert not manager.outside(RUNTIME / "buswarden" / "gate.sock").exists()
    assert "Traceback" not in manager.said()


def test_a_gate_that_systemd_gave_up_is_started_by_the_supervisor(manager: Manager) -> None:
    manager.drop_in(GATE, "[Unit]\nStartLimitBurst=1\n")
    manager.systemctl("daemon-reload")
    with running_service(manager.bus), host_of(manager) as warden:
        sandbox = add(manager, warden)
        manager.kill(manager.pid(GATE))
        manager.wait_state(GATE, "failed")
        with connects(sandbox) as client:
            assert echo(client) is None
            (status,) = warden.manage("Status")
            assert status["sandboxes"] == 1
        assert SUPERVISOR in Path(f"/proc/{status['gate_pid']}/cgroup").read_text()


def test_a_mistake_in_the_settings_is_not_tried_again(manager: Manager) -> None:
    start = manager.get(SUPERVISOR, "ExecStart")
    argv = re.search(r"argv\[\]=(.*?) ;", start)
    assert argv is not None
    manager.drop_in(SUPERVISOR, f"[Service]\nExecStart=\nExecStart={argv[1]} --config /nowhere\n")
    manager.systemctl("daemon-reload")
    outcome = manager.run("systemctl", "--user", "start", SUPERVISOR)
    assert outcome.code != 0
    assert manager.get(SUPERVISOR, "NRestarts") == "0"
    assert "cannot read /nowhere" in manager.said()


def test_units_go_as_they_came(manager: Manager) -> None:
    with manager.connect() as host:
        assert host.call(NAME, MANAGE_PATH, MANAGE, "Status").error is None
    changed = manager.units / GATE
    text = changed.read_text()
    changed.write_text(text + "# mine\n")
    for more in ((), ("--remove",)):
        outcome = manager.cli("install-units", *more)
        assert outcome.code == 1
        assert re.fullmatch(rf"buswarden: {changed} was changed.*--force.*\n", outcome.err)
    changed.write_text(text)
    outcome = manager.cli("install-units", "--remove")
    last = outcome.out.splitlines()[-1]
    assert last.startswith("now run: ")
    assert manager.run("sh", "-c", last.removeprefix("now run: ")).code == 0
    for unit in (*SERVICES, GATE_SOCKET):
        assert manager.get(unit, "ActiveState") == "inactive"
        assert not (manager.units / unit).exists()
    assert not list((manager.home / ".local").rglob("*.service"))
