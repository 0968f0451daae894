import errno
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from broker.supervisor.sandboxes.lifecycle import Process
from broker.supervisor.watches import processes
from broker.supervisor.watches.processes import (
    MAX_OVERRUNS,
    Processes,
    has_ended,
    identify,
    identify_fd,
)
from broker.wire.errors import ACCESS_DENIED, INVALID_ARGS, CallRefusedError

ME = identify(os.getpid(), os.getuid())
NOBODY = Process(pid=2**22 + 1, start=1)  # no pid is that high


class Told:
    """Who waits for processes, by name."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def of(self, name: str) -> Callable[[], None]:
        return lambda: self.names.append(name)


class FakeConnector:
    """A connector that tells what a test writes."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self.next: set[int] | None = set()
        self.is_closed = False

    def fileno(self) -> int:
        return self._ours.fileno()

    def tell(self, pids: set[int] | None) -> None:
        self.next = pids
        self._theirs.send(b"x")

    def read(self) -> set[int] | None:
        self._ours.recv(1)
        return self.next

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()
        self.is_closed = True


@asynccontextmanager
async def running(watched: Processes) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watched.run)
        await trio.testing.wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


def start_sleeping() -> int:
    return os.posix_spawn("/bin/sleep", ["sleep", "1000"], {})


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.fixture
def others() -> Iterator[tuple[Process, Process]]:
    """Two processes of the test's own. The first of the machine and our parent may be one and the same."""
    first, second = (subprocess.Popen(["sleep", "600"]) for _ in range(2))
    yield Process(first.pid, 1), Process(second.pid, 1)
    for child in (first, second):
        child.kill()
        child.wait()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The pids of those that have ended."""
    pids: set[int] = set()
    monkeypatch.setattr(processes, "has_ended", lambda process: process.pid in pids)
    return pids


def test_a_process_is_its_pid_and_its_start() -> None:
    assert ME.pid == os.getpid()
    assert not has_ended(ME)
    assert has_ended(Process(ME.pid, ME.start + 1))
    assert has_ended(NOBODY)


def test_a_process_has_to_live_and_to_be_of_the_callers_user() -> None:
    assert identify(os.getpid(), 0) == ME
    with pytest.raises(CallRefusedError, match="belongs to another user") as caught:
        identify(os.getpid(), os.getuid() + 1)
    assert caught.value.dbus_name == ACCESS_DENIED
    for pid in (0, NOBODY.pid, 2**32 - 1):
        with pytest.raises(CallRefusedError, match="there is no process") as caught:
            identify(pid, 0)
        assert caught.value.dbus_name == INVALID_ARGS


def test_a_pidfd_says_which_process() -> None:
    fd = os.pidfd_open(os.getpid())
    try:
        assert identify_fd(fd, os.getuid()) == ME
        with pytest.raises(CallRefusedError, match="belongs to another user"):
            identify_fd(fd, os.getuid() + 1)
    finally:
        os.close(fd)


def test_what_is_no_pidfd_says_nothing() -> None:
    read, write = os.pipe()
    with pytest.raises(CallRefusedError, match="ProcessFd is not a pidfd"):
        identify_fd(read, 0)
    os.close(read)
    os.close(write)


async def test_what_ended_before_is_told_at_once() -> None:
    told, watched = Told(), Processes()
    watched.watch("early", NOBODY, told.of("early"))
    assert told.names == []  # nobody looks yet
    async with running(watched):
        assert told.names == ["early"]
        watched.watch("reused", Process(ME.pid, ME.start - 1), told.of("reused"))
        watched.watch("lives", ME, told.of("lives"))
        assert told.names == ["early", "reused"]
        assert len(watched) == 1
        watched.forget("lives", ME)
        watched.forget("lives", ME)
        watched.forget("early", NOBODY)
        assert len(watched) == 0


async def test_descriptors_are_as_many_as_processes() -> None:
    told, watched = Told(), Processes()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted, not read
    async with running(watched):
        idle = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for holder in ("c0", "c1"):
            watched.watch(holder, ME, told.of(holder))
        assert len(os.listdir("/proc/self/fd")) == idle + 1  # noqa: PTH208
        watched.forget("c0", ME)
        watched.forget("c1", ME)
        assert len(os.listdir("/proc/self/fd")) == idle  # noqa: PTH208
        watched.watch("c2", ME, told.of("c2"))
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert told.names == []


async def test_a_pid_that_is_used_again_at_once_is_watched_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, watched = Told(), Processes()
    past, present = (start_sleeping() for _ in range(2))
    process = identify(present, os.getuid())
    open_pidfd = os.pidfd_open

    def open_past(_pid: int) -> int:
        monkeypatch.setattr(os, "pidfd_open", open_pidfd)
        return open_pidfd(past)

    with trio.fail_after(20):
        async with running(watched):
            # The first descriptor is of who had the pid before.
            monkeypatch.setattr(os, "pidfd_open", open_past)
            watched.watch("a", process, told.of("a"))
            (fd,) = watched._pids
            end(past)
            assert processes._is_readable(fd)
            await (
                trio.testing.wait_all_tasks_blocked()
            )  # which never comes to pass if it is asked for ever
            assert told.names == []
            end(present)
            await _until(lambda: told.names == ["a"])
    assert watched._pids == {}


async def test_many_are_watched_by_the_connector_and_few_are_not(
    ended: set[int], others: tuple[Process, Process]
) -> None:
    told, connectors = Told(), [FakeConnector(), FakeConnector()]
    left = list(connectors)
    watched = Processes(lambda: left.pop(0), many=2)
    first, second = others
    async with running(watched):
        watched.watch("a", ME, told.of("a"))
        watched.watch("b", second, told.of("b"))
        assert watched.method == "pidfds"
        watched.watch("c", first, told.of("c"))
        await _until(lambda: watched.method == "process connector")
        assert watched._pidfds == {}
        ended.add(first.pid)
        ended.add(second.pid)
        connectors[0].tell({first.pid, 12345})
        await _until(lambda: told.names == ["c"])
        connectors[0].tell(None)  # it missed something: all are looked at
        await _until(lambda: told.names == ["c", "b"])
        watched.forget("a", ME)
        assert watched.method == "pidfds"
        assert connectors[0].is_closed
        ended.clear()
        for holder, process in (("a", ME), ("b", second), ("c", first)):
            watched.watch(holder, process, told.of(holder))
        await _until(lambda: watched.method == "process connector")
    assert connectors[1].is_closed


async def test_what_ends_while_the_connector_is_opened_is_not_missed(
    ended: set[int], others: tuple[Process, Process]
) -> None:
    told, connector = Told(), FakeConnector()

    def open_connector() -> FakeConnector:
        ended.add(others[0].pid)
        return connector

    watched = Processes(open_connector, many=1)
    async with running(watched):
        watched.watch("a", others[0], told.of("a"))
        watched.watch("b", ME, told.of("b"))
        await _until(lambda: told.names == ["a"])


async def test_without_a_connector_pidfds_do(
    ended: set[int], others: tuple[Process, Process]
) -> None:
    tries: list[int] = []
    watched = Processes(lambda: tries.append(1), many=1)
    told = Told()
    async with running(watched):
        for number, process in enumerate((*others, ME)):
            watched.watch(f"c{number}", process, told.of(f"c{number}"))
        await _until(lambda: bool(tries))
        await trio.testing.wait_all_tasks_blocked(0.01)
        watched.watch("c9", others[0], told.of("c9"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert tries == [1]
        assert watched.method == "pidfds"
        assert len(watched._pidfds) == 3


async def test_a_connector_that_drops_too_much_is_left(
    ended: set[int], others: tuple[Process, Process]
) -> None:
    connector = FakeConnector()
    watched = Processes(lambda: connector, many=1)
    told = Told()
    async with running(watched):
        watched.watch("a", ME, told.of("a"))
        watched.watch("b", others[0], told.of("b"))
        await _until(lambda: watched.method == "process connector")
        for _ in range(MAX_OVERRUNS):
            assert not connector.is_closed
            connector.tell(None)
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert connector.is_closed
        assert watched.method == "pidfds"
        assert set(watched._pidfds) == {others[0].pid, ME.pid}


async def test_without_descriptors_processes_are_looked_at(
    ended: set[int], monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    def refuse(_pid: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    told, watched = Told(), Processes()
    async with running(watched):
        watched.watch("a", ME, told.of("a"))
        assert watched.method == "pidfds, 1 looked at each second"
        await trio.sleep(3)
        assert told.names == []
        ended.add(ME.pid)
        await trio.sleep(3)
        assert told.names == ["a"]
        assert watched.method == "pidfds"


async def test_what_cannot_be_told_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    answers: list[bool | None] = [None, None, True]
    monkeypatch.setattr(processes, "has_ended", lambda _process: answers.pop(0))
    told, watched = Told(), Processes()
    async with running(watched):
        watched.watch("a", ME, told.of("a"))
        await trio.sleep(5)
    assert told.names == ["a"]
    assert answers == []


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await trio.sleep(0.001)
    raise AssertionError("it did not come to pass")
