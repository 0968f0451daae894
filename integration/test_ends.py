"""Each way for a sandbox to end, with its reason; and apps that fork, exec, die and close on real buses."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from integration.harness.buses import Bus
from integration.harness.endings import Ends, app
from integration.harness.processes import Process, is_running, running
from integration.harness.rawclient import CallError, RawClient
from integration.harness.supervised import Sandbox, Warden, open_warden, wait_for
from integration.harness.values import Variant

KEEP = Variant("b", True)


@contextmanager
def pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def with_process(warden: Warden, pid: int) -> Sandbox:
    """Add a sandbox that ends with a process."""
    with pidfd(pid) as fd:
        return warden.add_server(fds={"ProcessFd": fd})


# -- the reasons ---------------------------------------------------------------------------------------------


def test_the_pipe(shared: Warden) -> None:
    ends = Ends(shared)
    read_end, write_end = os.pipe()
    sandbox = shared.add_server(fds={"CloseNotify": read_end})
    client = shared.connect(sandbox)
    os.close(read_end)
    os.close(write_end)
    ends.wait_for(sandbox, "close-notify")
    assert client.is_closed(2)


def test_the_creator(shared: Warden) -> None:
    ends = Ends(shared)
    creator = shared.connect_host()
    idle, used = shared.add_server(creator=creator), shared.add_server(creator=creator)
    client = shared.connect(used)
    creator.close()
    ends.wait_for(idle, "creator-gone")
    wait_for(lambda: not shared.show(used)["listening"])
    assert (shared.show(used)["phase"], shared.show(used)["reason"]) == ("closing", "creator-gone")
    client.close()
    ends.wait_for(used, "creator-gone")


def test_a_stop_goes_before_a_creator_that_left(shared: Warden) -> None:
    ends = Ends(shared)
    creator = shared.connect_host()
    sandbox = shared.add_server(creator=creator)
    shared.connect(sandbox)
    creator.close()
    wait_for(lambda: not shared.show(sandbox)["listening"])
    shared.stop_instance(sandbox)
    ends.wait_for(sandbox, "stopped")


@pytest.mark.parametrize("how", ["pid", "pidfd"])
def test_a_process(shared: Warden, how: str) -> None:
    ends = Ends(shared)
    with running(app("plain")) as process:
        process.wait_line("ready")
        if how == "pid":
            sandbox = shared.add_server(Process=Variant("u", process.pid))
        else:
            sandbox = with_process(shared, process.pid)
        client = shared.connect(sandbox)
        assert shared.show(sandbox)["process"] == process.pid
        process.send_line("")
        ends.wait_for(sandbox, "process-ended")  # before anybody has waited for it
        assert client.is_closed(2)


def test_listening_and_the_last_connection(shared: Warden) -> None:
    ends = Ends(shared)
    sandbox = shared.add_server()
    clients = [shared.connect(sandbox) for _ in range(2)]
    shared.stop_listening(sandbox)
    clients.pop().close()
    assert ends.told() == []
    clients.pop().close()
    ends.wait_for(sandbox, "last-connection")


def test_a_stop(shared: Warden) -> None:
    ends = Ends(shared)
    sandbox = shared.add_server()
    shared.connect(sandbox)
    shared.stop_instance(sandbox)
    ends.wait_for(sandbox, "stopped")


def test_a_time_limit(shared: Warden) -> None:
    ends = Ends(shared)
    long = shared.add_server(TimeLimit=Variant("t", 600))
    sandbox = shared.add_server(TimeLimit=Variant("t", 1))
    assert shared.show(sandbox)["time_limit"] == 1
    assert 0 < shared.show(long)["time_left"] <= 600
    client = shared.connect(sandbox)
    ends.wait_for(sandbox, "time-limit")
    assert client.is_closed(2)
    shared.stop_instance(long)


def test_the_first_of_several_is_the_reason(shared: Warden) -> None:
    ends = Ends(shared)
    read_end, write_end = os.pipe()
    with running(app("plain")) as process, pidfd(process.pid) as fd:
        sandbox = shared.add_server(
            fds={"CloseNotify": read_end, "ProcessFd": fd}, TimeLimit=Variant("t", 600)
        )
        os.close(read_end)
        process.send_signal(signal.SIGKILL)
        ends.wait_for(sandbox, "process-ended")
        os.close(write_end)
        assert ends.told() == []
    (status,) = shared.manage("Status")
    assert status["ended"]["process-ended"] >= 1
    assert status["watched"]["processes"].startswith("0 by ")


def test_the_end_of_the_broker_stops_all(bus: Bus, folder: Path) -> None:
    with RawClient.connect(bus.address) as host:
        host.add_match("interface='org.buswarden.Broker1'")
        with open_warden(bus, folder / "run") as warden:
            paths = [warden.add_server(KeepAfterCreator=KEEP).path for _ in range(3)]
        told = [m.values for m in host.drain() if m.header.member == "SandboxEnded"]
    assert sorted(told) == sorted((path, "stopped") for path in paths)


# -- who may be named ----------------------------------------------------------------------------------------


def refusal(warden: Warden, *, fds: dict[str, int] | None = None, **named: Any) -> str:
    with pytest.raises(CallError) as caught:
        warden.add_server(fds=fds, **named)
    assert caught.value.name == "org.freedesktop.DBus.Error.InvalidArgs"
    return caught.value.text


def test_what_cannot_be_watched_is_refused(shared: Warden) -> None:
    with running(app("plain")) as process:
        process.wait_line("ready")
        with pidfd(process.pid) as fd:
            process.send_line("")
            process.wait()
            assert "no process" in refusal(shared, Process=Variant("u", process.pid))
            assert "ProcessFd" in refusal(shared, fds={"ProcessFd": fd})
    read_end, write_end = os.pipe()
    assert "is not a pidfd" in refusal(shared, fds={"ProcessFd": read_end})
    os.close(read_end)
    os.close(write_end)
    assert "no cgroup filesystem" in refusal(shared, Cgroup=Variant("s", "/etc"))
    assert "TimeLimit" in refusal(shared, TimeLimit=Variant("t", 0))
    assert list((shared.folder / "containers").iterdir()) == []


def test_the_command_line_says_what_ends_it(shared: Warden) -> None:
    ends = Ends(shared)
    with running(app("plain")) as process:
        process.wait_line("ready")
        argv = ["add", "--type", "a.b", "--app", "x", "--time-limit", "600"]
        added = shared.cli(*argv, "--process", str(process.pid))
        id_ = added.out.split()[0]
        shown = shared.cli("show", id_).out
        assert f"process {process.pid}, the time limit, in " in shown
        assert "1 by " in shared.cli("status").out
        process.send_line("")
        assert ends.wait() == (f"/org/freedesktop/DBus/Containers1/{id_}", "process-ended")
    assert "process-ended" in shared.cli("status").out


def test_exec_goes_on_without_its_sandbox(shared: Warden) -> None:
    ends = Ends(shared)
    outcome = shared.cli("exec", "--time-limit", "1", "--", "sh", "-c", "sleep 2; exit 7")
    assert outcome.code == 7
    assert ends.wait()[1] == "time-limit"
    assert ends.told() == []


# -- apps ----------------------------------------------------------------------------------------------------


@contextmanager
def piped(warden: Warden, kind: str) -> Iterator[tuple[Sandbox, Process]]:
    """Run an app that has the only write end of its sandbox's pipe."""
    read_end, write_end = os.pipe()
    sandbox = warden.add_server(fds={"CloseNotify": read_end})
    os.close(read_end)
    with running(app(kind, write_end), pass_fds=[write_end]) as process:
        os.close(write_end)
        yield sandbox, process


