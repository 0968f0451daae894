"""What a connection's reads cost its sandbox: those of its handshake, and those that end it."""

import contextlib
import gc
import os
import socket
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from broker.control_protocol.messages import (
    Connected,
    Ended,
    Event,
    Gone,
    Listener,
    SandboxLimits,
    SandboxSpec,
)
from broker.gate.dumps import Fds
from broker.gate.filter.chores import NAME_WORK, SLICE
from broker.gate.filter.costs import BYTES_A_MESSAGE
from broker.gate.filter.filter import Filter
from broker.gate.io.connect import OnConnected, UnixConnector
from broker.gate.io.loop import Loop
from broker.gate.io.slices import Sliced
from broker.gate.name_ledger import NameLedger
from broker.gate.sandbox.budgets import CONNECTION_COST
from broker.gate.sandbox.sandbox import LINGER_SECONDS, Sandbox
from broker.wire import marshal
from broker.wire.header import measure, parse_header
from broker.wire.interfaces import DRIVER
from policy.rules import Access, AccessList, Identity, Rule
from tests.helpers.messages import Message, access, driver_call, split
from tests.helpers.modelbus import ME, ModelBus, make_bus

RATE = 1000
AUTH = b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n"
BROKEN = b"?" * (20 * BYTES_A_MESSAGE)  # no byte order is called so


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FarBus(UnixConnector):
    """Connects to a bus whose end of each connection a test has."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []

    def connect(self, loop: Loop, address: str, uid: int, done: OnConnected) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.ends.append(theirs)
        done(ours)


class World:
    """A sandbox with one connection, in a loop whose time stands still."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.loop = Loop(self.clock)
        path = folder / "app"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        spec = SandboxSpec(
            id="c0",
            identity=Identity(type="org.example.Type", app="org.example.App"),
            uid=os.getuid(),
            listeners=(Listener(bus="session", fd=0),),
            access=AccessList(),
            limits=SandboxLimits(messages_per_second=RATE),
        )
        self.bus = make_bus()
        self.far = FarBus()
        buses = {"session": self.bus}
        self.events: list[Event] = []
        self.sandbox = Sandbox(
            self.loop, spec, buses, self.events.append, lambda _sandbox: None, self.far
        )
        # No tick of the real clock is to put anything in, or to be charged.
        self.sandbox.messages.clock = self.clock  # type: ignore[misc]
        self.sandbox.messages._filled = self.clock.now
        self.sandbox.open([listener.detach()])
        self.app = socket.socket(socket.AF_UNIX)
        self.app.connect(str(path))
        self.app.setblocking(False)
        self.turn()

    def turn(self, seconds: float = 0.0, times: int = 3) -> None:
        for _ in range(times):
            self.clock.now += seconds
            self.loop.call_later(0, self.loop.stop)
            self.loop._running = True
            self.loop.run()

    def say(self, data: bytes) -> int:
        """Have the app send that; return what it was charged."""
        before = self.sandbox.messages.left
        self.app.send(data)
        self.turn()
        return before - self.sandbox.messages.left

    def is_open(self) -> bool:
        return bool(self.sandbox.connections)

    def let_in(self) -> None:
        """Have the bus answer the gate's handshake."""
        (end,) = self.far.ends
        end.send(b"OK " + b"0" * 32 + b"\r\nAGREE_UNIX_FD\r\n")
        self.turn()

    def be_called(self, unique_name: str) -> socket.socket:
        """Say Hello, and have the bus answer; return its end."""
        self.say(AUTH + b"BEGIN\r\n" + driver_call(1, "Hello"))
        self.let_in()
        (end,) = self.far.ends
        reply = marshal.make_return(
            1,
            reply_serial=1,
            destination=unique_name,
            sender=DRIVER,
            signature="s",
            values=(unique_name,),
        )
        end.send(reply)
        self.turn()
        return end

    def close(self) -> None:
        self.sandbox.stop("over")
        self.sandbox.abandon()
        self.loop.close()
        for sock in (self.app, *self.far.ends):
            sock.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def test_each_read_of_a_handshake_costs(world: World) -> None:
    assert world.sandbox.messages.left == RATE - CONNECTION_COST
    assert [world.say(bytes((byte,))) for byte in AUTH] == [1] * len(AUTH)
    assert world.app.recv(100).startswith(b"OK ")


def test_handshake_waits_for_the_budget(world: World) -> None:
    world.sandbox.messages.left = 0
    assert world.say(AUTH[:1]) == 1
    assert world.sandbox._throttle.is_throttled
    assert world.say(AUTH[1:]) == 0
    with pytest.raises(BlockingIOError):
        world.app.recv(100)
    world.turn(0.1)
    assert world.app.recv(100).startswith(b"OK ")
    assert world.is_open()


