"""A lingering connection is read to its end, without a deadline, and told then."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.gate.dumps import Fds, LingeringDump
from broker.gate.io.loop import Loop
from broker.gate.sandbox.lingering import LingeringConnection


class World:
    """The gate's side of a connection to a bus, and the bus's."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.sock, self.bus = socket.socketpair()
        self.sock.setblocking(False)
        self.ended: list[LingeringConnection] = []

    def linger(self) -> LingeringConnection:
        return LingeringConnection(self.loop, "session", ":1.5", self.sock, self.ended.append)

    def turn(self) -> None:
        for _ in range(3):
            self.loop._running = True
            self.loop.call_later(0, self.loop.stop)
            self.loop.run()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.bus.close()
    made.sock.close()
    made.loop.close()


def test_the_bus_reads_what_was_sent_and_then_the_end(world: World) -> None:
    world.sock.send(b"last words")
    world.linger()
    assert world.bus.recv(100) == b"last words"
    assert world.bus.recv(100) == b""
    world.turn()
    assert not world.ended


def test_it_ends_when_the_bus_hangs_up(world: World) -> None:
    rest = world.linger()
    world.bus.close()
    world.turn()
    assert world.ended == [rest]
    assert world.sock.fileno() == -1
    rest.close()
    assert world.ended == [rest]


def test_what_the_bus_sends_is_thrown_away_with_its_descriptors(world: World) -> None:
    world.linger()
    before = len(list(Path("/proc/self/fd").iterdir()))
    read, write = os.pipe()
    for _ in range(50):
        socket.send_fds(world.bus, [b"x" * 4000], [read, write])
        world.turn()
    os.close(read)
    os.close(write)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not world.ended


def test_a_bus_that_is_gone_already(world: World) -> None:
    world.sock.send(b"unread")
    world.bus.close()
    rest = world.linger()
    world.turn()
    assert world.ended == [rest]


def test_it_is_handed_over_with_its_socket(world: World) -> None:
    rest, fds = world.linger(), Fds()
    assert rest.dump(fds) == LingeringDump(bus="session", unique_name=":1.5", fd=0)
    assert fds.all == [world.sock.fileno()]