@pytest.mark.parametrize("kind", ["forks", "double-forks", "execs", "threads"])
def test_with_a_pipe_it_ends_with_the_last_that_has_it(shared: Warden, kind: str) -> None:
    ends = Ends(shared)
    with piped(shared, kind) as (sandbox, process):
        process.wait_line("ready")
        if "forks" in kind:
            process.wait()
        assert shared.connect(sandbox).driver("GetId")
        assert ends.told() == []
        process.send_line("")
        ends.wait_for(sandbox, "close-notify")


def test_with_a_pipe_that_is_closed_early_it_ends_then(shared: Warden) -> None:
    ends = Ends(shared)
    with piped(shared, "closes") as (sandbox, process):
        ends.wait_for(sandbox, "close-notify")
        assert process.wait_line("ready")
        assert process.returncode is None


def test_with_a_pipe_a_child_that_did_not_get_it_has_lost_its_connection(shared: Warden) -> None:
    ends = Ends(shared)
    read_end, write_end = os.pipe()
    sandbox = shared.add_server(fds={"CloseNotify": read_end})
    os.close(read_end)
    client = shared.connect(sandbox)  # as the child that keeps its parent's socket
    with running(app("plain"), pass_fds=[write_end]) as parent:
        os.close(write_end)
        parent.wait_line("ready")
        assert client.driver("GetId")
        parent.send_signal(signal.SIGKILL)
        ends.wait_for(sandbox, "close-notify")
        assert client.is_closed(2)


@pytest.mark.parametrize("kind", ["execs", "threads", "closes"])
def test_with_a_process_it_ends_with_that_and_all_its_threads(shared: Warden, kind: str) -> None:
    ends = Ends(shared)
    with running(app(kind)) as process:
        sandbox = with_process(shared, process.pid)
        process.wait_line("ready")
        assert shared.connect(sandbox).driver("GetId")
        assert ends.told() == []
        process.send_line("")
        ends.wait_for(sandbox, "process-ended")


@pytest.mark.parametrize("kind", ["forks", "double-forks"])
def test_with_a_process_its_children_do_not_count(shared: Warden, kind: str) -> None:
    ends = Ends(shared)
    argv = ["sh", "-c", 'read line; exec "$@"', "sh", *app(kind)]
    with running(argv) as process:
        sandbox = with_process(shared, process.pid)
        client = shared.connect(sandbox)
        process.send_line("")
        child = int(process.wait_line("ready").split()[1])
        ends.wait_for(sandbox, "process-ended")
        assert is_running(child)
        assert client.is_closed(2)  # though the child may have it
        process.send_line("")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_with_a_process_it_ends_however_that_dies(shared: Warden, number: int) -> None:
    ends = Ends(shared)
    with running(app("plain")) as process:
        process.wait_line("ready")
        sandbox = with_process(shared, process.pid)
        process.send_signal(number)
        ends.wait_for(sandbox, "process-ended")
