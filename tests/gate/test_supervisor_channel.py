"""The control socket of a gate, without the gate: who is accepted, in which order requests are handed over, and what is
kept for the next supervisor."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.control_protocol.framing import FrameReader, make_frame
from broker.control_protocol.messages import (
    Confirm,
    Connected,
    Done,
    Ended,
    Envelope,
    TakeListeners,
)
from broker.gate import supervisor_channel
from broker.gate.dumps import Fds
from broker.gate.io.loop import Loop
from broker.gate.supervisor_channel import SupervisorChannel


class World:
    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "control")
        self.loop = Loop()
        self.requests: list[tuple[int, list[int]]] = []
        self.losses = 0
        self.channel = self.make()
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(self.path)
        listening.listen()
        self.listening = listening
        self.channel.serve(listening)
        self.socks: list[socket.socket] = []

    def make(self) -> SupervisorChannel:
        return SupervisorChannel(self.loop, self.on_request, self.on_lost)

    def on_request(self, envelope: Envelope, fds: list[int]) -> None:
        self.channel.confirm(envelope.number)
        self.requests.append((envelope.serial, fds))

    def on_lost(self) -> None:
        self.losses += 1

    def turn(self) -> None:
        for _ in range(3):
            self.loop.call_later(0, self.loop.stop)
            self.loop._running = True
            self.loop.run()

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        self.socks.append(sock)
        sock.settimeout(5)
        sock.connect(self.path)
        self.turn()
        return sock

    def close(self) -> None:
        self.channel.lose("over")
        for sock in (self.listening, *self.socks):
            sock.close()
        self.loop.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def ask(serial: int, number: int = 0, fds: int = 0) -> bytes:
    return make_frame(Envelope(serial=serial, body=Confirm(), number=number, fds=fds))


def read(sock: socket.socket) -> list[Envelope]:
    return [envelope for envelope, _ in FrameReader().feed(sock.recv(1 << 20))]


def test_second_supervisor_is_refused(world: World) -> None:
    first, second = world.connect(), world.connect()
    assert second.recv(1) == b""
    first.send(ask(1))
    world.turn()
    assert world.requests == [(1, [])]


def test_another_user_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_channel, "peer_uid", lambda _sock: os.geteuid() + 1)
    assert world.connect().recv(1) == b""
    assert world.channel.connection is None


def test_requests_behind_a_long_one_wait(world: World) -> None:
    sock = world.connect()
    world.channel.is_busy = True
    sock.send(ask(1) + ask(2))
    world.turn()
    assert world.requests == []
    world.channel.is_busy = False
    world.channel.serve_requests()
    assert [serial for serial, _ in world.requests] == [1, 2]


def test_descriptors_of_requests_that_nobody_looked_at_are_closed(world: World) -> None:
    sock = world.connect()
    world.channel.is_busy = True
    ours, theirs = os.pipe()
    socket.send_fds(sock, [ask(1, fds=1)], [theirs])
    os.close(theirs)
    world.turn()
    sock.close()
    world.turn()
    assert world.losses == 1
    assert os.read(ours, 1) == b""
    os.close(ours)


def test_events_that_no_snapshot_tells_are_kept_until_they_are_confirmed(world: World) -> None:
    world.channel.emit(Connected("c1", "session", ":1.5"))
    world.channel.emit(Ended("c1", "stopped"))
    first = world.connect()
    (event,) = read(first)
    assert (event.body, event.number) == (Ended("c1", "stopped"), 1)
    first.close()
    world.turn()
    second = world.connect()
    assert read(second) == [event]
    second.send(ask(1, number=1))
    world.turn()
    second.close()
    world.turn()
    world.connect()
    world.channel.answer(9, Done())
    assert [envelope.serial for envelope in read(world.socks[-1])] == [9]


def test_answer_that_nobody_reads_has_its_descriptors_closed(world: World) -> None:
    ours, theirs = os.pipe()
    world.channel.answer(1, Done(), [theirs])
    assert os.read(ours, 1) == b""
    os.close(ours)


def test_supervisor_that_does_not_read_is_cut_off_unless_it_asked_for_much(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_channel, "MAX_UNREAD", 100_000)
    world.connect()
    world.channel._bound_unread()
    much = Ended("c1", "x" * 1_000_000)
    with world.channel.without_bound():
        world.channel.emit(much)
    assert world.losses == 0
    world.channel.emit(much)
    assert world.losses == 1


def test_another_channel_goes_on_in_the_middle_of_a_frame(world: World) -> None:
    sock = world.connect()
    world.channel.is_busy = True
    late = make_frame(Envelope(serial=3, body=TakeListeners(("c1",))))
    sock.send(ask(1) + ask(2) + late[:9])
    world.turn()
    fds = Fds()
    dump = world.channel.dump(fds)
    copies = [os.dup(fd) for fd in fds.all]
    before = world.channel
    world.channel = world.make()
    world.channel.load(dump, copies)
    again = Fds()
    assert world.channel.dump(again) == dump
    assert again.all == copies
    world.channel.serve_requests()
    sock.send(late[9:])
    world.loop.remove(world.listening.fileno())
    assert before.connection is not None
    world.loop.remove(before.connection.fd)
    world.turn()
    assert [serial for serial, _ in world.requests] == [1, 2, 3]
    before.connection.sock.close()
    assert world.channel._listening is not None
    world.loop.remove(world.channel._listening.fileno())
    world.channel._listening.close()
