import array
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from broker.control_protocol.framing import FrameReader, make_frame
from broker.control_protocol.messages import (
    AddSandbox,
    Connected,
    Done,
    Ended,
    Envelope,
    Event,
    Listeners,
    SandboxOf,
    SandboxSpec,
    Snapshot,
    StopSandbox,
    TakeListeners,
    TakeSnapshot,
    WhoIs,
)
from broker.engines.base import EngineLostError
from broker.engines.control_connection import ControlConnection, connect
from broker.wire.errors import NOT_CONTAINER, CallRefusedError
from tests.helpers.fake_gate import FakeGate
from tests.helpers.records import make_record, make_snapshot, make_state

SPEC = make_state(make_record()).spec


class Told:
    """Keeps what a listener is told, in order."""

    def __init__(self) -> None:
        self.order: list[Event | Snapshot] = []

    def take_event(self, event: Event) -> None:
        self.order.append(event)

    def take_snapshot(self, snapshot: Snapshot) -> None:
        self.order.append(snapshot)

    def missing(self) -> list[tuple[SandboxSpec, Sequence[int]]]:
        return []

    def instance_field_wishes(self) -> list[tuple[str, str]]:
        return []

    def lost(self, sandbox: str) -> None:
        raise AssertionError(sandbox)


class World:
    def __init__(self) -> None:
        ours, theirs = trio.socket.socketpair()
        self.theirs = theirs
        self.told = Told()
        self.link = ControlConnection(ours, self.told)
        self.gate = FakeGate()
        self.reader = FrameReader()
        self.numbers: list[int] = []  # up to which events were confirmed

    async def send(self, envelope: Envelope) -> None:
        await self.theirs.send(make_frame(envelope))

    async def serve(self) -> None:
        """Answer as the fake gate does, one byte a write."""
        while data := await self.theirs.recv(65536):
            for envelope, _ in self.reader.feed(data):
                if envelope.number:
                    self.numbers.append(envelope.number)
                events, answer = self.gate.answer(envelope.body)  # type: ignore[arg-type]
                frames = [make_frame(Envelope(serial=0, body=event)) for event in events]
                frames.append(make_frame(Envelope(serial=envelope.serial, body=answer)))
                for byte in b"".join(frames):
                    await self.theirs.send(bytes([byte]))


def start_all(nursery: trio.Nursery, *tasks: Callable[[], Awaitable[None]]) -> None:
    """Start tasks that need not have run when the next line does."""
    for task in tasks:
        nursery.start_soon(task)


@asynccontextmanager
async def open_world(*, serving: bool = True) -> AsyncIterator[World]:
    world = World()
    with world.link:
        async with trio.open_nursery() as nursery:
            start_all(nursery, world.link.run, *([world.serve] if serving else []))
            yield world
            nursery.cancel_scope.cancel()
    world.theirs.close()


async def test_requests_are_answered_and_events_told_before() -> None:
    async with open_world() as world:
        assert await world.link.request(AddSandbox(SPEC)) == Done()
        assert world.told.order == [Connected("c0", "session", ":1.5")]
        assert await world.link.request(WhoIs("session", "c0")) == SandboxOf("c0")
        snapshot = await world.link.request(TakeSnapshot())
        assert isinstance(snapshot, Snapshot)
        assert world.told.order[1:] == [snapshot]
        assert [state.spec for state in snapshot.sandboxes] == [SPEC]


async def test_a_refusal_is_an_error_with_its_name() -> None:
    async with open_world() as world:
        with pytest.raises(CallRefusedError, match="c9") as caught:
            await world.link.request(StopSandbox("c9"))
        assert caught.value.dbus_name == NOT_CONTAINER


async def test_many_can_ask_at_once() -> None:
    async with open_world() as world:

        async def ask(name: str) -> None:
            assert await world.link.request(WhoIs("session", name)) == SandboxOf(None)

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(ask, f":1.{number}")


