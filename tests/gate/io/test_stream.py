"""Pipes over a socketpair: order, queueing, descriptors."""

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from broker.gate.io.loop import Loop
from broker.gate.io.stream import SocketStream, StreamClosedError
from broker.gate.output import Chunk
from broker.posix.descriptors import close_fds


class Ends:
    """A pipe in a loop, and the other end of its socket."""

    def __init__(self) -> None:
        self.loop = Loop()
        ours, self.theirs = socket.socketpair()
        ours.setblocking(False)
        self.theirs.setblocking(False)
        self.read: list[bytes] = []
        self.drained = 0
        self.pipe = SocketStream(self.loop, ours, self._readable, self._drained)

    def _readable(self) -> None:
        try:
            self.read.append(self.pipe.read()[0])
        except StreamClosedError:
            self.read.append(b"")

    def _drained(self) -> None:
        self.drained += 1

    def turn(self) -> None:
        """Let the loop look once."""
        self.loop.call_later(0, self.loop.stop)
        self.loop._running = True
        self.loop.run()

    def take(self) -> bytes:
        """Read all that the pipe has sent."""
        data = b""
        while True:
            try:
                data += self.theirs.recv(1 << 20)
            except BlockingIOError:
                return data

    def close(self) -> None:
        self.pipe.close()
        self.theirs.close()
        self.loop.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def test_what_fits_is_sent_at_once(ends: Ends) -> None:
    ends.pipe.write([b"one"])
    assert ends.theirs.recv(10) == b"one"
    assert not ends.pipe.queued


def test_what_is_not_taken_waits_and_comes_in_order(ends: Ends) -> None:
    big = bytes(range(256)) * 20_000
    ends.pipe.write([big])
    ends.pipe.write([b"two", b"three"])
    assert ends.pipe.queued
    received = b""
    for _ in range(1000):
        received += ends.take()
        if not ends.pipe.queued:
            break
        ends.turn()
    received += ends.take()
    assert received == big + b"twothree"
    assert ends.drained == 1


def test_who_has_more_than_one_message_waiting_is_behind(ends: Ends) -> None:
    was_behind = []
    for data in (b"x" * 4_000_000, b"two"):
        ends.pipe.write([data])
        was_behind.append(ends.pipe.is_behind)
    while ends.pipe.queued:
        ends.take()
        ends.turn()
    assert [*was_behind, ends.pipe.is_behind] == [False, True, False]


def test_who_is_sent_much_at_once_is_behind_unless_it_is_one_message(ends: Ends) -> None:
    ends.pipe.write([b"one", b"x" * 4_000_000])
    assert not ends.pipe.is_behind  # the first one is taken
    while ends.pipe.queued:
        ends.take()
        ends.turn()
    ends.pipe.write([b"x" * 1_000_000] * 4)
    assert ends.pipe.is_behind


def test_descriptors_arrive_with_the_first_byte_of_their_message(ends: Ends) -> None:
    reading, writing = os.pipe()
    ends.pipe.write([b"before", Chunk(b"message", (reading,)), b"after"])
    data, fds, _, _ = socket.recv_fds(ends.theirs, 100, 10)
    # The kernel may put what was sent before in front; it never puts anything behind.
    assert data.endswith(b"message")
    os.write(writing, b"x")
    assert os.read(fds[0], 1) == b"x"
    assert ends.take() == b"after"
    close_fds([*fds, writing])


def test_descriptors_are_closed_once_sent(ends: Ends) -> None:
    reading, writing = os.pipe()
    ends.pipe.write([Chunk(b"message", (reading,))])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reading)
    _, fds, _, _ = socket.recv_fds(ends.theirs, 100, 10)
    close_fds([*fds, writing])


def test_closing_closes_descriptors_that_still_wait(ends: Ends) -> None:
    reading, writing = os.pipe()
    ends.pipe.write([b"x" * (1 << 22)])
    ends.pipe.write([Chunk(b"message", (reading,))])
    ends.pipe.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reading)
    os.close(writing)


def test_a_paused_pipe_does_not_read(ends: Ends) -> None:
    ends.pipe.pause(reading=False)
    ends.theirs.send(b"late")
    ends.turn()
    assert not ends.read
    ends.pipe.pause(reading=True)
    ends.turn()
    assert ends.read == [b"late"]


def test_end_of_file_is_told_as_closed(ends: Ends) -> None:
    ends.theirs.close()
    ends.turn()
    assert ends.read == [b""]


def test_writing_to_nobody_is_lost_and_what_it_sent_is_read(ends: Ends) -> None:
    ends.theirs.send(b"last words")
    ends.theirs.close()
    ends.pipe.write([b"x"])
    reading, writing = os.pipe()
    ends.pipe.write([b"x", Chunk(b"y", (reading,))])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reading)
    os.close(writing)
    assert (ends.pipe.queued, ends.pipe.queued_fds) == (0, 0)
    ends.turn()
    ends.turn()
    assert ends.read == [b"last words", b""]


def test_who_hangs_up_while_it_is_paused_is_read_later(ends: Ends) -> None:
    ends.pipe.pause(reading=False)
    ends.theirs.send(b"last words")
    ends.theirs.close()
    for _ in range(3):
        ends.turn()
    assert not ends.read
    ends.pipe.write([b"x"])
    ends.pipe.pause(reading=True)
    ends.turn()
    ends.turn()
    assert ends.read == [b"last words", b""]


def test_other_failures_to_write_are_told_as_closed(ends: Ends) -> None:
    with pytest.raises(StreamClosedError):
        ends.pipe.write([b"x", Chunk(b"y", (1 << 20,))])  # no such descriptor


def test_who_reads_gets_all_before_the_end(ends: Ends) -> None:
    big = bytes(range(256)) * 20_000
    ends.pipe.write([big])
    ends.theirs.setblocking(True)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(ends.theirs.recv, len(big), socket.MSG_WAITALL)
        ends.pipe.drain(30)
        assert not ends.pipe.queued
        assert taken.result() == big


def test_who_does_not_read_is_not_waited_for(ends: Ends) -> None:
    ends.pipe.write([bytes(5_000_000)])
    ends.pipe.drain(0.01)
    assert ends.pipe.queued


def test_who_hung_up_is_not_waited_for(ends: Ends) -> None:
    ends.pipe.write([bytes(5_000_000)])
    ends.theirs.close()
    begun = time.monotonic()
    ends.pipe.drain(30)
    assert time.monotonic() - begun < 30
    assert not ends.pipe.queued
