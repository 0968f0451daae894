from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st

from broker.bus import callers
from broker.bus.callers import (
    LONG,
    MAX_BYTES_OF_CALLER,
    MAX_FDS_OF_CALLER,
    MAX_IDLE,
    MAX_OF_CALLER,
    MAX_OF_USER,
    MAX_WAITING,
    RUNNING,
    RUNNING_LONG,
    RUNNING_OF_CALLER,
    CallerGoneError,
    Callers,
)
from broker.wire.errors import LIMITS_EXCEEDED, CallRefusedError


@dataclass(eq=False)
class Asked:
    """A call."""

    sender: str
    size: int = 0
    fd_count: int = 0
    is_closed: bool = False

    def close(self) -> None:
        self.is_closed = True


@dataclass
class Watched:
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.names.append(name)

    def discard(self, name: str) -> None:
        if name in self.names:
            self.names.remove(name)


class World:
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.callers = Callers(self.asked.append)
        self.watch = Watched()
        self.callers.watch(self.watch)

    def call(self, sender: str, user: int = 1, size: int = 0, fds: int = 0) -> Asked:
        """Let a call arrive. Raises CallRefusedError."""
        call = Asked(sender, size, fds)
        self.callers.check(sender, size, fds)
        self.callers.put(call)
        self.callers.know(sender, user)
        return call

    def started(self) -> list[Asked]:
        """Start all that may be."""
        return list(self._start())

    def _start(self) -> Iterator[Asked]:
        while (call := self.callers.next_nowait()) is not None:
            assert isinstance(call, Asked)
            yield call

    def fill(self, sender: str, user: int = 1, size: int = 0) -> int:
        """Send until it is refused; return how many were taken."""
        count = 0
        with pytest.raises(CallRefusedError) as caught:
            for count in range(100_000):  # noqa: B007 - as far as it came
                self.call(sender, user, size)
        assert caught.value.dbus_name == LIMITS_EXCEEDED
        return count


def test_attack_c6_who_floods_is_refused_and_nobody_else() -> None:
    world = World()
    for number in range(3):
        assert world.fill(f":1.{number}", size=10) == MAX_OF_CALLER
    person = world.call(":1.9")
    started = world.started()
    assert started.index(person) < 4
    assert sum(call.sender == ":1.0" for call in started) == RUNNING_OF_CALLER


def test_attack_c6_many_callers_of_one_user_leave_another_user_half_of_the_starts() -> None:
    world = World()
    for number in range(400):
        world.fill(f":1.{number}", user=1)
    taken = len(world.callers)
    assert MAX_OF_USER <= taken <= 8 * MAX_OF_USER
    for _ in range(RUNNING):
        world.callers.next_nowait()
    mine = [world.call(":2.0", user=2) for _ in range(3)]
    # All slots are taken, and there is one for a user who has none.
    assert world.started() == mine[:1]
    world.callers.done(mine[0])
    assert world.started() == mine[1:2]


def test_calls_wait_until_their_user_is_known() -> None:
    world = World()
    call = Asked(":1.5")
    world.callers.put(call)
    assert world.asked == [":1.5"]
    assert world.watch.names == [":1.5"]
    assert not world.started()
    world.callers.know(":1.5", 7)
    assert world.started() == [call]
    world.callers.put(Asked(":1.5"))
    assert world.asked == [":1.5"]


def test_a_call_of_who_cannot_be_asked_for_is_closed() -> None:
    world = World()
    call = Asked(":1.5", fd_count=1)
    world.callers.put(call)
    world.callers.gone(":1.5")
    assert call.is_closed
    assert not world.started()
    assert not world.watch.names
    assert len(world.callers) == 0


def test_nothing_of_who_left_is_started() -> None:
    world = World()
    calls = [world.call(":1.1") for _ in range(10)]
    running = world.started()
    world.callers.gone(":1.1")
    assert [call.is_closed for call in calls] == [call not in running for call in calls]
    for call in running:
        world.callers.done(call)
    assert not world.started()
    assert not world.callers._callers


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        pytest.param({"size": 1024 * 1024}, MAX_BYTES_OF_CALLER // 1024**2, id="bytes"),
        pytest.param({"fds": 8}, MAX_FDS_OF_CALLER // 8, id="descriptors"),
    ],
)
def test_bytes_and_descriptors_that_wait_are_bounded(kind: dict[str, int], most: int) -> None:
    world = World()
    for _ in range(most):
        world.call(":1.1", **kind)
    with pytest.raises(CallRefusedError, match="wait already"):
        world.call(":1.1", **kind)
    world.call(":1.2", **kind)


def test_all_that_waits_is_bounded_however_many_users_there_are() -> None:
    world = World()
    for user in range(100):
        for number in range(10):
            world.fill(f":{user}.{number}", user=user)
    assert len(world.callers) <= 8 * MAX_WAITING
    world.call(":9999.1", user=9999)