async def test_events_are_confirmed_once_they_are_dealt_with(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world() as world, trio.open_nursery() as nursery:
        nursery.start_soon(world.link.confirm_events)
        for number in (3, 4):
            await world.send(Envelope(serial=0, body=Ended("c1", "stopped"), number=number))
        await trio.sleep(1)
        assert world.numbers == [4]  # both at once
        await world.link.request(WhoIs("session", "x"))
        assert world.numbers == [4, 4]
        world.link.close()
    assert autojump_clock.current_time() > 0


async def test_an_answer_brings_its_descriptors() -> None:
    async with open_world(serving=False) as world:
        read, write = os.pipe()

        async def answer(serial: int) -> None:
            frame = make_frame(Envelope(serial=serial, body=Listeners((("c1", ""),)), fds=1))
            await world.theirs.sendmsg(
                [frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write]))]
            )

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer, 1)
            body, (fd,) = await world.link.request_fds(TakeListeners(("c1",)))
        assert body == Listeners((("c1", ""),))
        os.write(fd, b"x")
        os.close(fd)
        # Those that nobody takes are closed.
        await answer(77)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer, 2)
            await world.link.request(TakeListeners(("c1",)))
        os.close(write)
        assert os.read(read, 9) == b"x"
        assert os.read(read, 9) == b""
        os.close(read)


async def test_who_waits_when_the_gate_hangs_up_is_told() -> None:
    async with open_world(serving=False) as world:

        async def ask() -> None:
            with pytest.raises(EngineLostError):
                await world.link.request(WhoIs("session", ":1.1"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            world.theirs.close()
        await world.link.ended.wait()
        await ask()


async def test_a_gate_that_breaks_the_protocol_is_hung_up_on() -> None:
    async with open_world(serving=False) as world:
        await world.theirs.send(b"\xff" * 16)
        await world.link.ended.wait()


async def test_an_answer_nobody_waits_for_is_dropped() -> None:
    async with open_world() as world:
        await world.send(Envelope(serial=99, body=Done()))
        assert await world.link.request(WhoIs("session", "x")) == SandboxOf(None)


async def test_who_is_cancelled_leaves_the_connection_whole() -> None:
    async with open_world(serving=False) as world:
        with trio.move_on_after(0):
            await world.link.request(WhoIs("session", "x"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.serve)
            assert await world.link.request(WhoIs("session", "y")) == SandboxOf(None)
            nursery.cancel_scope.cancel()


async def test_a_long_frame_with_descriptors_arrives_whole() -> None:
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    received: list[tuple[Envelope, list[int]]] = []

    def take() -> None:
        reader = FrameReader()
        while not received:
            data, fds, _, _ = socket.recv_fds(theirs, 65536, 16)
            received.extend(reader.feed(data, fds))

    spec = make_state(make_record(app="x" * 1_000_000)).spec
    link = ControlConnection(trio.socket.from_stdlib_socket(ours), Told())
    with theirs, link:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, take)
            with trio.move_on_after(5):
                await link._send(1, AddSandbox(spec), [write])
    ((envelope, (fd,)),) = received
    assert envelope.body == AddSandbox(spec)
    os.write(fd, b"y")
    assert os.read(read, 9) == b"y"
    for one in (read, write, fd):
        os.close(one)


async def test_without_a_gate_there_is_no_connection(tmp_path: Path) -> None:
    path = tmp_path / "gate.sock"
    assert await connect(path) is None
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    assert await connect(path) is None


async def test_a_snapshot_in_parts_is_told_once_and_whole() -> None:
    states = [make_state(make_record(number)) for number in range(3)]
    parts = [make_snapshot(state) for state in states]
    whole = make_snapshot(*states)
    async with open_world(serving=False) as world:

        async def answer() -> None:
            for serial in (1, 2):  # the second one begins anew
                await world.theirs.recv(65536)
                for part in parts[:2]:
                    more = msgspec.structs.replace(part, more=True)
                    await world.send(Envelope(serial=serial, body=more))
                await world.send(Envelope(serial=serial, body=parts[2]))
                await world.send(Envelope(serial=0, body=Ended("c0", "stopped")))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            for _ in range(2):
                assert await world.link.request(TakeSnapshot(in_parts=True)) == whole
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert world.told.order == [whole, Ended("c0", "stopped")] * 2
