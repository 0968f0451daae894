"""Processes of many sandboxes: the kernel's process connector where it works, pidfds where not; and whose they may be."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.supervisor.watches.process_connector import open_connector
from integration.harness.buses import open_bus
from integration.harness.clients import run
from integration.harness.endings import Ends, app
from integration.harness.other_user import NOBODY, as_user
from integration.harness.processes import PYTHON, is_running, running
from integration.harness.rawclient import CallError, RawClient
from integration.harness.supervised import Warden, open_warden, wait_for
from integration.harness.values import Variant

MANY = 90  # more than are watched by pidfds, where there is the connector


def has_connector() -> bool:
    """Say whether the connector works for us, and so for a broker that we start."""
    connector = open_connector()
    if connector is None:
        return False
    connector.close()
    return True


@contextmanager
def sleepers(count: int) -> Iterator[list[int]]:
    """Run processes that do nothing."""
    script = f'for i in $(seq {count}); do sleep 1000 & echo "pid $!"; done; wait'
    with running(["sh", "-c", script]) as process:
        pids = [int(process.wait_line("pid").split()[1]) for _ in range(count)]
        try:
            yield pids
        finally:
            for pid in pids:
                if is_running(pid):
                    os.kill(pid, signal.SIGKILL)


def add(warden: Warden, pid: int) -> str:
    """Add a sandbox that ends with a process; return its path."""
    return warden.add_server(Process=Variant("u", pid)).path


def way(warden: Warden) -> str:
    """Return how processes are watched."""
    (status,) = warden.manage("Status")
    return str(status["watched"]["processes"])


def kill(ends: Ends, sandboxes: dict[str, int], count: int) -> None:
    """Kill the processes of so many, and wait for the ends of their sandboxes and no others."""
    chosen = dict(list(sandboxes.items())[:count])
    for path, pid in chosen.items():
        os.kill(pid, signal.SIGKILL)
        del sandboxes[path]
    told = {ends.wait() for _ in chosen}
    assert told == {(path, "process-ended") for path in chosen}


def test_many_are_watched_by_one_socket_and_few_by_pidfds(warden: Warden) -> None:
    ends = Ends(warden)
    with sleepers(MANY) as pids:
        sandboxes = {add(warden, pid): pid for pid in pids}
        if has_connector():
            wait_for(lambda: way(warden) == f"{MANY} by process connector")
        else:
            assert way(warden) == f"{MANY} by pidfds"
        kill(ends, sandboxes, MANY - 10)
        wait_for(lambda: way(warden) == "10 by pidfds")
        kill(ends, sandboxes, 10)
    assert ends.told() == []


@pytest.mark.parametrize("kind", ["execs", "threads", "forks"])
def test_the_connector_knows_an_end_from_a_thread_that_ends(shared: Warden, kind: str) -> None:
    if not has_connector():
        pytest.skip("this machine lets us have no process connector")
    ends = Ends(shared)
    argv = ["sh", "-c", 'read line; exec "$@"', "sh", *app(kind)]
    with sleepers(MANY) as pids, running(argv) as process:
        sandboxes = {add(shared, pid): pid for pid in pids}
        path = add(shared, process.pid)
        wait_for(lambda: way(shared) == f"{MANY + 1} by process connector")
        process.send_line("")
        process.wait_line("ready")
        if kind != "forks":  # whose first process has ended
            assert ends.told() == []
            process.send_line("")
        assert ends.wait() == (path, "process-ended")
        kill(ends, sandboxes, MANY)


# Python can crash if it tidies up while threads still end: so all have ended, and it does not.
_MANY_THREADS = """
import os, time, _thread
for _ in range(30000):
    _thread.start_new_thread(int, ())
    while _thread._count() > 100:
        time.sleep(0.001)
while _thread._count():
    time.sleep(0.001)
