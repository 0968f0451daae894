"""Descriptors that end when their other end closes, and those that do not."""

import os
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from broker.posix.channels import (
    duplicate_socket,
    ends_with_its_writers,
    is_connected,
    listens,
    takes_a_byte,
)


@pytest.fixture
def fds(tmp_path: Path) -> Iterator[dict[str, int]]:
    """Descriptors of each kind, by name."""
    with ExitStack() as stack:

        def kept(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        def socket_of(*kind: int) -> socket.socket:
            return stack.enter_context(socket.socket(*kind))

        os.mkfifo(tmp_path / "fifo")
        found: dict[str, int] = {}
        found["read"], found["write"] = (kept(fd) for fd in os.pipe())
        found["fifo-read"] = kept(os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK))
        found["fifo-write"] = kept(os.open(tmp_path / "fifo", os.O_WRONLY))
        found["fifo-both"] = kept(os.open(tmp_path / "fifo", os.O_RDWR))
        found["fifo-path"] = kept(os.open(tmp_path / "fifo", os.O_PATH))
        for name, kind in (
            ("stream", socket.SOCK_STREAM),
            ("packets", socket.SOCK_SEQPACKET),
            ("datagrams", socket.SOCK_DGRAM),
        ):
            ends = socket.socketpair(socket.AF_UNIX, kind)
            for end in ends:
                stack.enter_context(end)
            found[name] = ends[0].fileno()
        found["unconnected"] = socket_of(socket.AF_UNIX).fileno()
        listening = socket_of(socket.AF_UNIX)
        listening.bind(str(tmp_path / "s"))
        found["socket-path"] = kept(os.open(tmp_path / "s", os.O_PATH))
        listening.listen()
        found["listening"] = listening.fileno()
        packets = socket_of(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        packets.bind(str(tmp_path / "p"))
        packets.listen()
        found["listening-packets"] = packets.fileno()
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        found["tcp-listening"] = tcp.fileno()
        connected = stack.enter_context(socket.create_connection(tcp.getsockname()))
        found["tcp"] = connected.fileno()
        found["netlink"] = socket_of(socket.AF_NETLINK, socket.SOCK_RAW).fileno()
        found["udp"] = socket_of(socket.AF_INET, socket.SOCK_DGRAM).fileno()
        epoll = select.epoll()
        stack.callback(epoll.close)
        found["epoll"] = epoll.fileno()
        found["eventfd"] = kept(os.eventfd(0))
        found["pidfd"] = kept(os.pidfd_open(os.getpid()))
        found["memfd"] = kept(os.memfd_create("x"))
        found["folder"] = kept(os.open(tmp_path, os.O_RDONLY))
        found["null"] = kept(os.open("/dev/null", os.O_RDWR))
        yield found


def test_the_kinds_are_told_apart(fds: dict[str, int]) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))

    def those(check: object) -> set[str]:
        assert callable(check)
        return {name for name, fd in fds.items() if check(fd)}

    assert those(is_connected) == {"stream", "packets"}
    assert those(ends_with_its_writers) == {"read", "fifo-read", "stream", "packets"}
    assert those(takes_a_byte) == {"write", "fifo-write", "fifo-both", "stream", "packets"}
    assert those(listens) == {"listening"}
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_end_whose_other_end_is_gone_is_still_one() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        assert ends_with_its_writers(ours.fileno())


def test_what_is_no_socket_cannot_be_duplicated_as_one(fds: dict[str, int]) -> None:
    for name in ("read", "socket-path"):
        with pytest.raises(OSError, match=r"Bad file|Socket operation"):
            duplicate_socket(fds[name])
