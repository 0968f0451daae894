"""The supervisor while its state cannot be stored, and with records that it took over from a gate."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from broker.supervisor.storage.recovery import open_state
from broker.wire.errors import CallRefusedError
from policy.rules import AccessList
from tests.helpers.records import make_record, make_snapshot, make_state
from tests.helpers.snapstage import Stage, open_stage
from tests.supervisor.test_supervisor import CALLER, SEND_X, SEND_Y, World, request

HELD = AccessList(rules=(SEND_Y,), receive_from_host=False)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    folder = tmp_path / "containers"
    folder.mkdir()
    with open_state(tmp_path / "state.db") as state:
        yield World(folder, state)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with open_stage(tmp_path) as made:
        yield made


def set_read_only(world: World | Stage, *, value: bool = True) -> None:
    world.state._db.execute(f"PRAGMA query_only = {int(value)}")


async def test_a_sandbox_that_cannot_be_stored_is_refused_and_nowhere(world: World) -> None:
    set_read_only(world)
    with pytest.raises(CallRefusedError, match="cannot store"):
        await world.supervisor.add(request(), CALLER)
    await world.do_jobs()
    left = (world.engine.specs, world.files(), world.stored(), world.announcer.ended)
    assert not any(left), left
    assert len(world.supervisor.registry) == 0
    set_read_only(world, value=False)
    assert await world.add() == "c1"
    assert world.stored() == ["c1"]


async def test_rules_that_cannot_be_stored_are_not_in_force(world: World) -> None:
    id_ = await world.add(access=AccessList(rules=(SEND_X,)))
    before = world.engine.access[id_]
    set_read_only(world)
    with pytest.raises(CallRefusedError, match="cannot store"):
        await world.supervisor.set_access(CALLER, id_, [SEND_Y])
    assert world.engine.access[id_] == before
    assert world.supervisor.registry.find(id_).record.access.rules == (SEND_X,)


async def test_an_end_that_cannot_be_stored_is_told_and_stored_later(world: World) -> None:
    id_ = await world.add()
    set_read_only(world)
    world.engine.end(id_, "close-notify")
    assert world.announcer.ended == [id_]
    assert world.stored() == [id_]
    set_read_only(world, value=False)
    other = await world.add()
    assert world.stored() == [other]


async def test_what_the_gate_knows_better_is_taken_over(world: World) -> None:
    record = make_record(3, uid=CALLER.uid, metadata=b"12345678")
    spec = msgspec.structs.replace(make_state(record).spec, record=msgspec.msgpack.encode(record))
    snapshot = make_snapshot(msgspec.structs.replace(make_state(record), spec=spec))
    world.supervisor.take_snapshot(snapshot)
    await world.do_jobs()
    assert not world.engine.done
    assert world.supervisor.registry.find("c3").record == record
    # It is followed like the others: its creator left, as the watch will tell.
    assert ":1.1" in world.watches["session"].names
    assert world.stored() == ["c3"]


async def test_held_rules_go_when_there_are_snaps_again(stage: Stage) -> None:
    id_ = await stage.add("remote")
    registry = stage.supervisor.registry
    record = msgspec.structs.replace(registry.find(id_).record, held=HELD)
    registry.update(record)
    stage.state.put(record)
    assert SEND_Y in stage.supervisor.in_force(record).rules
    set_read_only(stage)
    with pytest.raises(CallRefusedError, match="cannot store"):
        await stage.load()
    assert registry.find(id_).record.held == HELD
    assert SEND_Y in stage.engine.access[id_].rules
    set_read_only(stage, value=False)
    await stage.load()
    assert registry.find(id_).record.held is None
    assert SEND_Y not in stage.engine.access[id_].rules
    assert stage.state.load()[0][0].held is None
