import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from msgspec.structs import replace

from broker import daemon as service_module
from broker.bus.connection import BusConnection, Destination, Signal, open_bus
from broker.bus.message_bus import BusLostError
from broker.bus.values import Variant
from broker.control_protocol.messages import BusSpec
from broker.daemon import serve
from broker.engines import gate_engine as gate_module
from broker.engines.gate_process import GateError
from broker.supervisor.bus_connections import StartError
from broker.supervisor.config import Config, ConfiguredLimits
from broker.wire.errors import CallRefusedError, ConfigError
from broker.wire.interfaces import BROKER, BROKER_PATH
from tests.engines.test_control_connection import start_all
from tests.helpers import fake_gate
from tests.helpers.fake_bus import FakeBus, open_fake_bus

CONTAINERS = Destination(
    destination=BROKER, path="/org/freedesktop/DBus", interface="org.freedesktop.DBus.Containers1"
)
MANAGER = Destination(destination=BROKER, path=BROKER_PATH, interface=BROKER)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A gate that serves nobody, and our umask again afterwards."""
    monkeypatch.setattr(gate_module, "COMMAND", (sys.executable, fake_gate.__file__))
    umask = os.umask(0o022)
    yield
    os.umask(umask)


def make_config(folder: Path, *addresses: str, scope: Any = "user") -> Config:
    names = ("session", "system")
    buses = [BusSpec(name=name, address=one) for name, one in zip(names, addresses, strict=False)]
    return Config(
        scope=scope, buses=tuple(buses), runtime_dir=folder / "run", limits=ConfiguredLimits()
    )


@asynccontextmanager
async def served(folder: Path, **options: Any) -> AsyncIterator[tuple[FakeBus, BusConnection]]:
    """A service that runs, and a client; at the end it is told to end, and does."""
    async with open_fake_bus(folder) as fake:
        async with trio.open_nursery() as nursery:
            start_all(nursery, partial(serve, make_config(folder, fake.address, **options)))
            with trio.fail_after(10):
                while not (folder / "run" / "gate.sock").exists():  # noqa: ASYNC110
                    await trio.sleep(0.01)
            async with open_bus(fake.address) as client:
                yield fake, client
                os.kill(os.getpid(), signal.SIGTERM)


async def add(client: BusConnection, **named: Variant) -> str:
    (path, _, _) = await client.call(
        CONTAINERS, "AddServer", "ssa{sv}a{sv}", ["org.example.Type", "app", {}, named]
    )
    return str(path)


async def test_it_serves_says_so_and_ends_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with served(tmp_path) as (fake, client):
        folder = tmp_path / "run"
        got: list[Signal] = []
        client.on_signal = got.append
        client.wants_signal = lambda _header: True
        path = await add(client)
        (status,) = await client.call(MANAGER, "Status")
        assert status["sandboxes"] == Variant("u", 1)
        assert capsys.readouterr().out == f"ready {fake.address}\n"
        assert (folder / "bus-address").read_text() == f"{fake.address}\n"
        assert folder.stat().st_mode & 0o777 == 0o700
        await client.call(CONTAINERS, "StopInstance", "o", [path])
        removed = [(one.path, one.values) for one in got if one.member == "InstanceRemoved"]
        assert removed == [("/org/freedesktop/DBus", [path])]
    left = sorted(os.listdir(tmp_path / "run"))  # noqa: PTH208
    assert left == ["containers", "lock", "state.db"]


async def test_a_creator_that_leaves_is_noticed(tmp_path: Path) -> None:
    async with served(tmp_path) as (fake, client):
        async with open_bus(fake.address) as creator:
            path = await add(creator)
        with trio.fail_after(5):
            while True:
                (shown,) = await client.call(MANAGER, "Show", "s", [path])
                if not shown["listening"].value:
                    break
                await trio.sleep(0.01)


async def test_others_may_pass_through_the_folder_of_a_system_service(tmp_path: Path) -> None:
    async with served(tmp_path, scope="system"):
        folder = tmp_path / "run"
        modes = [path.stat().st_mode & 0o777 for path in (folder, folder / "containers")]
        assert modes == [0o711, 0o711]
        assert (folder / "state.db").stat().st_mode & 0o777 == 0o600


async def test_a_second_one_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    async with served(tmp_path) as (fake, client):
        path = await add(client)
        with pytest.raises(StartError, match="another supervisor"):
            await serve(make_config(tmp_path, fake.address))
        fake.taken.add(BROKER)
        other = tmp_path / "other"
        other.mkdir()
        with pytest.raises(StartError, match="another program"):
            await serve(make_config(other, fake.address))
        (shown,) = await client.call(MANAGER, "Show", "s", [path])
        assert shown["listening"].value


@pytest.mark.parametrize("address", ["unix:path=/does/not/exist", "tcp:host=x"])
async def test_without_its_bus_it_does_not_start(tmp_path: Path, address: str) -> None:
    with pytest.raises(StartError, match="bus session"):
        await serve(make_config(tmp_path, address))
    with pytest.raises(ConfigError, match="no bus"):
        await serve(make_config(tmp_path))


async def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="No such file"):
        await serve(make_config(tmp_path / "not" / "there", "unix:path=/x"))


async def test_a_gate_that_does_not_start_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (sys.executable, fake_gate.__file__, "--mode", "refuse")
    monkeypatch.setattr(gate_module, "COMMAND", command)
    async with open_fake_bus(tmp_path) as fake:
        with pytest.raises(GateError):
            await serve(make_config(tmp_path, fake.address))


async def test_a_start_that_takes_too_long_can_be_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service_module, "START_GRACE", 0.05)
    folder = tmp_path / "run"
    folder.mkdir()
    with trio.socket.socket(trio.socket.AF_UNIX) as mute:  # a gate that hangs
        await mute.bind(str(folder / "gate.sock"))
        mute.listen()
        async with open_fake_bus(tmp_path) as fake, trio.open_nursery() as nursery:
            nursery.start_soon(serve, make_config(tmp_path, fake.address))
            with trio.fail_after(10):
                connection, _ = await mute.accept()
                with connection:
                    os.kill(os.getpid(), signal.SIGHUP)
                    os.kill(os.getpid(), signal.SIGTERM)
                    while await connection.recv(4096):
                        pass
    assert "giving up the start" in caplog.text


async def test_a_reload_replaces_the_gate_or_says_why_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(tmp_path) as (_, client):
        await client.call(MANAGER, "Status")
        for _ in range(2):
            caplog.clear()
            os.kill(os.getpid(), signal.SIGHUP)
            with trio.fail_after(20):
                await trio.lowlevel.checkpoint()
                while "SIGHUP: " not in caplog.text:  # noqa: ASYNC110
                    await trio.sleep(0.01)


async def test_a_bus_that_drops_us_is_connected_to_again(tmp_path: Path) -> None:
    async with served(tmp_path) as (fake, client):
        path = await add(client)
        first = fake.owners[BROKER]
        fake.clients[first].close()
        with trio.fail_after(10):
            await trio.sleep(0.01)
            while fake.owners[BROKER] == first:  # noqa: ASYNC110
                await trio.sleep(0.01)
        await ask_until_answered(client)
        (shown,) = await client.call(MANAGER, "Show", "s", [path])
        assert shown["listening"].value  # its creator is still there
        assert any(m == "AddMatch" and client.unique_name in v[0] for m, v in fake.calls[-8:])


async def test_creators_are_gone_with_their_bus(tmp_path: Path) -> None:
    async with served(tmp_path) as (fake, client):
        followed, kept = await add(client), await add(client, KeepAfterCreator=Variant("b", True))
        fake.id = "f" * 32  # another bus at the same address
        fake.clients[fake.owners[BROKER]].close()
        with trio.fail_after(10):
            while not await is_ended(client, followed):  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert not await is_ended(client, kept)


async def is_ended(client: BusConnection, path: str) -> bool:
    """Say whether the fake gate was told to take no more connections."""
    try:
        with trio.fail_after(0.2):
            (shown,) = await client.call(MANAGER, "Show", "s", [path])
    except (CallRefusedError, trio.TooSlowError):
        return False
    return not shown["listening"].value


async def test_without_any_bus_it_ends_and_its_gate_with_it(tmp_path: Path) -> None:
    async with open_fake_bus(tmp_path) as fake:
        config = replace(make_config(tmp_path, fake.address), bus_gone_seconds=0.01)
        with pytest.RaisesGroup(pytest.RaisesExc(BusLostError, match="no bus is left")):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, config)
                async with open_bus(fake.address) as client:
                    await ask_until_answered(client)
                (tmp_path / "bus").unlink()
                fake.clients[fake.owners[BROKER]].close()
    assert not list((tmp_path / "run").glob("gate*"))


async def ask_until_answered(client: BusConnection) -> None:
    with trio.fail_after(10):
        while True:
            await trio.lowlevel.checkpoint()
            try:
                with trio.fail_after(0.2):
                    await client.call(MANAGER, "Status")
            except (CallRefusedError, trio.TooSlowError):
                continue
            return
