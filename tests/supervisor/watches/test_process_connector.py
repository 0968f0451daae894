import errno
import struct
from typing import TYPE_CHECKING, cast

import pytest

from broker.supervisor.watches.process_connector import READS_A_TURN, ProcessConnector, parse_exits

if TYPE_CHECKING:
    import socket

EXIT, FORK = 0x80000000, 1


def message(what: int, pid: int, tgid: int, *, idx: int = 1, size: int = 76) -> bytes:
    """Return what the kernel says, as Linux 6 does: 76 bytes."""
    head = struct.pack("=IHHII", size, 3, 0, 7, 0)
    return head + struct.pack(
        "=IIIIHHIIQIIIIII", idx, 1, 7, 0, 40, 0, what, 0, 9, pid, tgid, *[0] * 4
    )


class FakeSocket:
    """Gives what it was given: (data, sender) or an error number."""

    def __init__(self, *items: tuple[bytes, int] | int) -> None:
        self._items = list(items)
        self.sent: list[bytes] = []
        self.is_closed = False

    def recvfrom(self, _size: int) -> tuple[bytes, tuple[int, int]]:
        if not self._items:
            raise BlockingIOError
        item = self._items.pop(0)
        if isinstance(item, int):
            raise OSError(item, "no")
        return item[0], (item[1], 1)

    @property
    def is_drained(self) -> bool:
        return not self._items

    def send(self, data: bytes) -> int:
        self.sent.append(data)
        return len(data)

    def close(self) -> None:
        self.is_closed = True


def connect(*items: tuple[bytes, int] | int) -> tuple[ProcessConnector, FakeSocket]:
    fake = FakeSocket(*items)
    return ProcessConnector(cast("socket.socket", fake)), fake


def test_exits_give_the_process_and_nothing_else_does() -> None:
    assert list(parse_exits(message(EXIT, 12, 10))) == [10]
    assert list(parse_exits(message(FORK, 12, 10))) == []
    assert list(parse_exits(message(EXIT, 12, 10, idx=2))) == []


def test_several_in_one_datagram_are_found() -> None:
    data = message(EXIT, 1, 1) + message(FORK, 2, 2) + message(EXIT, 4, 3)
    assert list(parse_exits(data)) == [1, 3]


@pytest.mark.parametrize("size", [0, 1, 15, 16, 59])
def test_what_is_cut_short_gives_nothing(size: int) -> None:
    assert list(parse_exits(message(EXIT, 1, 1)[:size])) == []


def test_a_length_of_nothing_ends_the_datagram() -> None:
    assert list(parse_exits(message(EXIT, 1, 1, size=0) + message(EXIT, 2, 2))) == [1]


def test_all_that_waits_is_read_but_not_for_ever() -> None:
    connector, _ = connect((message(EXIT, 1, 1), 0), (message(EXIT, 2, 2), 0))
    assert connector.read() == {1, 2}
    assert connector.read() == set()
    many = [(message(EXIT, n, n), 0) for n in range(READS_A_TURN + 5)]
    connector, _ = connect(*many)
    assert len(connector.read() or ()) == READS_A_TURN


def test_only_the_kernel_is_believed() -> None:
    connector, _ = connect((message(EXIT, 1, 1), 4711), (message(EXIT, 2, 2), 0))
    assert connector.read() == {2}


def test_what_was_dropped_may_be_anybodys() -> None:
    connector, _ = connect((message(EXIT, 1, 1), 0), errno.ENOMEM, (message(EXIT, 2, 2), 0))
    assert connector.read() is None
    assert connector.read() == {2}


def test_after_a_drop_all_is_read_before_anybody_looks() -> None:
    # Until then the kernel drops what comes, and does not say so again.
    rest = [(message(EXIT, n, n), 0) for n in range(3 * READS_A_TURN)]
    connector, fake = connect((message(EXIT, 1, 1), 0), errno.ENOBUFS, *rest)
    assert connector.read() is None
    assert fake.is_drained


def test_the_kernel_is_told_that_nobody_listens() -> None:
    connector, fake = connect()
    connector.close()
    (request,) = fake.sent
    assert len(request) == struct.unpack_from("=I", request)[0] == 40
    assert request.endswith(struct.pack("=I", 2))
    assert fake.is_closed
