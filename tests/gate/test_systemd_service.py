import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.control_protocol.messages import StartNext
from broker.gate.io.loop import Loop
from broker.gate.systemd_service import SystemdService
from broker.systemd import notify
from broker.wire.errors import FAILED, INVALID_ARGS, NOT_SUPPORTED, CallRefusedError

SCRIPT = """
import os, sys
assert sys.argv[1:] == ["--ready-fd", "3", "--take-over", "4"], sys.argv
os.write(3, os.environ["NOTIFY_SOCKET"].encode())
os.write(4, os.environ["MORE"].encode())
"""


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        yield sock


@pytest.fixture
def manager(systemd: socket.socket) -> Iterator[SystemdService]:
    made = SystemdService({"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "20000"})
    yield made
    made._notifier.close()


def test_nobody_gives_nothing_and_starts_nobody() -> None:
    manager = SystemdService({})
    assert not manager.is_there
    assert manager.control() is None
    manager.serves(Loop())
    manager.replaced()
    with pytest.raises(CallRefusedError) as caught:
        manager.start_next(StartNext(("/bin/true",), {}), [])
    assert caught.value.dbus_name == NOT_SUPPORTED


def test_the_control_socket_is_the_one_that_is_named_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "control"))
        sock.listen()
        monkeypatch.setattr(notify, "_FIRST", os.dup(sock.fileno()))
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "control"}
    manager = SystemdService({**environ, "NOTIFY_SOCKET": "/nobody"})
    control = manager.control()
    assert control is not None
    with control:
        assert control.getsockname() == str(tmp_path / "control")
    assert manager.control() is None


def test_it_says_that_it_serves_and_then_that_it_is_alive(
    systemd: socket.socket, manager: SystemdService
) -> None:
    now = 0.0
    loop = Loop(lambda: now)
    manager.serves(loop)
    assert [systemd.recv(100) for _ in range(2)] == [b"READY=1", b"WATCHDOG=1"]
    now = 0.0101
    loop._run_timers()
    assert systemd.recv(100) == b"WATCHDOG=1"
    loop.close()


def test_what_it_starts_says_so_itself_and_is_named_once_it_serves(
    systemd: socket.socket, manager: SystemdService
) -> None:
    # The interpreter stands for the gate: it is given a program in place of one's options.
    import sys  # noqa: PLC0415

    ready, ready_there = os.pipe()
    ours, theirs = os.pipe()
    request = StartNext((sys.executable, "-c", SCRIPT), {"MORE": "more"})
    started = manager.start_next(request, [ready_there, theirs])
    assert os.read(ready, 200).decode() == systemd.getsockname()
    assert os.read(ours, 200) == b"more"
    for fd in (ready, ours):
        assert os.read(fd, 1) == b""  # no other end is left in here
        os.close(fd)
    manager.replaced()
    assert systemd.recv(100) == f"MAINPID={started.pid}".encode()
    os.waitpid(started.pid, 0)


def test_what_cannot_be_started_is_refused(manager: SystemdService) -> None:
    fds = list(os.pipe())
    for request, given, error in (
        (StartNext(("/no/such/program",), {}), fds, FAILED),
        (StartNext((), {}), fds, INVALID_ARGS),
        (StartNext(("/bin/true",), {}), fds[:1], INVALID_ARGS),
    ):
        with pytest.raises(CallRefusedError) as caught:
            manager.start_next(request, given)
        assert caught.value.dbus_name == error
    for fd in fds:
        os.close(fd)  # they were lent
