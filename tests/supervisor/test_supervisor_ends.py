import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from broker.supervisor.sandboxes.lifecycle import Event, Phase, Process
from broker.supervisor.sandboxes.registry import SandboxId
from broker.supervisor.storage.recovery import open_state
from broker.supervisor.watches.processes import identify
from tests.helpers.fakes import lost
from tests.helpers.records import make_snapshot, make_state
from tests.supervisor.test_supervisor import CALLER, World, request

ME = identify(os.getpid(), os.getuid())
GONE = Process(pid=2**22 + 1, start=1)  # no pid is that high


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    folder = tmp_path / "containers"
    folder.mkdir()
    with open_state(tmp_path / "state.db") as state:
        yield World(folder, state)


async def watch(world: World) -> None:
    """Watch, and do what is to be done."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.supervisor.watches.run)
        nursery.start_soon(world.supervisor.run_jobs)
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (Event.PROCESS_ENDED, "process-ended"),
        (Event.CGROUP_EMPTY, "cgroup-empty"),
        (Event.TIME_OVER, "time-limit"),
        (Event.BUS_GONE, "bus-gone"),
    ],
)
async def test_what_is_decided_is_asked_of_the_gate_and_told(
    world: World, event: Event, reason: str
) -> None:
    id_ = await world.add(keep_after_creator=True)
    world.engine.connect(id_, ":1.7")
    world.supervisor.apply_event(SandboxId(id_), event)
    world.supervisor.apply_event(SandboxId(id_), Event.TIME_OVER)
    assert world.announcer.ended == []
    await world.do_jobs()
    assert world.announcer.reasons == {id_: reason}
    assert world.supervisor.ended == {reason: 1}
    assert world.engine.done.count(("stop", id_)) == 1
    assert world.stored() == []


async def test_each_way_to_stop_it_has_its_reason(world: World) -> None:
    stopped, closed, left, piped = [await world.add() for _ in range(4)]
    world.engine.connect(left, ":1.7")
    await world.supervisor.stop(CALLER, stopped)
    await world.supervisor.stop_listening(CALLER, closed)
    world.supervisor.apply_event(SandboxId(left), Event.CREATOR_LEFT)
    await world.do_jobs()
    assert left not in world.announcer.ended
    world.engine.end(left, "last-connection")
    world.engine.end(piped, "close-notify")
    assert world.announcer.reasons == {
        stopped: "stopped",
        closed: "last-connection",
        left: "creator-gone",
        piped: "close-notify",
    }


async def test_a_creator_that_leaves_is_the_reason_after_a_restart_too(world: World) -> None:
    id_ = await world.add()
    world.engine.connect(id_, ":1.7")
    world.supervisor.name_gone("session", ":1.1")
    # Killed before the gate was told.
    supervisor = world.restart()
    sandbox = supervisor.registry.find(id_)
    assert (sandbox.phase, sandbox.reason) == (Phase.CLOSING, "creator-gone")
    connections = (("session", ":1.7"),)
    state = make_state(sandbox.record, connections=connections)
    supervisor.take_snapshot(make_snapshot(state))
    await world.do_jobs()
    assert ("stop_listening", id_) in world.engine.done
    world.engine.end(id_, "last-connection")
    assert world.announcer.reasons == {id_: "creator-gone"}


async def test_what_a_gate_that_died_was_asked_is_asked_again(world: World) -> None:
    id_ = await world.add(process=GONE)
    world.engine.refuse = lost()
    await watch(world)
    assert world.announcer.ended == []
    record = world.supervisor.registry.find(id_).record
    world.supervisor.take_snapshot(make_snapshot(make_state(record)))
    await world.do_jobs()
    assert world.announcer.reasons == {id_: "process-ended"}


async def test_the_reason_of_a_stop_is_told_to_the_next_supervisor(world: World) -> None:
    id_ = await world.add(keep_after_creator=True)
    first = world.supervisor
    first.apply_event(SandboxId(id_), Event.PROCESS_ENDED)
    world.restart()
    # The gate was asked, and the first one did not live to hear of it.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(first.run_jobs)
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()
    assert world.announcer.reasons == {id_: "process-ended"}
    assert world.stored() == []


async def test_what_found_no_gate_is_asked_once_there_is_one(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    id_ = await world.add(process=GONE)
    world.supervisor.apply_event(SandboxId(id_), Event.PROCESS_ENDED)
    # To give a gate back what it had may take longer than anybody waits for it.
    world.engine.refuse = lost()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.supervisor._jobs.run)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert world.announcer.reasons == {id_: "process-ended"}


async def test_a_stop_that_failed_is_done_when_there_is_a_gate(world: World) -> None:
    id_ = await world.add()
    world.engine.refuse = lost()
    with pytest.raises(type(lost())):
        await world.supervisor.stop(CALLER, id_)
    record = world.supervisor.registry.find(id_).record
    world.supervisor.take_snapshot(make_snapshot(make_state(record)))
    await world.do_jobs()
    assert world.announcer.reasons == {id_: "stopped"}


async def test_a_process_is_watched_from_the_announcement_on(world: World) -> None:
    record = await world.supervisor.add(request(process=GONE), CALLER)
    await watch(world)
    assert world.announcer.ended == []
    world.supervisor.announce(record)
    await watch(world)
    assert world.announcer.reasons == {record.id: "process-ended"}
    assert world.stored() == []


async def test_what_ends_it_survives_a_restart(world: World) -> None:
    ended = await world.add(process=GONE)
    lives = await world.add(process=ME, time_limit=1000)
    (first, second), _ = world.state.load()
    assert (first.process, second.process, second.time_limit) == (GONE, ME, 1000)
    assert second.expires > 1000
    world.restart()
    await watch(world)
    assert world.announcer.reasons == {ended: "process-ended"}
    assert world.stored() == [lives]
    await world.supervisor.stop(CALLER, lives)
    assert len(world.supervisor.watches.processes) == 0


async def test_a_bus_that_is_gone_ends_what_has_no_other(world: World) -> None:
    only = await world.add(buses=("system",), keep_after_creator=True)
    both = await world.add(buses=("session", "system"), keep_after_creator=True)
    world.supervisor.bus_gone("system")
    await world.do_jobs()
    assert world.announcer.reasons == {only: "bus-gone"}
    assert world.stored() == [both]


def test_the_engine_is_told_of_a_bus_that_started_anew(world: World) -> None:
    for id_ in ("a" * 32, "a" * 32, "b" * 32):
        world.supervisor.bus_back("session", id_)
    assert world.engine.done.count(("bus_restarted", "session")) == 1


async def test_a_bus_that_goes_while_a_sandbox_is_added_ends_it(world: World) -> None:
    record = await world.supervisor.add(request(buses=("system",), keep_after_creator=True), CALLER)
    world.supervisor.bus_gone("system")
    await world.do_jobs()
    assert world.announcer.ended == []
    world.supervisor.announce(record)
    await world.do_jobs()
    assert world.announcer.reasons == {record.id: "bus-gone"}


async def test_without_the_bus_of_its_creator_a_sandbox_listens_no_more(world: World) -> None:
    id_ = await world.add()
    world.engine.connect(id_, ":1.7")
    del world.watches["session"]
    supervisor = world.restart()
    assert supervisor.registry.find(id_).reason == "creator-gone"
    await world.do_jobs()
    assert not supervisor.registry.find(id_).record.listening
