"""Whatever a creator does to the sockets and the pipe that it gave, it ends its own sandbox at the worst."""

import errno
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker.control_protocol.messages import (
    AddSandbox,
    Done,
    Ended,
    Listener,
    Refused,
    SandboxSpec,
    SetBuses,
)
from broker.gate.io import listener as accept
from broker.wire.errors import FAILED
from policy.rules import AccessList
from tests.gate.test_server import APP, BUS, Supervisor, count_fds, snapshot

LONG = 10  # seconds: what nobody is to wait for


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    assert supervisor.ask(SetBuses((BUS,))) == Done()
    yield supervisor
    supervisor.close()


@pytest.fixture
def given(supervisor: Supervisor) -> Iterator[socket.socket]:
    """The socket that sandbox c1 listens on, which its creator still has."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(supervisor.folder / "given"))
        sock.listen()
        spec = SandboxSpec(
            id="c1",
            identity=APP,
            uid=os.getuid(),
            listeners=(Listener(bus="session", fd=0),),
            access=AccessList(),
        )
        assert supervisor.ask(AddSandbox(spec), (sock.fileno(),)) == Done()
        yield sock


def names(supervisor: Supervisor) -> list[str]:
    return [one.spec.id for one in snapshot(supervisor).sandboxes]


def turns(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the events of two turns of the loop in which nothing new happens."""
    seen: list[int] = []
    for fd, handler in list(supervisor.loop._handlers.items()):

        def told(events: int, handler: Callable[[int], None] = handler) -> None:
            seen.append(events)
            handler(events)

        monkeypatch.setitem(supervisor.loop._handlers, fd, told)
    supervisor.turn(2)
    return seen


# -- the pipe ------------------------------------------------------------------------------------------


def closed_pipe() -> int:
    reading, writing = os.pipe()
    os.write(writing, b"noise")
    os.close(writing)
    return reading


def half_closed_socket() -> int:
    ours, theirs = socket.socketpair()
    theirs.shutdown(socket.SHUT_WR)
    theirs.detach()
    return ours.detach()


def reset_socket() -> int:
    ours, theirs = socket.socketpair()
    ours.send(b"not read")
    theirs.close()
    return ours.detach()


@pytest.mark.parametrize("make", [closed_pipe, half_closed_socket, reset_socket])
def test_whatever_cannot_say_more_ends_its_sandbox_alone(
    supervisor: Supervisor, make: Callable[[], int]
) -> None:
    supervisor.add()
    fd = make()
    supervisor.add("c1", close_notify=fd)
    os.close(fd)
    supervisor.turn()
    assert names(supervisor) == ["c0"]
    assert supervisor.events == [Ended("c1", "close-notify")]


def test_a_fifo_ends_with_its_last_writer(supervisor: Supervisor) -> None:
    path = supervisor.folder / "fifo"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    supervisor.add(close_notify=reading)
    os.close(reading)
    assert names(supervisor) == ["c0"]  # nobody has come yet
    writing = os.open(path, os.O_WRONLY)
    assert names(supervisor) == ["c0"]
    os.close(writing)
    supervisor.turn()
    assert names(supervisor) == []


def test_bytes_in_the_pipe_are_nothing_to_do(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    supervisor.add(close_notify=reading)
    os.close(reading)
    os.write(writing, b"noise")
    assert turns(supervisor, monkeypatch) == []
    assert os.get_blocking(writing)
    os.close(writing)


# -- the socket ----------------------------------------------------------------------------------------


def test_a_socket_that_was_made_to_block_keeps_nobody(
    supervisor: Supervisor, given: socket.socket
) -> None:
    given.settimeout(None)
    # So that the test ends if it does block.
    given.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", LONG, 0))
    begun = time.monotonic()
    with socket.socket(socket.AF_UNIX) as app:
        app.connect(given.getsockname())
        supervisor.turn()
        assert time.monotonic() - begun < LONG
        assert [one.opening for one in snapshot(supervisor).sandboxes] == [1]


class AlwaysBlocking(socket.socket):
    """A listening socket that its creator makes block whenever it is made not to, and that has connections to show."""

    def setblocking(self, flag: bool, /) -> None:
        assert not flag
        super().setblocking(True)


class AlwaysReadable:
    """In place of select.poll: a connection was there a moment ago."""

    def register(self, _sock: socket.socket, _events: int) -> None: ...

    def poll(self, _milliseconds: int) -> list[object]:
        return [self]


def test_attack_c5_an_accept_that_waits_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(select, "poll", AlwaysReadable)
    with AlwaysBlocking(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "given"))
        listening.listen()
        # So that the test ends if it does block; as an error of another kind.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", LONG, 0))
        with pytest.raises(accept.KeptWaitingError, match="makes accept block"):
            accept.accept_nowait(listening, shared=True)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        # And it is no worse afterwards.
        with socket.socket(socket.AF_UNIX) as app:
            app.connect(str(tmp_path / "given"))
            connection = accept.accept_nowait(listening, shared=True)
            assert connection is not None
            connection.close()


