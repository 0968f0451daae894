import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker.systemd import notify
from broker.systemd.notify import Notifier, take_descriptors, take_notifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        yield sock


@pytest.fixture
def notifier(manager: socket.socket) -> Iterator[Notifier]:
    made = take_notifier({"NOTIFY_SOCKET": manager.getsockname()})
    yield made
    made.close()


def test_what_is_told(manager: socket.socket, notifier: Notifier) -> None:
    assert notifier.is_wanted
    tells: list[tuple[Callable[[], None], bytes]] = [
        (notifier.ready, b"READY=1"),
        (lambda: notifier.ready("serves\nall"), b"READY=1\nSTATUS=serves all"),
        (lambda: notifier.status("3 sandboxes"), b"STATUS=3 sandboxes"),
        (notifier.stopping, b"STOPPING=1"),
        (notifier.alive, b"WATCHDOG=1"),
        (lambda: notifier.main_process(77), b"MAINPID=77"),
        (lambda: notifier.remove("c1.session"), b"FDSTOREREMOVE=1\nFDNAME=c1.session"),
    ]
    for tell, text in tells:
        tell()
        assert manager.recv(4096) == text
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    words = dict(line.split("=") for line in manager.recv(4096).decode().splitlines())
    assert words["RELOADING"] == "1"
    assert before <= int(words["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000


def test_a_descriptor_goes_along(manager: socket.socket, notifier: Notifier) -> None:
    read_end, write_end = os.pipe()
    notifier.store("c12.session", read_end)
    data, (fd,), _, _ = socket.recv_fds(manager, 4096, 4)
    assert data == b"FDSTORE=1\nFDNAME=c12.session\nFDPOLL=0"
    os.write(write_end, b"x")
    assert os.read(fd, 1) == b"x"
    for one in (fd, read_end, write_end):
        os.close(one)


@pytest.mark.parametrize("name", ["", "a:b", "a b", "a\n", "é", "x" * 256])
def test_a_name_that_systemd_would_not_take_is_our_defect(name: str) -> None:
    with pytest.raises(AssertionError):
        Notifier("/run/x").remove(name)


def test_without_systemd_nobody_is_told() -> None:
    notifier = take_notifier({})
    assert not notifier.is_wanted
    notifier.ready("x")
    notifier.store("c1.session", 0)
    notifier.close()
    assert not take_notifier({"NOTIFY_SOCKET": "relative"}).is_wanted


def test_a_manager_that_is_gone_or_does_not_read_is_not_waited_for(
    tmp_path: Path,
) -> None:
    nobody = Notifier(str(tmp_path / "nobody"))
    nobody.ready()
    nobody.close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0buswarden-test-" + os.urandom(8).hex())
        address = "@" + sock.getsockname()[1:].decode()
        notifier = take_notifier({"NOTIFY_SOCKET": address}, patience=0.0)
        for _ in range(2000):
            notifier.alive()
        assert sock.recv(100) == b"WATCHDOG=1"
        notifier.close()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "x"}, 0.0),
    ],
)
def test_the_watchdog_is_ours_or_somebody_elses(environ: dict[str, str], seconds: float) -> None:
    environ = {"NOTIFY_SOCKET": "/run/x", "HOME": "/", **environ}
    assert take_notifier(environ).watchdog == seconds
    assert environ == {"HOME": "/"}


def test_who_comes_after_us_tells_the_same_manager() -> None:
    for address in ("/run/x", "@x"):
        environ = Notifier(address, 30.0).environment()
        assert environ == {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000000"}
        assert take_notifier(environ).watchdog == 30.0
    assert Notifier().environment() == {}


def test_descriptors_come_with_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    first = 200  # nobody in here has so many
    ends = os.pipe()
    read_end, write_end = (os.dup2(fd, first + index) for index, fd in enumerate(ends))
    for fd in ends:
        os.close(fd)
    monkeypatch.setattr(notify, "_FIRST", first)
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:c1.session"}
    assert take_descriptors(environ) == [("a", read_end), ("c1.session", write_end)]
    assert environ == {}
    assert not os.get_inheritable(read_end)
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2"}
    assert take_descriptors(environ) == [("", read_end), ("", write_end)]
    for fd in (read_end, write_end):
        os.close(fd)


@pytest.mark.parametrize(
    "environ",
    [{}, {"LISTEN_FDS": "2"}, {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}],
)
def test_descriptors_of_others_are_left_alone(environ: dict[str, str]) -> None:
    assert take_descriptors(environ) == []
    assert environ == {}
