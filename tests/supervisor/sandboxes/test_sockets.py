import os
import socket
import stat
from pathlib import Path

import pytest

from broker.supervisor.sandboxes.sockets import (
    bound_socket,
    check_readable,
    check_writable,
    given_socket,
    notify,
    sweep,
)
from broker.wire.errors import INVALID_ARGS, CallRefusedError


def test_a_bound_socket_is_ours_alone_and_takes_connections(tmp_path: Path) -> None:
    with bound_socket(tmp_path, os.geteuid()) as bound:
        path = Path(bound.path)
        info = path.stat()
        assert stat.S_IMODE(info.st_mode) == 0o700
        assert (bound.device, bound.inode) == (info.st_dev, info.st_ino)
        assert bound.is_ours
        assert bound.address == f"unix:path={path},guid={bound.guid}"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(bound.path)
        fd = bound.fd
    assert path.exists()  # the gate's to unlink
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_the_file_goes_if_the_sandbox_does_not_come_about(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        with bound_socket(tmp_path, os.geteuid()):
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        with bound_socket(tmp_path / "none", os.geteuid()):
            pass


def test_a_given_socket_stays_the_callers(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        with given_socket(sock.fileno()) as bound:
            assert not bound.is_ours
            assert bound.path == str(tmp_path / "s")
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(bound.path)
        assert sock.fileno() >= 0
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        with given_socket(sock.fileno()) as bound:
            assert bound.fd != sock.fileno()


def test_a_given_abstract_socket_is_taken() -> None:
    name = f"\0buswarden-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(name)
        with given_socket(sock.fileno()) as bound:
            assert bound.path == name
            assert bound.address.startswith("unix:abstract=buswarden-test-")


def test_what_cannot_be_listened_on_is_refused(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    unbound = socket.socket(socket.AF_UNIX)
    odd = socket.socket(socket.AF_UNIX)
    odd.bind(os.fsencode(tmp_path) + b"/\xff")
    try:
        for fd in (datagram, unbound, ours, odd):
            with pytest.raises(CallRefusedError) as caught:
                with given_socket(fd.fileno()):
                    pass
            assert caught.value.dbus_name == INVALID_ARGS
        with pytest.raises(CallRefusedError):
            with given_socket(read):
                pass
    finally:
        for sock in (ours, theirs, datagram, unbound, odd):
            sock.close()
        os.close(read)
        os.close(write)


def test_ends_of_pipes_are_told_apart(tmp_path: Path) -> None:
    read, write = os.pipe()
    file = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    try:
        check_readable(read, "CloseNotify")
        check_writable(write, "ReadyNotify")
        for fd in (write, file):
            with pytest.raises(CallRefusedError, match="CloseNotify"):
                check_readable(fd, "CloseNotify")
        for fd in (read, file):
            with pytest.raises(CallRefusedError, match="ReadyNotify"):
                check_writable(fd, "ReadyNotify")
    finally:
        for fd in (read, write, file):
            os.close(fd)


def test_one_byte_is_written_to_pipe_or_socket() -> None:
    read, write = os.pipe()
    notify(write)
    assert os.read(read, 9) == b"\0"
    assert os.get_blocking(write)
    os.close(read)
    notify(write)  # nobody reads: not our business
    os.close(write)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        notify(ours.fileno())
        assert theirs.recv(9) == b"\0"


def test_a_full_pipe_is_not_waited_for() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write, bytes(65536))
    os.set_blocking(write, True)
    notify(write)
    os.close(read)
    os.close(write)


def test_sweeping_leaves_what_is_to_be_kept(tmp_path: Path) -> None:
    for name in ("dbus-1", "dbus-2", "other"):
        (tmp_path / name).touch()
    assert sweep(tmp_path, {str(tmp_path / "dbus-1")}) == [str(tmp_path / "dbus-2")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dbus-1", "other"]
