"""The beginning of a connection, without a sandbox: what its owner is told, and what is repeated after a hand-over."""

import os
import socket
from collections.abc import Iterator

import pytest

from broker.gate.dumps import Fds
from broker.gate.io.connect import OnConnected
from broker.gate.io.loop import Loop
from broker.gate.io.stream import SocketStream
from broker.gate.sandbox.handshake import BusUnreachableError, Established, Handshake
from broker.wire.errors import PeerProtocolError
from broker.wire.sasl import AuthClient, SaslClient, SaslServer

AUTH = b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\nNEGOTIATE_UNIX_FD\r\n"
OK = b"OK " + b"7" * 32 + b"\r\n"
SECONDS = 30


class Owner:
    """A connection that notes what it is told."""

    def __init__(self) -> None:
        self.reads = self.authenticated = 0
        self.is_throttled = False
        self.both: list[Established] = []
        self.errors: list[Exception] = []

    def charge_read(self) -> bool:
        self.reads += 1
        return self.is_throttled

    def app_authenticated(self) -> None:
        self.authenticated += 1

    def established(self, both: Established) -> None:
        self.both.append(both)

    def bus_drained(self) -> None: ...

    def failed(self, exc: Exception) -> None:
        if not isinstance(exc, BlockingIOError):
            self.errors.append(exc)


class Pair:
    """A connector whose bus is the other end of a pair of sockets."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []
        self.is_there = True

    def connect(self, _loop: Loop, _address: str, _uid: int, done: OnConnected) -> None:
        if not self.is_there:
            done(None)
            return
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        self.ends.append(theirs)
        done(ours)

    def make_client(self, _sock: socket.socket, uid: int) -> AuthClient:
        return SaslClient(uid)


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.loop = Loop(lambda: self.now)
        self.app, gate_end = socket.socketpair()
        gate_end.setblocking(False)
        self.owner = Owner()
        self.pair = Pair()
        self.stream = SocketStream(self.loop, gate_end, lambda: None, lambda: None)
        self.handshake = self.make()

    def make(self) -> Handshake:
        server = SaslServer("0" * 32, takes_fds=True)
        return Handshake(
            self.loop, self.stream, self.owner, server, uid=os.getuid(), seconds=SECONDS
        )

    def turn(self) -> None:
        for _ in range(3):
            self.loop.call_later(0, self.loop.stop)
            self.loop._running = True
            self.loop.run()

    def say(self, data: bytes) -> None:
        self.app.send(data)
        self.turn()

    def connect(self) -> None:
        self.handshake.connect(self.pair, "unix:path=/nowhere")

    def close(self) -> None:
        self.handshake.close()
        for both in self.owner.both:
            both.bus_side.close()
        self.stream.close()
        for sock in (self.app, *self.pair.ends):
            sock.close()
        self.loop.close()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def test_first_messages_of_both_sides_come_with_the_streams(world: World) -> None:
    world.say(AUTH + b"BEGIN\r\nhello")
    assert (world.owner.authenticated, world.owner.reads) == (1, 1)
    waits = [world.handshake.waits_for_connect]
    world.connect()
    assert [*waits, world.handshake.waits_for_connect] == [True, False]
    (bus,) = world.pair.ends
    bus.send(OK + b"AGREE_UNIX_FD\r\nwelcome")
    world.turn()
    (both,) = world.owner.both
    assert (both.from_app, both.from_bus) == (b"hello", b"welcome")
    assert (both.takes_fds, both.bus_id) == (True, "7" * 32)
    assert (world.handshake.app_said, world.handshake.bus_said) == (b"", b"")
    assert world.handshake.deadline is not None
    world.handshake.cancel_deadline()
    world.now += SECONDS
    world.turn()
    assert not world.owner.errors


def test_descriptors_are_passed_only_if_both_sides_agree(world: World) -> None:
    world.say(AUTH + b"BEGIN\r\n")
    world.connect()
    world.pair.ends[0].send(OK + b"ERROR\r\n")
    world.turn()
    assert [both.takes_fds for both in world.owner.both] == [False]


def test_nothing_behind_begin_is_read_before_the_bus_is_there(world: World) -> None:
    world.say(AUTH + b"BEGIN\r\n")
    world.say(b"a message")
    assert world.owner.reads == 1


def test_who_is_throttled_is_read_again_when_the_owner_says_so(world: World) -> None:
    world.owner.is_throttled = True
    world.say(AUTH)
    world.say(b"BEGIN\r\n")
    assert (world.owner.reads, world.owner.authenticated) == (1, 0)
    world.handshake.read_on()
    world.turn()
    assert (world.owner.reads, world.owner.authenticated) == (2, 1)


@pytest.mark.parametrize(
    ("seconds", "is_late"), [(SECONDS - 0.5, False), (SECONDS, True), (SECONDS + 1, True)]
)
def test_hello_has_a_deadline(world: World, seconds: float, is_late: bool) -> None:
    world.now += seconds
    world.turn()
    assert [str(exc) for exc in world.owner.errors] == [
        "no Hello in handshake_seconds=30"
    ] * is_late


def test_descriptors_during_authentication_are_refused(world: World) -> None:
    socket.send_fds(world.app, [b"\0"], [world.app.fileno()])
    world.turn()
    (error,) = world.owner.errors
    assert isinstance(error, PeerProtocolError)


def test_bus_that_cannot_be_reached_is_an_error_of_its_own(world: World) -> None:
    world.pair.is_there = False
    world.say(AUTH + b"BEGIN\r\n")
    world.connect()
    assert [type(exc) for exc in world.owner.errors] == [BusUnreachableError]


def test_second_connection_to_the_bus_is_closed(world: World) -> None:
    world.say(AUTH + b"BEGIN\r\n")
    world.connect()
    world.connect()
    assert world.pair.ends[1].recv(1) == b""


def test_connection_that_comes_after_the_end_is_closed(world: World) -> None:
    world.say(AUTH + b"BEGIN\r\n")
    world.handshake.close()
    world.connect()
    assert world.pair.ends[0].recv(1) == b""


def test_another_handshake_goes_on_after_repeating_what_was_said(world: World) -> None:
    world.say(AUTH + b"BEGIN\r\nhello")
    world.connect()
    world.pair.ends[0].send(OK[:20])
    world.turn()
    fds = Fds()
    dump = world.handshake.dump_bus_side(fds)
    assert dump is not None
    before, copies = world.handshake, [os.dup(fd) for fd in fds.all]
    world.handshake = world.make()
    world.handshake.load(before.app_said, dump, before.bus_said, copies)
    world.handshake.load_deadline(before.deadline)
    before.close()
    world.pair.ends[0].send(OK[20:] + b"AGREE_UNIX_FD\r\n")
    world.turn()
    (both,) = world.owner.both
    assert (both.from_app, both.takes_fds) == (b"hello", True)
    assert world.handshake.deadline == 100.0 + SECONDS