def test_handshake_of_many_lines_is_the_end(world: World) -> None:
    world.say(b"\0" + b"\r\n" * 100)
    assert not world.is_open()


def test_message_that_ends_the_connection_is_charged(world: World) -> None:
    world.say(AUTH + b"BEGIN\r\n")
    world.let_in()
    assert world.is_open()
    assert world.say(BROKEN) >= len(BROKEN) // BYTES_A_MESSAGE
    assert not world.is_open()


def test_message_that_came_with_the_handshake_is_charged(world: World) -> None:
    world.say(AUTH + b"BEGIN\r\n" + BROKEN)
    before = world.sandbox.messages.left
    world.let_in()
    assert not world.is_open()
    assert before - world.sandbox.messages.left >= len(BROKEN) // BYTES_A_MESSAGE


# -- an app that leaves: its connection lingers until the bus lets go of it -------------------------------


def read_to_the_end(end: socket.socket) -> None:
    end.settimeout(5)
    while end.recv(65536):
        pass


def test_app_that_leaves_stays_known_until_the_bus_hangs_up(world: World) -> None:
    end = world.be_called(":1.7")
    world.app.close()
    world.turn()
    read_to_the_end(end)  # the bus gets the end of the file
    assert not world.sandbox.connections
    assert world.bus.who(":1.7") == "c0"
    use, state = world.sandbox.usage(), world.sandbox.state()
    assert (use.connections, use.lingering, state.opening) == (1, 1, 0)
    assert state.connections == (("session", ":1.7"),)
    assert world.events == [Connected("c0", "session", ":1.7")]
    end.close()
    world.turn()
    assert world.events[1:] == [Gone("c0", "session", ":1.7")]
    assert world.sandbox.usage().connections == 0
    assert world.bus.who(":1.7") == "c0"  # its messages may come


def test_sandbox_is_over_when_the_bus_has_let_go(world: World) -> None:
    end = world.be_called(":1.7")
    world.sandbox.stop("stopped")
    world.sandbox.stop("again")
    world.turn()
    assert len(world.events) == 1
    end.close()
    world.turn()
    assert world.sandbox.is_over
    assert world.events[1:] == [Gone("c0", "session", ":1.7"), Ended("c0", "stopped")]


def test_bus_that_does_not_let_go_is_not_waited_for(world: World) -> None:
    end = world.be_called(":1.7")
    world.sandbox.stop("stopped")
    world.turn(LINGER_SECONDS)
    assert world.sandbox.is_over
    assert world.events[1:] == [Ended("c0", "stopped")]
    assert world.bus.who(":1.7") == "c0"
    end.close()
    world.turn()
    assert world.events[2:] == [Gone("c0", "session", ":1.7")]


def test_last_connection_is_the_last_when_the_bus_has_let_go(world: World) -> None:
    end = world.be_called(":1.7")
    world.sandbox.stop_listening()
    world.app.close()
    world.turn()
    assert not world.sandbox.is_over
    end.close()
    world.turn()
    assert world.events[-1] == Ended("c0", "last-connection")


def test_connection_without_a_name_does_not_linger(world: World) -> None:
    world.say(AUTH + b"BEGIN\r\n" + driver_call(1, "Hello"))
    world.let_in()
    world.app.close()
    world.turn()
    assert world.sandbox.usage().connections == 0
    assert not world.bus.lingering


def test_name_that_cannot_be_written_down_is_not_used(world: World, tmp_path: Path) -> None:
    world.bus.authenticated("0" * 32)
    assert isinstance(world.bus.ledger, NameLedger)
    world.bus.ledger._path = tmp_path / "missing" / "file"
    world.be_called(":1.7")
    assert not world.is_open()
    assert not any(isinstance(event, Connected) for event in world.events)


MANY = 3000


# Turns of the loop that are many more than anything here takes.
MOST_TURNS = 10_000


