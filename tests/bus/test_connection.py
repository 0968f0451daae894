import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from broker.bus import callers, connection, message_bus
from broker.bus.connection import BUS_DRIVER, BusConnection, Destination, Signal, open_bus
from broker.bus.message_bus import BusLostError
from broker.bus.values import Variant
from broker.wire.errors import INVALID_ARGS, LIMITS_EXCEEDED, CallRefusedError, ConfigError
from broker.wire.header import Header, MessageType, serialise_header
from tests.helpers.fake_bus import FakeBus, open_fake_bus, send
from tests.helpers.fakes import make_call

SERVICE = Destination(destination="org.example.Service", path="/a", interface="org.example.I")


@asynccontextmanager
async def two(folder: Path) -> AsyncIterator[tuple[FakeBus, BusConnection, BusConnection]]:
    """A bus with a service that echoes, and a client."""
    async with open_fake_bus(folder) as fake:
        async with open_bus(fake.address) as service, open_bus(fake.address) as client:
            assert await service.request_name(SERVICE.destination)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.calls.give_turns)
                nursery.start_soon(echo, service)
                yield fake, service, client
                nursery.cancel_scope.cancel()


async def echo(bus: BusConnection) -> None:
    while (call := await bus.next_call()) is not None:
        with bus.in_its_place(call), call:
            await call.unpack()
            for fd in call.fds:
                os.write(fd, b"x")
            if call.member == "Refuse":
                bus.refuse(call, INVALID_ARGS, "no")
            elif call.member != "Ignore":
                bus.answer(call, call.signature, call.values)
            await bus.wait_room()


def raw(fake: FakeBus, destination: str, *, body: bytes = b"", **fields: Any) -> bytes:
    """Return a message that no library of ours would make."""
    defaults: dict[str, Any] = {
        "little": True,
        "type": MessageType.METHOD_CALL,
        "flags": 0,
        "serial": fake._next(),
        "path": "/a",
        "interface": "org.example.I",
        "member": "M",
        "sender": ":1.66",
    }
    header = Header(body_length=len(body), destination=destination, **{**defaults, **fields})
    return serialise_header(header, sender=True, extra={10: ("o", "/evil")}) + body


async def test_values_go_there_and_back(tmp_path: Path) -> None:
    async with two(tmp_path) as (_, service, client):
        assert (service.unique_name, client.unique_name) == (":1.1", ":1.2")
        values = ["x", {"k": Variant("av", [Variant("u", 1)])}, [(True, "y")], b"\0"]
        assert await client.call(SERVICE, "Echo", "sa{sv}a(bs)ay", values) == values


async def test_an_error_is_raised_with_its_name(tmp_path: Path) -> None:
    async with two(tmp_path) as (_, _, client):
        with pytest.raises(CallRefusedError, match="no") as caught:
            await client.call(SERVICE, "Refuse")
        assert caught.value.dbus_name == INVALID_ARGS
        with pytest.raises(ValueError):  # noqa: PT011
            await client.call(SERVICE, "Echo", "s", [1])


async def test_descriptors_are_passed_and_closed(tmp_path: Path) -> None:
    read, write = os.pipe()
    async with two(tmp_path) as (_, _, client):
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted, not read
        assert await client.call(SERVICE, "Echo", "h", [0], fds=[write]) == [0]
        assert os.read(read, 9) == b"x"
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    os.close(read)
    os.close(write)


async def test_a_message_larger_than_the_socket_takes_goes_through(tmp_path: Path) -> None:
    async with two(tmp_path) as (_, _, client):
        data = bytes(3_000_000)

        async def ask() -> None:
            assert await client.call(SERVICE, "Echo", "ay", [data]) == [data]

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
            backlogs = []
            for _ in range(50):
                await trio.lowlevel.checkpoint()
                backlogs.append(client.backlog)
            assert max(backlogs) > 0
        assert client.backlog == 0


async def test_who_gives_up_waiting_can_ask_again(tmp_path: Path) -> None:
    async with two(tmp_path) as (_, _, client):
        with trio.move_on_after(0.01):
            await client.call(SERVICE, "Ignore")
        assert await client.call(SERVICE, "Echo", "s", ["x"]) == ["x"]


