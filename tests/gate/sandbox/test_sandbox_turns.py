"""A sandbox that has used up its budget of messages: who waits goes on in turns, and what is large at a stretch."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker.control_protocol.messages import Listener, SandboxLimits, SandboxSpec
from broker.gate.io.loop import Loop
from broker.gate.sandbox.budgets import CONNECTION_COST
from broker.gate.sandbox.sandbox import Sandbox
from policy.rules import AccessList, Identity

RATE = 1000


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class World:
    """A sandbox that listens on a socket, in a loop whose time stands still."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.loop = Loop(self.clock)
        self.path = folder / "app"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen(64)
        spec = SandboxSpec(
            id="c0",
            identity=Identity(type="org.example.Type", app="org.example.App"),
            uid=os.getuid() + 1,  # each connection is closed at once, and counts all the same
            listeners=(Listener(bus="session", fd=0),),
            access=AccessList(),
            limits=SandboxLimits(messages_per_second=RATE),
        )
        self.sandbox = Sandbox(self.loop, spec, {}, lambda _event: None, lambda _sandbox: None)
        # No tick of the real clock is to put anything in.
        self.sandbox.messages.clock = self.clock  # type: ignore[misc]
        self.sandbox.messages._filled = self.clock.now
        self.sandbox.open([listener.detach()])
        self.went: list[str] = []

    def turn(self, seconds: float = 0.0) -> None:
        """Let time pass, then have the loop do what is due, and one turn more."""
        self.clock.now += seconds
        self.loop.call_later(0, self.loop.stop)
        self.loop._running = True
        self.loop.run()

    def reader(self, name: str, cost: int, *, goes_first: bool = False) -> Callable[[], None]:
        """Return what a connection does when it may go on: it is read once, and charged for it."""

        def go_on() -> None:
            self.went.append(name)
            self.sandbox.charge(cost, go_on, goes_first=goes_first)

        return go_on


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.sandbox.stop("over")
    world.loop.close()


def test_who_is_within_the_budget_is_read_on(world: World) -> None:
    assert not world.sandbox.charge(RATE, lambda: None)
    assert not world.sandbox._throttle.is_throttled


def test_who_waits_goes_on_in_turns(world: World) -> None:
    a, b, c = (world.reader(name, 10) for name in "abc")
    assert world.sandbox.charge(RATE + 1, a)
    assert world.sandbox.charge(0, b)
    assert world.sandbox.charge(0, c)
    world.turn(0.001)
    assert world.went == []
    for _ in range(60):
        world.turn(0.005)
    assert world.went[:6] == list("abcabc")
    assert max(map(world.went.count, "abc")) - min(map(world.went.count, "abc")) <= 1
    assert len(world.went) <= 0.301 * RATE / 10 + 1


def test_who_is_in_the_middle_of_a_message_goes_first(world: World) -> None:
    large, other = world.reader("large", 10, goes_first=True), world.reader("other", 10)
    world.sandbox.charge(RATE + 1, other)
    world.sandbox.charge(0, large, goes_first=True)
    for _ in range(20):
        world.turn(0.01)
    assert set(world.went) == {"large"}


def test_nobody_waits_any_more_when_nobody_sends(world: World) -> None:
    world.sandbox.charge(RATE + 1, lambda: world.went.append("a"))
    for _ in range(4):
        world.turn(0.01)
    assert world.went == ["a"]
    assert not world.sandbox._throttle.is_throttled


def test_who_left_is_not_called(world: World) -> None:
    world.sandbox.charge(RATE + 1, world.reader("a", 1))
    world.sandbox.stop("over")
    world.turn(1)
    assert world.went == []


def test_connections_beyond_the_budget_wait_and_are_taken_later(world: World) -> None:
    def knock() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(world.path))
        sock.setblocking(False)
        return sock

    def closed(sock: socket.socket) -> bool:
        try:
            return sock.recv(1) == b""
        except BlockingIOError:
            return False

    knocking = [knock() for _ in range(2 * RATE // CONNECTION_COST)]
    for _ in range(3):
        world.turn()
    taken = sum(map(closed, knocking))
    assert taken == RATE // CONNECTION_COST + 1
    for _ in range(200):
        world.turn(0.01)
    assert all(map(closed, knocking))
    for sock in knocking:
        sock.close()