def test_one_long_call_of_a_caller_is_under_way_and_few_of_all() -> None:
    world = World()
    for number in range(10):
        for _ in range(3):
            world.call(f":1.{number}", user=number, size=LONG + 1)
    started = world.started()
    assert len(started) == RUNNING_LONG
    assert len({call.sender for call in started}) == RUNNING_LONG
    short = world.call(":1.0", user=0)
    assert world.started() == [short]


def test_long_calls_are_not_kept_waiting_by_short_ones() -> None:
    world = World()
    long = world.call(":1.0", size=LONG + 1)
    for number in range(1, 40):
        world.fill(f":1.{number}")
    started: list[Asked] = []
    for _ in range(4):
        call = world.callers.next_nowait()
        assert isinstance(call, Asked)
        started.append(call)
        world.callers.done(call)
    assert long in started


def test_idle_callers_are_forgotten_oldest_first() -> None:
    world = World()
    for number in range(MAX_IDLE + 10):
        call = world.call(f":1.{number}")
        assert world.started() == [call]
        world.callers.done(call)
    assert world.watch.names == [f":1.{number}" for number in range(10, MAX_IDLE + 10)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.booleans()), max_size=60))
def test_counts_are_those_of_what_waits(steps: list[tuple[int, int, bool]]) -> None:
    world = World()
    running: list[Asked] = []
    waiting: list[Asked] = []
    for user, number, is_long in steps:
        sender = f":{user}.{number}"
        if is_long and running:
            world.callers.done(running.pop())
        elif number == 4:
            world.callers.gone(sender)
            waiting = [call for call in waiting if call.sender != sender]
        else:
            waiting.append(world.call(sender, user, size=(LONG + 1) * is_long))
        for call in world.started():
            waiting.remove(call)
            running.append(call)
        assert len(world.callers) == len(waiting)
        assert world.callers._all.bytes == sum(call.size for call in waiting)
    for call in running:
        world.callers.done(call)
    while calls := world.started():
        for call in calls:
            world.callers.done(call)
    assert not world.callers._users
    assert not world.callers._users_running
    assert world.callers._running == world.callers._running_long == 0


# -- slices ------------------------------------------------------------------------------------------


async def test_attack_c6_slices_are_given_user_by_user_and_caller_by_caller() -> None:
    world = World()
    order: list[str] = []

    async def work(call: Asked) -> None:
        for _ in range(3):
            await world.callers.turn(call.sender)
            order.append(call.sender)

    calls = [world.call(f":1.{number}") for number in (1, 1, 1, 2)]
    calls.append(world.call(":2.1", user=2))
    world.started()
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as working:
            for call in calls:
                working.start_soon(work, call)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(world.callers.give_turns)
        nursery.cancel_scope.cancel()
    # Every second slice is of the other user, as long as it wants any.
    assert [sender == ":2.1" for sender in order[:6]].count(True) == 3
    first_of_2 = [n for n, sender in enumerate(order) if sender == ":1.2"]
    assert first_of_2[-1] <= 9


async def test_work_of_who_left_ends_with_its_next_turn() -> None:
    world = World()
    call = world.call(":1.1")
    world.started()
    async with trio.open_nursery() as nursery:

        async def work() -> None:
            with pytest.raises(CallerGoneError):
                await world.callers.turn(call.sender)
            with pytest.raises(CallerGoneError):
                await world.callers.turn(call.sender)

        nursery.start_soon(work)
        await trio.testing.wait_all_tasks_blocked()
        world.callers.gone(":1.1")
    world.callers.done(call)


async def test_a_turn_that_is_waited_for_no_more_is_given_to_nobody() -> None:
    world = World()
    call = world.call(":1.1")
    world.started()
    with trio.move_on_after(0) as scope:
        await world.callers.turn(call.sender)
    assert scope.cancelled_caught
    assert len(world.callers._slices) == 0


async def test_who_waits_for_a_call_gets_it_or_the_end() -> None:
    world = World()
    got: list[object] = []

    async def wait() -> None:
        while (call := await world.callers.next()) is not None:
            got.append(call)
            world.callers.done(call)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        calls = [world.call(":1.1") for _ in range(9)]
        await trio.testing.wait_all_tasks_blocked()
        assert got == calls
        world.callers.close()


def test_limits_of_a_user_are_within_those_of_all() -> None:
    for kind in ("", "_BYTES", "_FDS"):
        of_caller = getattr(callers, f"MAX{kind}_OF_CALLER")
        of_user = getattr(callers, f"MAX{kind}_OF_USER")
        assert of_caller < of_user < (getattr(callers, f"MAX{kind}", MAX_WAITING))