async def test_signals_and_calls_without_reply_go_out(tmp_path: Path) -> None:
    async with two(tmp_path) as (fake, service, client):
        got: list[Signal] = []
        client.on_signal = got.append
        client.wants_signal = lambda _header: True
        service.emit("/a", "org.example.I", "Happened", "s", ["x"])
        client.send(BUS_DRIVER, "AddMatch", "s", ["rule"])
        await client.call(BUS_DRIVER, "GetId")
        assert ("AddMatch", ["rule"]) in fake.calls
        await client.call(SERVICE, "Echo")
        assert [(one.sender, one.member, one.values) for one in got if one.path == "/a"] == [
            (":1.1", "Happened", ["x"])
        ]


async def test_strange_messages_of_others_end_nothing(tmp_path: Path) -> None:
    async with two(tmp_path) as (fake, service, client):
        sock = fake.clients[service.unique_name]
        for data in (
            raw(fake, ":1.1"),  # a field that is not defined
            raw(fake, ":1.1", type=77, flags=0xFF),
            raw(fake, ":1.1", signature="s", body=b"\xff\0\0\0x\0"),  # no such string
            raw(fake, ":1.1", type=MessageType.SIGNAL, signature="v", body=b"\1(\0"),
            raw(fake, ":1.1", type=MessageType.METHOD_RETURN, reply_serial=999),
            raw(fake, ":1.1", little=False, serial=1),
        ):
            await send(sock, data)
        assert await client.call(SERVICE, "Echo", "s", ["x"]) == ["x"]


async def test_a_body_too_long_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_BODY", 100)
    async with two(tmp_path) as (_, _, client):
        with pytest.raises(CallRefusedError, match="100 bytes"):
            await client.call(SERVICE, "Echo", "ay", [bytes(101)])
        assert await client.call(SERVICE, "Echo", "s", ["x"]) == ["x"]


async def test_calls_that_nobody_takes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers, "MAX_OF_CALLER", 2)
    read, write = os.pipe()
    async with open_fake_bus(tmp_path) as fake:
        async with open_bus(fake.address) as service, open_bus(fake.address) as client:
            target = Destination(destination=service.unique_name, path="/a", interface="a.b")
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(call_with_fd, client, target, write)
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(CallRefusedError) as caught:
                    await client.call(target, "M", "h", [0], fds=[write])
                assert caught.value.dbus_name == LIMITS_EXCEEDED
                nursery.cancel_scope.cancel()
    os.close(write)
    assert os.read(read, 9) == b""  # no descriptor is left open
    os.close(read)


async def call_with_fd(client: BusConnection, target: Destination, fd: int) -> None:
    await client.call(target, "M", "h", [0], fds=[fd])


@pytest.mark.parametrize("keep", [True, False])
async def test_whether_fields_get_through_is_found_out(tmp_path: Path, keep: bool) -> None:
    async with two(tmp_path) as (fake, service, _):
        fake.keep_fields = keep
        for _ in range(2):
            assert await service.forwards_instance_field() is keep


async def test_a_name_that_is_taken_is_not_ours(tmp_path: Path) -> None:
    async with two(tmp_path) as (fake, _, client):
        fake.taken.add("org.example.Taken")
        assert not await client.request_name("org.example.Taken")


async def test_who_waits_when_the_bus_goes_is_told(tmp_path: Path) -> None:
    async with two(tmp_path) as (fake, _, client):

        async def ask() -> None:
            with pytest.raises(BusLostError):
                await client.call(SERVICE, "Ignore")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            fake.clients[client.unique_name].shutdown(socket.SHUT_RDWR)
        await client.lost.wait()
        await ask()
        client.emit("/a", "a.b", "Gone", "", [])
        client.answer(make_call("M"), "s", ["x"])


async def test_errors_of_the_block_come_out_as_they_are(tmp_path: Path) -> None:
    async with open_fake_bus(tmp_path) as fake:
        with pytest.raises(CallRefusedError):
            async with open_bus(fake.address):
                raise CallRefusedError(INVALID_ARGS, "x")


