from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from broker.engines.base import EngineLostError
from broker.supervisor.header_requests import InstanceFieldRequests
from broker.supervisor.storage.recovery import open_state
from broker.supervisor.storage.state_file import StateFile
from tests.helpers.fakes import FakeEngine, FakeWatch, lost


class World:
    def __init__(self, state: StateFile) -> None:
        self.state = state
        self.engine = FakeEngine()
        self.watches = {bus: FakeWatch([":1.5"]) for bus in ("session", "system")}  # who calls
        self.jobs: list[Any] = []
        self.requests = self.restart()

    def restart(self) -> InstanceFieldRequests:
        self.requests = InstanceFieldRequests(
            self.state, self.engine, self.watches, lambda _about, job: self.jobs.append(job)
        )
        return self.requests

    async def do_jobs(self) -> list[tuple[str, ...]]:
        self.engine.done.clear()
        while self.jobs:
            await self.jobs.pop(0)()
        return self.engine.done


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_state(tmp_path / "state.db") as state:
        yield World(state)


async def test_a_wish_is_stored_watched_and_told_again(world: World) -> None:
    await world.requests.add("session", ":1.5")
    await world.requests.add("session", ":1.5")
    assert world.state.load_field_requests() == [("session", ":1.5")]
    assert world.watches["session"].names == [":1.5", ":1.5"]
    world.watches = {"session": FakeWatch(), "system": FakeWatch()}
    world.restart().request_again()
    assert world.requests.connections == [("session", ":1.5")]
    assert world.watches["session"].names == [":1.5"]
    assert await world.do_jobs() == [("request_instance_field", "session", ":1.5")]


async def test_who_leaves_wants_nothing_any_more(world: World) -> None:
    await world.requests.add("session", ":1.5")
    world.requests.gone("session", ":1.5")
    world.requests.gone("session", ":1.6")
    assert world.state.load_field_requests() == []
    assert await world.do_jobs() == [("untag_headers", "session", ":1.5")]


async def test_who_leaves_before_the_answer_wants_nothing(world: World) -> None:
    world.watches["session"].names.clear()
    await world.requests.add("session", ":1.5")
    assert world.state.load_field_requests() == []
    assert world.watches["session"].names == []
    assert await world.do_jobs() == [("untag_headers", "session", ":1.5")]
    world.requests.request_again()
    assert world.jobs == []


async def test_another_bus_knows_none_of_them(world: World) -> None:
    for bus in ("session", "system"):
        await world.requests.add(bus, ":1.5")
    world.requests.bus_back("session", is_same=False)
    assert world.state.load_field_requests() == [("system", ":1.5")]
    world.watches["system"] = FakeWatch()
    world.requests.bus_back("system", is_same=True)
    assert world.watches["system"].names == [":1.5"]
    assert world.state.load_field_requests() == [("system", ":1.5")]


async def test_a_wish_on_a_bus_that_is_configured_no_more_is_forgotten(world: World) -> None:
    await world.requests.add("system", ":1.5")
    del world.watches["system"]
    world.restart()
    assert world.state.load_field_requests() == []


async def test_what_the_gate_does_not_take_is_not_stored(world: World) -> None:
    world.engine.refuse = lost()
    with pytest.raises(EngineLostError):
        await world.requests.add("session", ":1.5")
    assert world.state.load_field_requests() == []


async def test_a_full_disk_ends_no_watch(world: World, caplog: pytest.LogCaptureFixture) -> None:
    await world.requests.add("session", ":1.5")
    world.state._db.execute("PRAGMA query_only = ON")
    world.requests.gone("session", ":1.5")
    assert "read-only" in caplog.text
    await trio.lowlevel.checkpoint()