os._exit(0)
"""


def test_ends_that_the_kernel_dropped_are_found(warden: Warden) -> None:
    if not has_connector():
        pytest.skip("this machine lets us have no process connector")
    ends = Ends(warden)
    with sleepers(MANY) as pids:
        sandboxes = {add(warden, pid): pid for pid in pids}
        wait_for(lambda: "process connector" in way(warden))
        warden.process.send_signal(signal.SIGSTOP)
        try:
            # More ends than its socket has room for; threads do, and take less time than processes.
            done = run(PYTHON, "-c", _MANY_THREADS, timeout=60)
            assert done.code == 0, done.err
            gone = dict(list(sandboxes.items())[:5])
            for pid in gone.values():
                os.kill(pid, signal.SIGKILL)
        finally:
            warden.process.send_signal(signal.SIGCONT)
        assert {ends.wait()[0] for _ in gone} == set(gone)
        assert "the kernel dropped events" in warden.log
        for path in gone:
            del sandboxes[path]
        kill(ends, sandboxes, 5)
    assert {ends.wait()[1] for _ in sandboxes} == {"process-ended"}


_IN_A_NAMESPACE = """
import os, subprocess, sys, trio
from broker.supervisor.watches.process_connector import open_connector
from broker.supervisor.watches.processes import Processes, identify

async def main():
    watched, ended = Processes(open_connector, many=1), []
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watched.run)
            children = [subprocess.Popen(["sleep", "1000"]) for _ in range(3)]
            for child in children:
                process = identify(child.pid, os.getuid())
                watched.watch(str(child.pid), process, lambda pid=child.pid: ended.append(pid))
            await trio.sleep(2)
            print(watched.method)
            for child in children:
                child.kill()
            while len(ended) < 3:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    for child in children:
        child.wait()
    print(sorted(ended) == sorted(child.pid for child in children))

trio.run(main)
"""


def test_in_another_pid_namespace_pidfds_do() -> None:
    here = ("unshare", "--pid", "--fork", "--mount-proc")
    if not run(*here, "true").ok:
        pytest.skip("this machine lets us make no pid namespace")
    outcome = run(*here, PYTHON, "-c", _IN_A_NAMESPACE, timeout=60)
    assert outcome.out == "pidfds\nTrue\n", outcome


@pytest.fixture
def system(folder: Path) -> Iterator[Warden]:
    """A supervisor for everybody."""
    if os.geteuid() != 0:
        pytest.skip("the machine cannot: becoming another user takes root")
    folder.chmod(0o711)
    with open_bus("dbus-daemon", folder, everybody=True) as bus:
        config = folder / "buswarden.toml"
        config.write_text(f'runtime_dir = "{folder}/run/buswarden"\n')
        args = ("--scope", "system", "--config", str(config), "--bus", f"system={bus.address}")
        (folder / "run").mkdir()
        with open_warden(bus, folder / "run", *args, add_bus=False) as warden:
            (folder / "run").chmod(0o711)
            yield warden


def test_a_process_is_of_the_callers_user(system: Warden) -> None:
    ends = Ends(system)
    with running(app("plain")) as process:  # root's
        process.wait_line("ready")
        fd = os.pidfd_open(process.pid)

        def nobodys() -> list[Any]:
            with RawClient.connect(system.bus.address) as creator:
                refused = []
                for how in ({"fds": {"ProcessFd": fd}}, {"Process": Variant("u", process.pid)}):
                    try:
                        system.add_server(creator=creator, **how)
                    except CallError as exc:
                        refused.append(f"{exc.name} {exc.text}")
                mine = Variant("u", os.getpid())
                return [system.add_server(creator=creator, Process=mine).path, refused]

        path, refused = as_user(NOBODY, nobodys)
        os.close(fd)
        assert len(refused) == 2
        for text in refused:
            assert text.startswith("org.freedesktop.DBus.Error.AccessDenied")
            assert text.endswith(f"process {process.pid} belongs to another user")
        assert ends.wait() == (path, "process-ended")
        # Root may name anybody's.
        ours = system.add_server(Process=Variant("u", process.pid))
        process.send_line("")
        ends.wait_for(ours, "process-ended")
