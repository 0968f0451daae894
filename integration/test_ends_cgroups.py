"""Sandboxes that end with the last process of a cgroup: the kernel's own, v2 and v1, with apps that fork away."""

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.supervisor.watches.cgroups import find_mounts
from integration.harness.buses import Bus
from integration.harness.endings import Ends, app
from integration.harness.processes import Process, running, wait_until
from integration.harness.rawclient import CallError
from integration.harness.supervised import Sandbox, Warden, open_warden, wait_for
from integration.harness.values import Variant


class Cgroup:
    """A cgroup of the test's own, with others in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self, name: str) -> Path:
        path = self.path / name
        path.mkdir(parents=True)
        return path

    def add(self, sandboxed: Path, warden: Warden) -> Sandbox:
        return warden.add_server(Cgroup=Variant("s", str(sandboxed)))


@pytest.fixture(params=["v2", "v1"])
def cgroup(request: pytest.FixtureRequest) -> Iterator[Cgroup]:
    """A cgroup in a hierarchy of that version, emptied and removed afterwards."""
    unified = request.param == "v2"
    points = [Path(mount.point) for mount in find_mounts() if mount.unified is unified]
    # Of v1 a named hierarchy first: it has no controller that might mind.
    for point in sorted(points, key=lambda path: path.name != "systemd"):
        path = point / f"buswarden-test-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            yield Cgroup(path)
        finally:
            remove(path)
        return
    pytest.skip(f"this machine has no cgroup hierarchy of {request.param} that we may write to")


def remove(path: Path) -> None:
    """Kill what is left in there, and remove it all."""
    for folder, _, _ in os.walk(path, topdown=False):
        here = Path(folder)
        for pid in (here / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        assert wait_until(lambda: not (here / "cgroup.procs").read_text()), here  # noqa: B023
        here.rmdir()


@contextmanager
def running_in(path: Path, kind: str) -> Iterator[Process]:
    """Run an app that is in that cgroup from its first instruction on."""
    command = f'echo $$ > "{path}/cgroup.procs"; exec "$@"'
    with running(["sh", "-c", command, "sh", *app(kind)]) as process:
        yield process


def test_it_ends_with_the_last_process(shared: Warden, cgroup: Cgroup) -> None:
    ends = Ends(shared)
    path = cgroup.make("app")
    with running_in(path, "plain") as first, running_in(path, "plain") as second:
        first.wait_line("ready")
        second.wait_line("ready")
        sandbox = cgroup.add(path, shared)
        assert shared.show(sandbox)["cgroup"] == str(path)
        client = shared.connect(sandbox)
        first.send_line("")
        first.wait()
        assert client.driver("GetId")
        assert ends.told() == []
        second.send_signal(signal.SIGKILL)
        ends.wait_for(sandbox, "cgroup-empty")
        assert client.is_closed(2)


@pytest.mark.parametrize("kind", ["forks", "double-forks", "execs", "threads"])
def test_whatever_an_app_does_with_processes(shared: Warden, cgroup: Cgroup, kind: str) -> None:
    ends = Ends(shared)
    path = cgroup.make("app")
    with running_in(path, kind) as process:
        process.wait_line("ready")
        sandbox = cgroup.add(path, shared)
        if "forks" in kind:
            process.wait()
        assert shared.connect(sandbox).driver("GetId")
        assert ends.told() == []
        process.send_line("")
        ends.wait_for(sandbox, "cgroup-empty")


def test_processes_in_cgroups_below_count(shared: Warden, cgroup: Cgroup) -> None:
    ends = Ends(shared)
    path = cgroup.make("app/a/b").parent.parent
    with running_in(path / "a" / "b", "plain") as process:
        process.wait_line("ready")
        sandbox = cgroup.add(path, shared)
        (status,) = shared.manage("Status")
        assert status["watched"]["cgroups"].startswith("1 by inotify")
        process.send_line("")
        ends.wait_for(sandbox, "cgroup-empty")
    (status,) = shared.manage("Status")
    assert status["watched"]["cgroups"] == "0 by inotify"


def test_a_cgroup_that_is_removed_at_once_is_not_missed(shared: Warden, cgroup: Cgroup) -> None:
    # The kernel tells at most each 10 ms of processes that come and go, and never of a cgroup that is gone.
    ends = Ends(shared)
    for number in range(10):
        path = cgroup.make(f"app{number}")
        with running_in(path, "plain") as process:
            process.wait_line("ready")
            sandbox = cgroup.add(path, shared)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert wait_until(lambda: _removed(path))  # noqa: B023
        ends.wait_for(sandbox, "cgroup-empty")


def _removed(path: Path) -> bool:
    try:
        path.rmdir()
    except OSError:
        return False
    return True


def test_several_sandboxes_of_one_cgroup_end_together(shared: Warden, cgroup: Cgroup) -> None:
    ends = Ends(shared)
    path = cgroup.make("app")
    with running_in(path, "plain") as process:
        process.wait_line("ready")
        sandboxes = [cgroup.add(path, shared) for _ in range(3)]
        shared.stop_instance(sandboxes.pop())
        assert ends.wait()[1] == "stopped"
        process.send_line("")
        told = sorted(ends.wait() for _ in sandboxes)
        assert told == sorted((sandbox.path, "cgroup-empty") for sandbox in sandboxes)


def test_what_is_no_cgroup_or_empty_is_refused(shared: Warden, cgroup: Cgroup) -> None:
    empty = cgroup.make("empty")
    for path in (empty, cgroup.path / "missing", empty / ".." / "empty", Path("/proc/self")):
        with pytest.raises(CallError) as caught:
            cgroup.add(path, shared)
        assert caught.value.name == "org.freedesktop.DBus.Error.InvalidArgs"
    assert shared.list_sandboxes() == []


def test_what_ended_while_no_supervisor_was_there(bus: Bus, folder: Path, cgroup: Cgroup) -> None:
    runtime = folder / "run"
    ending, removed, living = (cgroup.make(name) for name in ("ending", "removed", "living"))
    with (
        open_warden(bus, runtime, orderly=False) as first,
        running_in(ending, "plain") as one,
        running_in(removed, "plain") as two,
        running_in(living, "plain") as three,
    ):
        for process in (one, two, three):
            process.wait_line("ready")
        kept = cgroup.add(living, first)
        over = [cgroup.add(ending, first), cgroup.add(removed, first)]
        first.kill()
        for process in (one, two):
            process.send_line("")
            process.wait()
        wait_for(lambda: _removed(removed))
        # Another one of the same name.
        removed.mkdir()
        (removed / "cgroup.procs").write_text(str(three.pid))
        (living / "cgroup.procs").write_text(str(three.pid))
        with open_warden(bus, runtime) as second:
            ends = Ends(second)
            wait_for(lambda: [one["id"] for one in second.list_sandboxes()] == [kept.id])
            assert second.manage("Status")[0]["ended"] == {"cgroup-empty": 2}
            assert not any(sandbox.socket.exists() for sandbox in over)
            ends.told()  # of these two it may have heard in part
            three.send_line("")
            ends.wait_for(kept, "cgroup-empty")