class Served:
    """A link with a bus that has many names."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.model = ModelBus({f"org.n{n}": f":1.{n // 4 + 10}" for n in range(MANY)})
        self.end = world.be_called(ME)
        self.end.setblocking(False)
        _hello, *messages = split(self.end.recv(65536).partition(b"BEGIN\r\n")[2])
        self._rest = b"".join(messages)
        (link,) = world.sandbox.connections
        assert isinstance(link.filter, Filter)
        self.link, self.judging = link, link.filter

    def follow_all(self) -> None:
        """Set rules that follow all names, and wait until their owners are known."""
        ended, judging = self.set_access("send:org.n*"), self.judging
        self.go_on(lambda: ended and judging.followed_names == MANY and not judging._owners.waiting)

    def has_seen(self, serial: int) -> bool:
        """Say whether the bus got this call; on a slow machine questions of the meter come behind it."""
        return any(message.header.serial == serial for message in self.model.seen)

    def go_on(self, until: Callable[[], object]) -> None:
        for _ in range(MOST_TURNS):
            if until():
                return
            with contextlib.suppress(BlockingIOError):
                self._rest += self.end.recv(65536)
            while len(self._rest) >= 16 and len(self._rest) >= (size := measure(self._rest, 0)):
                (message,), self._rest = split(self._rest[:size]), self._rest[size:]
                got = Message(header=parse_header(message), raw=message, fds=())
                if answer := self.model.handle(got):
                    self.end.setblocking(True)
                    self.end.sendall(answer)
                    self.end.setblocking(False)
            self.world.turn(1.0, times=1)
        pytest.fail(f"not in {MOST_TURNS} turns")

    def set_access(self, *rules: str) -> list[object]:
        ended: list[object] = []
        work = self.world.sandbox.set_access(access(*rules))
        Sliced(self.world.loop, work, ended.append).begin(lambda: None)
        return ended


def test_attack_c4_rules_are_in_force_at_once_and_done_when_the_app_has_been_told(
    world: World,
) -> None:
    served = Served(world)
    link, judging = served.link, served.judging
    served.follow_all()
    ended = served.set_access("send:org.n*0")
    world.turn(times=1)
    assert judging.state.chores
    assert judging.state.judge.access == access("send:org.n*0")
    turns = 0
    world.app.send(driver_call(5, "GetId"))
    served.end.send(served.model.owner_changed("org.n1", ":1.10", ":1.11"))
    while not ended:
        # Of what either side sends nothing is read as long as it takes.
        assert not served.has_seen(5)
        assert judging.bus_is_clear is not judging.is_changing
        world.turn(times=1)
        turns += 1
    assert turns > MANY * NAME_WORK // SLICE
    served.go_on(lambda: served.has_seen(5))
    assert link in world.sandbox.connections


def test_a_connection_that_ends_while_its_rules_change_holds_nobody(world: World) -> None:
    served = Served(world)
    served.follow_all()
    ended = served.set_access("send:org.n*0")
    served.link.close("test")
    world.turn(times=20)
    assert ended == [None]


def test_what_takes_long_is_done_before_a_connection_is_handed_over(world: World) -> None:
    served = Served(world)
    link, judging = served.link, served.judging
    served.follow_all()
    served.set_access("send:org.n*0")
    world.sandbox.settle()
    assert not judging.state.chores
    assert not judging.is_changing
    fds = Fds()
    link.dump(fds)


def hand_over_rules(world: World) -> AccessList:
    """Load the sandbox as after a hand-over: with many rules, and no connection that needed them."""
    rules = access(*(f"send:@/org/x{n}/**/y*z" for n in range(1000)))
    world.sandbox.spec = msgspec.structs.replace(world.sandbox.spec, access=rules)
    world.sandbox._judges = {}
    return rules


def test_attack_c4_rules_that_were_handed_over_are_compiled_in_turns(world: World) -> None:
    rules = hand_over_rules(world)
    world.app.send(AUTH + b"BEGIN\r\n" + driver_call(1, "Hello"))
    turns = 0
    while not world.far.ends:  # no connection is made before
        world.turn(times=1)
        turns += 1
    assert turns > 5
    world.let_in()
    (link,) = world.sandbox.connections
    assert link.filter is not None
    assert link.filter.state.judge.access is rules
    assert len(world.far.ends) == 1


def test_rules_that_are_set_meanwhile_are_those_in_force(world: World) -> None:
    hand_over_rules(world)
    world.app.send(AUTH + b"BEGIN\r\n" + driver_call(1, "Hello"))
    world.turn(times=2)
    assert not world.far.ends
    ended: list[object] = []
    newer = access("send:org.x")
    Sliced(world.loop, world.sandbox.set_access(newer), ended.append).begin(lambda: None)
    assert ended == [None]
    world.turn(times=40)
    world.let_in()
    (link,) = world.sandbox.connections
    assert link.filter is not None
    assert link.filter.state.judge.access is newer
    assert world.sandbox.judge("session").access is newer


def test_handed_over_rules_that_are_not_understood_end_who_waits_for_them(world: World) -> None:
    bad = AccessList(rules=(Rule(access=frozenset({Access.SEND}), path="/[z-a]"),))
    world.sandbox.spec = msgspec.structs.replace(world.sandbox.spec, access=bad)
    world.sandbox._judges = {}
    world.app.send(AUTH + b"BEGIN\r\n" + driver_call(1, "Hello"))
    world.turn(times=3)
    assert not world.is_open()
    assert world.sandbox.is_listening


def test_an_ended_sandbox_does_not_wait_for_the_garbage_collector(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.app.close()
    world.turn()
    world.sandbox.stop("test")
    world.turn()
    assert world.sandbox.is_over
    gone = weakref.ref(world.sandbox)
    gc.collect()
    gc.disable()
    try:
        del world.sandbox
        assert gone() is None
    finally:
        gc.enable()
