from typing import Any

import pytest
import trio
import trio.testing

from broker.supervisor.sandboxes.lifecycle import Cgroup, Event, Process
from broker.supervisor.sandboxes.registry import SandboxId
from broker.supervisor.watches.cgroups import Cgroups
from broker.supervisor.watches.processes import Processes
from broker.supervisor.watches.watches import (
    CreatorWatch,
    SandboxWatches,
    TimeLimits,
    boot_time,
    follows_creator,
)
from tests.helpers.fakes import FakeWatch
from tests.helpers.records import make_record

GONE = Process(pid=2**22 + 1, start=1)  # no pid is that high


@pytest.mark.parametrize(
    ("fields", "follows"),
    [
        ({}, True),
        ({"time_limit": 5}, True),
        ({"close_notify": True}, False),
        ({"process": GONE}, False),
        ({"cgroup": Cgroup("/sys/fs/cgroup/x", 1)}, False),
        ({"keep_after_creator": True}, False),
        ({"keep_after_creator": True, "close_notify": True}, False),
    ],
)
def test_who_follows_its_creator(fields: dict[str, Any], follows: bool) -> None:
    record = make_record(**fields)
    assert follows_creator(record) is follows
    assert CreatorWatch().add(record) is follows


def test_followers_are_told_once_by_bus_and_name() -> None:
    creators = CreatorWatch()
    for number in (0, 1):
        creators.add(make_record(number))
    creators.add(make_record(2, creator=":1.2"))
    creators.add(make_record(3, creator_bus="system"))
    assert creators.left("session", ":1.1") == ("c0", "c1")
    assert creators.left("session", ":1.1") == ()
    assert set(creators) == {("session", ":1.2"), ("system", ":1.1")}


def test_what_ended_follows_nobody() -> None:
    creators = CreatorWatch()
    record = make_record()
    creators.add(record)
    assert creators.remove(record)
    assert not creators.remove(record)
    assert list(creators) == []
    assert not creators.remove(make_record(5))


class World:
    """A watch over what is told to it."""

    def __init__(self) -> None:
        self.happened: list[tuple[str, Event]] = []
        self.watch = FakeWatch([":1.1"])
        self.watches = SandboxWatches(
            {"session": self.watch},
            lambda id_, event: self.happened.append((id_, event)),
            processes=Processes(),
            cgroups=Cgroups(),
            now=trio.current_time,
        )


def test_a_creator_that_leaves_is_told_of_each_of_its_sandboxes() -> None:
    world = World()
    for number in (0, 1):
        world.watches.begin(make_record(number))
    world.watches.begin(make_record(2, keep_after_creator=True))
    world.watches.end(make_record(1))
    world.watches.name_gone("session", ":1.1")
    world.watches.name_gone("session", ":1.1")
    assert world.happened == [("c0", Event.CREATOR_LEFT)]


def test_a_creator_that_left_before_is_told_at_once() -> None:
    world = World()
    world.watch.names.clear()
    world.watches.begin(make_record())
    assert world.happened == [("c0", Event.CREATOR_LEFT)]
    assert world.watch.names == []


def test_after_a_restart_creators_are_watched_unseen() -> None:
    world = World()
    world.watch.names.clear()
    world.watches.begin(make_record(), again=True)
    assert world.happened == []
    assert world.watch.names == [":1.1"]


def test_a_creator_on_a_bus_that_is_configured_no_more_has_left() -> None:
    world = World()
    record = make_record(creator_bus="system")
    world.watches.begin(record, again=True)
    assert world.happened == [("c0", Event.CREATOR_LEFT)]
    world.watches.end(record)
    world.watches.bus_back("session", is_same=True)


def test_what_is_taken_over_twice_is_watched_once() -> None:
    world = World()
    for _ in range(2):
        world.watches.begin(make_record(), again=True)
    assert world.watch.names == [":1.1", ":1.1"]  # it was watched before for somebody else
    world.watches.end(make_record())
    assert world.watch.names == [":1.1"]


async def test_what_ended_while_nobody_watched_is_told_when_somebody_does(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World()
    world.watches.begin(make_record(0, process=GONE, expires=trio.current_time() - 5), again=True)
    world.watches.begin(make_record(1, process=GONE), again=True)
    world.watches.end(make_record(1, process=GONE))
    assert world.happened == []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.watches.run)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert sorted(event.name for _, event in world.happened) == ["PROCESS_ENDED", "TIME_OVER"]
    assert {id_ for id_, _ in world.happened} == {"c0"}
    assert world.watches.describe() == {"processes": "0 by pidfds", "cgroups": "0 by inotify"}


async def test_time_limits_are_over_in_order_and_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World()
    start = trio.current_time()
    for number, seconds in enumerate((500, 30, 200, 30, 100)):
        world.watches.begin(make_record(number, expires=start + seconds, keep_after_creator=True))
    assert world.watches.time_left(make_record(expires=start + 0.5)) == 1
    assert world.watches.time_left(make_record(expires=start - 5)) == 0
    assert world.watches.time_left(make_record()) == 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.watches.run)
        await trio.sleep(40)
        world.watches.end(make_record(4, expires=1.0, keep_after_creator=True))
        # A nearer one than the one it waits for.
        world.watches.begin(make_record(7, expires=start + 50, keep_after_creator=True))
        await trio.sleep(300)
        nursery.cancel_scope.cancel()
    assert [id_ for id_, _ in world.happened] == ["c1", "c3", "c7", "c2"]
    assert {event for _, event in world.happened} == {Event.TIME_OVER}


async def test_a_clock_that_jumped_is_noticed(autojump_clock: trio.testing.MockClock) -> None:
    ahead = 0.0
    limits = TimeLimits(lambda: trio.current_time() + ahead)
    limits.add(SandboxId("c0"), trio.current_time() + 10_000)
    async with trio.open_nursery() as nursery:

        async def sleep_of_the_machine() -> None:
            nonlocal ahead
            await trio.sleep(5)
            ahead = 20_000

        nursery.start_soon(sleep_of_the_machine)
        with trio.fail_after(70):
            assert await limits.wait() == ["c0"]


def test_limits_that_were_discarded_take_no_room() -> None:
    limits = TimeLimits(boot_time)
    for number in range(1000):
        limits.add(SandboxId(f"c{number}"), 1e9 + number)
        limits.discard(SandboxId(f"c{number}"))
    assert len(limits) == 0
    assert len(limits._next) < 20