def test_attack_c5_an_accept_that_is_interrupted_finds_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(select, "poll", AlwaysReadable)

    class Once(socket.socket):
        """A socket whose creator cleared the flag once and took the connection."""

        calls = 0

        def setblocking(self, flag: bool, /) -> None:
            self.calls += 1
            super().setblocking(flag if self.calls > 1 else True)

    with Once(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "given"))
        listening.listen()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", LONG, 0))
        assert accept.accept_nowait(listening, shared=True) is None
        assert listening.calls == 2


def test_attack_c5_who_keeps_us_waiting_loses_its_socket(
    supervisor: Supervisor,
    given: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def wait(_sock: socket.socket, *, shared: bool) -> None:
        assert shared
        raise accept.KeptWaitingError(errno.EAGAIN, "the creator of the socket makes accept block")

    monkeypatch.setattr(accept, "accept_nowait", wait)
    with socket.socket(socket.AF_UNIX) as app:
        app.connect(given.getsockname())
        supervisor.turn(5)
    assert names(supervisor) == []
    assert [one.message for one in caplog.records if one.levelname == "WARNING"] == [
        "listener-lost sandbox=c1: the creator of the socket makes accept block"
    ]


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_RDWR])
def test_a_socket_that_was_shut_down_is_let_go(
    supervisor: Supervisor, given: socket.socket, how: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor.add()
    with socket.socket(socket.AF_UNIX) as app:
        app.connect(given.getsockname())
        supervisor.turn()
        given.shutdown(how)
        supervisor.turn()
        one, _ = sorted(snapshot(supervisor).sandboxes, key=lambda one: one.spec.id)[::-1]
        assert (one.spec.id, one.listening, one.opening) == ("c1", False, 1)
        assert turns(supervisor, monkeypatch) == []
    supervisor.turn()
    assert names(supervisor) == ["c0"]
    assert supervisor.events == [Ended("c1", "last-connection")]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF])
def test_an_error_that_lasts_ends_the_listener_and_is_logged_once(
    supervisor: Supervisor,
    given: socket.socket,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(_sock: socket.socket, *, shared: bool) -> None:
        assert shared
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(accept, "accept_nowait", fail)
    with socket.socket(socket.AF_UNIX) as app:
        app.connect(given.getsockname())
        supervisor.turn(5)
    assert names(supervisor) == []
    assert [one.message for one in caplog.records if one.levelname == "WARNING"] == [
        f"listener-lost sandbox=c1: {os.strerror(number)}"
    ]


# -- defects of ours -----------------------------------------------------------------------------------


def fail_always(*_: object, **_named: object) -> None:
    raise RuntimeError("a defect")


def test_a_defect_ends_its_sandbox_alone(
    supervisor: Supervisor,
    given: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    supervisor.add()
    monkeypatch.setattr(accept, "accept_nowait", fail_always)
    with socket.socket(socket.AF_UNIX) as app:
        app.connect(given.getsockname())
        supervisor.turn()
    assert names(supervisor) == ["c0"]
    assert supervisor.events == [Ended("c1", "stopped")]
    (record,) = [one for one in caplog.records if one.levelname == "WARNING"]
    assert record.message.startswith("sandbox-defect sandbox=c1")
    assert record.exc_info is not None


def test_a_defect_of_who_waited_ends_its_sandbox_alone(supervisor: Supervisor) -> None:
    supervisor.add()
    supervisor.add("c1")
    sandbox = supervisor.gate._sandboxes["c1"]
    sandbox._throttle._waiting[fail_always] = None
    sandbox._throttle._wake_next()
    assert names(supervisor) == ["c0"]


def test_a_sandbox_for_which_there_is_no_room_is_refused(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(_fd: int, _events: int, _handler: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = count_fds()
    with monkeypatch.context() as patch:
        patch.setattr(supervisor.loop, "add", add)
        assert supervisor.add() == Refused(FAILED, "No space left on device")
    assert names(supervisor) == []
    assert count_fds() == before
