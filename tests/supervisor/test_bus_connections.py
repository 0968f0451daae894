from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from broker.bus.connection import BusConnection, Call, Destination, open_bus, open_loop
from broker.bus.message_bus import BusLostError
from broker.control_protocol.messages import BusSpec
from broker.supervisor import bus_connections
from broker.supervisor.bus_connections import (
    ReconnectingBus,
    StartError,
    serve_calls,
)
from broker.wire.header import Header
from tests.helpers.fake_bus import FakeBus, open_fake_bus

NAME = "org.example.Ours"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_connections, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(bus_connections, "LONGEST_PAUSE", 0.004)


class Told:
    def __init__(self) -> None:
        self.back = 0
        self.gone = 0
        self.changed = trio.Event()

    async def come_back(self, _bus: BusConnection) -> None:
        await trio.lowlevel.checkpoint()
        self.back += 1

    def go(self) -> None:
        self.gone += 1
        self.changed.set()


@asynccontextmanager
async def kept(
    fake: FakeBus, gone_after: float = 60.0
) -> AsyncIterator[tuple[ReconnectingBus, Told, trio.Nursery]]:
    line, told = (
        ReconnectingBus(BusSpec(name="session", address=fake.address), NAME, gone_after),
        Told(),
    )
    line.on_back, line.on_gone = told.come_back, told.go
    with trio.fail_after(10):
        async with open_loop(), trio.open_nursery() as nursery:
            await nursery.start(line.keep_open)
            yield line, told, nursery
            nursery.cancel_scope.cancel()


async def lose(fake: FakeBus, line: ReconnectingBus) -> BusConnection:
    """Have the bus drop us; return the next connection."""
    before = await line.wait_open()
    fake.clients[before.unique_name].close()
    await before.lost.wait()
    while True:
        bus = await line.wait_open()
        if bus is not before:
            return bus
        await trio.sleep(0.001)


async def test_a_lost_bus_is_connected_to_again_and_again(tmp_path: Path) -> None:
    async with open_fake_bus(tmp_path) as fake, kept(fake) as (line, told, _):
        for _ in range(3):
            bus = await lose(fake, line)
            assert fake.owners[NAME] == bus.unique_name
        assert (told.back, line.id) == (3, fake.id)
        fake.id = "f" * 32
        await lose(fake, line)
        assert (told.back, line.id) == (4, "f" * 32)
        assert not told.gone


async def test_a_name_that_another_has_meanwhile_is_waited_for(tmp_path: Path) -> None:
    async with open_fake_bus(tmp_path) as fake, kept(fake) as (line, told, nursery):
        fake.taken.add(NAME)

        async def give_back() -> None:
            await trio.sleep(0.02)
            fake.taken.clear()

        nursery.start_soon(give_back)
        bus = await lose(fake, line)
        assert fake.owners[NAME] == bus.unique_name
        assert told.back == 1


async def test_gone_for_good_is_told_once_and_may_still_come_back(tmp_path: Path) -> None:
    async with open_fake_bus(tmp_path) as fake, kept(fake, gone_after=0.01) as (line, told, _):
        fake.taken.add(NAME)
        bus = await line.wait_open()
        fake.clients[bus.unique_name].close()
        await told.changed.wait()
        assert line.is_gone
        assert line.bus is None
        await trio.sleep(0.02)
        assert told.gone == 1
        fake.taken.clear()
        await line.wait_open()
        assert not line.is_gone


async def test_a_bus_that_is_not_there_at_first_is_an_error(tmp_path: Path) -> None:
    line = ReconnectingBus(BusSpec(name="session", address=f"unix:path={tmp_path}/none"), NAME, 1)
    async with open_loop():
        with pytest.raises(StartError, match="bus session"):
            await line.keep_open()


class Echo:
    """Answers with the connection that was asked."""

    def __init__(self, bus: BusConnection) -> None:
        self.name = bus.unique_name

    def look(self, _header: Header) -> None:
        """Everything is taken."""

    async def serve(self, bus: BusConnection, call: Call) -> None:
        await trio.lowlevel.checkpoint()
        bus.answer(call, "s", [self.name])


async def test_calls_are_answered_on_whichever_connection_there_is(tmp_path: Path) -> None:
    async with open_fake_bus(tmp_path) as fake, kept(fake) as (line, _, nursery):
        nursery.start_soon(serve_calls, line, Echo, trio.Event())
        async with open_bus(fake.address) as client:
            target = Destination(destination=NAME, path="/", interface=NAME)
            for _ in range(3):
                bus = await line.wait_open()
                assert await client.call(target, "Who") == [bus.unique_name]
                await lose(fake, line)
        with pytest.raises(BusLostError):
            await client.call(target, "Who")
