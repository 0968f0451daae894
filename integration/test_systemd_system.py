"""The system's units under a real systemd that is the first process: one broker for all users, with every restriction."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.harness.buses import DAEMON, Bus
from integration.harness.other_user import NOBODY
from integration.harness.processes import wait_until
from integration.harness.service import ECHO, PATH, running_service
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    NAME,
    Sandbox,
    Warden,
    wait_for,
)
from integration.harness.systemd_user import (
    GATE,
    GATE_SOCKET,
    SERVICES,
    SUPERVISOR,
    Manager,
    UnavailableError,
    open_system_manager,
)
from integration.harness.values import Variant

KEEP = Variant("b", True)
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")


@pytest.fixture
def manager(folder: Path) -> Iterator[Manager]:
    """A systemd of our own with the units installed; nothing of ours runs yet."""
    try:
        with open_system_manager(folder) as running:
            running.install()
            yield running
            print(running.said())
    except UnavailableError as exc:
        pytest.skip(str(exc))


@pytest.fixture
def warden(manager: Manager) -> Iterator[Warden]:
    """Root on the system bus, who asks the broker; the first call starts it."""
    with manager.connect() as host:
        bus = Bus(kind=DAEMON, address=manager.bus, pid=0)
        runtime = manager.outside("/run")
        yield Warden(bus=bus, runtime=runtime, process=manager.process, host=host)


def add(manager: Manager, warden: Warden) -> Sandbox:
    made = warden.add_server(rules=[f"send:{ECHO}"], KeepAfterCreator=KEEP)
    path = manager.outside(made.socket)
    return Sandbox(path=made.path, socket=path, address=f"unix:path={path}")


def echo(sandbox: Sandbox) -> str | None:
    with sandbox.connect() as client:
        return client.call(ECHO, PATH, ECHO, "Echo", "s", ("hello",)).error


def test_systemd_takes_the_units(manager: Manager) -> None:
    units = [f"/etc/systemd/system/{name}" for name in (*SERVICES, GATE_SOCKET)]
    outcome = manager.run("systemd-analyze", "verify", *units)
    # Of others: what stands in for the machine's own units here.
    assert "buswarden" not in outcome.err
    for unit, most in zip(SERVICES, (2.5, 2.5), strict=True):
        outcome = manager.run("systemd-analyze", "security", "--no-pager", unit)
        level = re.search(r"Overall exposure level .*: ([0-9.]+) ", outcome.out)
        assert level is not None
        assert float(level[1]) <= most, outcome.out


def test_every_user_has_sandboxes_with_all_restrictions(manager: Manager, warden: Warden) -> None:
    with running_service(manager.bus):
        assert echo(add(manager, warden)) is None
        assert manager.get(SUPERVISOR, "ActiveState") == "active"
        arguments = ("ssa{sv}a{sv}", "org.example.Type", "app", "0", "1", "KeepAfterCreator", "b")
        call = ("busctl", "--system", "call", NAME, CONTAINERS_PATH, CONTAINERS, "AddServer")
        outcome = manager.run(*AS_NOBODY, *call, *arguments, "true")
        assert outcome.code == 0, outcome.err + manager.said()
        found = re.search(r'"(unix:path=[^"]+)"', outcome.out)
        assert found is not None
        bus = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
        app = ("busctl", f"--address={found[1]}", "call", *bus, "GetConnectionUnixUser", "s")
        outcome = manager.run(*AS_NOBODY, *app, "org.freedesktop.DBus")
        assert outcome.code == 0, outcome.err + manager.said()
        assert manager.run(*app, "org.freedesktop.DBus").code != 0  # not even for root
    assert "Traceback" not in manager.said()


def test_neither_end_costs_more_than_it_has_to(manager: Manager, warden: Warden) -> None:
    with running_service(manager.bus):
        sandbox = add(manager, warden)
        with sandbox.connect() as client:
            pid, gate = manager.pid(SUPERVISOR), manager.pid(GATE)
            manager.kill(pid)
            manager.wait_other(SUPERVISOR, pid)
            assert warden.who(client.unique_name) == sandbox.path
            manager.systemctl("reload", SUPERVISOR)
            manager.wait_other(GATE, gate)
            assert client.call(ECHO, PATH, ECHO, "Echo", "s", ("hello",)).error is None
        pids = [manager.pid(unit) for unit in SERVICES]
        manager.kill(pids[0], signal.SIGSTOP)
        for pid in reversed(pids):
            manager.kill(pid)
        for unit, pid in zip(SERVICES, pids, strict=True):
            manager.wait_other(unit, pid)
        assert [one["path"] for one in warden.list_sandboxes()] == [sandbox.path]

        def works() -> bool:
            try:
                return echo(sandbox) is None
            except (OSError, EOFError):
                return False

        assert wait_until(works)


def test_a_process_is_watched_with_all_restrictions(manager: Manager, warden: Warden) -> None:
    # What has no pid here cannot be asked about: the broker sees its own namespace alone.
    outcome = manager.run("sh", "-c", "sleep 100 >/dev/null 2>&1 & echo $!")
    pid = int(outcome.out)
    sandbox = warden.add_server(Process=Variant("u", pid))
    manager.kill(pid)
    wait_for(lambda: not manager.outside(sandbox.socket).exists())
    assert warden.list_sandboxes() == []