@pytest.mark.parametrize("address", ["unix:path=/does/not/exist", "tcp:host=localhost", "", "x"])
async def test_a_bus_that_is_not_there_is_one_clear_error(address: str) -> None:
    with pytest.raises(ConfigError):
        async with open_bus(address):
            pass


async def test_a_later_alternative_is_tried(tmp_path: Path) -> None:
    async with open_fake_bus(tmp_path) as fake:
        async with open_bus(f"unix:path={tmp_path}/nothing;{fake.address}") as bus:
            assert bus.unique_name == ":1.1"


@pytest.mark.parametrize("says", [b"", b"REJECTED\r\n", b"OK 1234\r\n", b"\xff" * 70000])
async def test_what_is_no_bus_is_one_clear_error(tmp_path: Path, says: bytes) -> None:
    path = tmp_path / "bus"
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    await listening.bind(str(path))
    listening.listen()

    async def answer() -> None:
        sock, _ = await listening.accept()
        with sock:
            await sock.recv(100)
            await send(sock, says)

    with listening:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            with pytest.raises(ConfigError, match="cannot connect"):
                async with open_bus(f"unix:path={path}"):
                    pass


async def test_a_bus_that_refuses_hello_is_one_clear_error(tmp_path: Path) -> None:
    async with open_fake_bus(tmp_path) as fake:
        fake.greeting = lambda _name: "too many connections"
        with pytest.raises(ConfigError, match="too many connections"):
            async with open_bus(fake.address):
                pass


def test_serials_start_again_at_one() -> None:
    class Counting(message_bus.PatchedMessageBus):
        def __init__(self) -> None:
            self._serial = 0xFFFFFFFE

    counting = Counting()
    assert [counting.next_serial(), counting.next_serial()] == [0xFFFFFFFF, 1]


async def test_what_was_said_last_is_sent_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How long it takes is not what is asked here, and a busy machine may take long.
    monkeypatch.setattr(connection, "CLOSE_TIMEOUT", 60)
    async with open_fake_bus(tmp_path) as fake, open_bus(fake.address) as hearer:
        got: list[Signal] = []
        got_all = trio.Event()

        def hear(signal: Signal) -> None:
            got.append(signal)
            if len(got) == 20:
                got_all.set()

        hearer.on_signal = hear
        hearer.wants_signal = lambda _header: True
        async with open_bus(fake.address) as teller:
            for _ in range(20):
                teller.emit("/a", "org.example.I", "Happened", "ay", [bytes(300_000)])
            assert teller.backlog
        with trio.fail_after(60):
            await got_all.wait()


async def test_a_bus_that_takes_nothing_does_not_keep_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CLOSE_TIMEOUT", 0.01)
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        async with open_fake_bus(tmp_path) as fake:
            with trio.fail_after(5):
                async with open_bus(fake.address) as bus:
                    fake.clients["nobody"] = ours  # and the bus waits for who does not read
                    for _ in range(20):
                        bus.emit("/a", "org.example.I", "Happened", "ay", [bytes(300_000)])
                    assert bus.backlog


async def test_a_bus_that_is_lost_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CLOSE_TIMEOUT", 60)
    async with open_fake_bus(tmp_path) as fake:
        with trio.fail_after(5):
            async with open_bus(fake.address) as bus:
                bus.emit("/a", "org.example.I", "Happened", "ay", [bytes(3_000_000)])
                assert bus.backlog
                fake.clients[bus.unique_name].shutdown(socket.SHUT_RDWR)


async def test_a_reply_of_somebody_else_is_none(tmp_path: Path) -> None:
    async with two(tmp_path) as (fake, _, client):

        async def forge() -> None:
            sock = fake.clients[client.unique_name]
            for serial in range(1, 40):
                forged = raw(
                    fake,
                    client.unique_name,
                    type=MessageType.METHOD_RETURN,
                    reply_serial=serial,
                    signature="b",
                    body=b"\1\0\0\0",
                )
                await send(sock, forged)

        for _ in range(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(forge)
                nursery.start_soon(is_false, client, "org.example.Nobody")


async def is_false(client: BusConnection, name: str) -> None:
    assert await client.call(BUS_DRIVER, "NameHasOwner", "s", [name]) == [False]
