import os
import socket
import stat
from pathlib import Path

import pytest

from broker.posix.sockets import (
    bind_with_umask,
    peer_credentials,
    peer_uid,
    stream_socket_from_fd,
    unlink_socket,
)


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o700), (0o177, 0o600)])
def test_mode_of_a_bound_file_is_what_the_umask_leaves(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(0o022)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            bind_with_umask(sock, str(tmp_path / "socket"), umask)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "socket").stat().st_mode) == mode


def test_umask_is_the_former_one_after_a_failure(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with socket.socket(socket.AF_UNIX) as sock, pytest.raises(OSError, match="No such file"):
            bind_with_umask(sock, str(tmp_path / "none" / "socket"), 0o177)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_only_the_very_file_is_unlinked(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    path.touch()
    found = path.stat()
    unlink_socket(str(path), found.st_dev, found.st_ino + 1)
    assert path.exists()
    unlink_socket("", found.st_dev, found.st_ino)
    unlink_socket(str(path), found.st_dev, found.st_ino)
    assert not path.exists()
    unlink_socket(str(path), found.st_dev, found.st_ino)


def test_a_descriptor_is_the_socket_that_it_was_and_says_who_is_at_the_other_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, stream_socket_from_fd(theirs.detach()) as sock:
        ours.send(b"x")
        assert sock.recv(1) == b"x"
        assert peer_uid(sock) == os.getuid()
        assert peer_credentials(sock) == (os.getpid(), os.getuid(), os.getgid())
