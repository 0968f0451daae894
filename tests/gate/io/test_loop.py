"""The loop calls what is due and what is ready, in order, and nothing that was cancelled or removed."""

import os
import select
import socket
from collections.abc import Callable, Iterator

import pytest

from broker.gate.io.loop import READABLE, Loop


class Clock:
    """Time that passes only while the loop waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class SleepingEpoll:
    """An epoll that does not wait: it puts the clock forward."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.slept: list[float] = []
        self.ready: list[list[tuple[int, int]]] = []

    def register(self, fd: int, events: int) -> None:
        pass

    def modify(self, fd: int, events: int) -> None:
        pass

    def unregister(self, fd: int) -> None:
        pass

    def close(self) -> None:
        pass

    def poll(self, timeout: float, _max_events: int) -> list[tuple[int, int]]:
        if self.ready:
            return self.ready.pop(0)
        assert timeout >= 0, "nothing would ever wake it"
        self.slept.append(timeout)
        self._clock.now += timeout
        return []


@pytest.fixture
def epoll(monkeypatch: pytest.MonkeyPatch) -> SleepingEpoll:
    made = SleepingEpoll(Clock())
    monkeypatch.setattr(select, "epoll", lambda: made)
    return made


@pytest.fixture
def loop(epoll: SleepingEpoll) -> Iterator[Loop]:
    made = Loop(epoll._clock)
    yield made
    made.close()


def test_timers_are_called_in_the_order_of_their_time(loop: Loop, epoll: SleepingEpoll) -> None:
    called: list[str] = []
    loop.call_later(2, lambda: called.append("second"))
    loop.call_later(1, lambda: called.append("first"))
    loop.call_later(2, lambda: called.append("third"))
    loop.call_later(3, loop.stop)
    loop.run()
    assert called == ["first", "second", "third"]
    assert epoll.slept == [1, 1, 1, 0]


def test_cancelled_timer_is_not_called_and_not_waited_for(loop: Loop, epoll: SleepingEpoll) -> None:
    called: list[str] = []
    loop.call_later(1, lambda: called.append("no")).cancel()
    loop.call_later(5, loop.stop)
    loop.run()
    assert not called
    assert epoll.slept == [5, 0]


def test_timer_may_set_another(loop: Loop, epoll: SleepingEpoll) -> None:
    def again() -> None:
        loop.call_later(2, loop.stop)

    loop.call_later(1, again)
    loop.run()
    assert epoll.slept == [1, 2, 0]


def test_loop_that_a_timer_stopped_waits_for_nothing(loop: Loop, epoll: SleepingEpoll) -> None:
    loop.call_later(0, loop.stop)
    loop.call_later(9, lambda: None)
    loop.run()
    assert epoll.slept == [0]


def test_handler_is_called_with_what_is_there(loop: Loop, epoll: SleepingEpoll) -> None:
    called: list[tuple[int, int]] = []
    loop.add(7, READABLE, lambda events: called.append((7, events)))
    epoll.ready = [[(7, READABLE)], [(7, 16)]]
    loop.call_later(1, loop.stop)
    loop.run()
    assert called == [(7, READABLE), (7, 16)]


def test_handler_that_was_removed_in_this_turn_is_not_called(
    loop: Loop, epoll: SleepingEpoll
) -> None:
    called: list[int] = []

    def first(_events: int) -> None:
        called.append(7)
        loop.remove(8)

    loop.add(7, READABLE, first)
    loop.add(8, READABLE, lambda _events: called.append(8))
    epoll.ready = [[(7, READABLE), (8, READABLE)]]
    loop.call_later(1, loop.stop)
    loop.run()
    assert called == [7]


def test_all_callbacks_of_a_turn_are_done_before_it_stops(loop: Loop, epoll: SleepingEpoll) -> None:
    called: list[int] = []
    handlers: list[Callable[[int], None]] = [
        lambda _events: loop.stop(),
        lambda _events: called.append(8),
    ]
    for fd, handler in zip((7, 8), handlers, strict=True):
        loop.add(fd, READABLE, handler)
    epoll.ready = [[(7, READABLE), (8, READABLE)], [(8, READABLE)]]
    loop.run()
    assert called == [8]


def test_removing_what_is_not_there_does_nothing(loop: Loop) -> None:
    loop.remove(99)


def test_real_descriptors_are_waited_for() -> None:
    loop = Loop()
    ours, theirs = socket.socketpair()
    got: list[bytes] = []

    def readable(_events: int) -> None:
        got.append(os.read(ours.fileno(), 10))
        loop.change(ours.fileno(), 0)
        loop.remove(ours.fileno())
        loop.stop()

    with ours, theirs:
        loop.add(ours.fileno(), READABLE, readable)
        theirs.send(b"x")
        loop.run()
    loop.close()
    assert got == [b"x"]


def test_what_is_for_the_next_turn_lets_others_have_theirs() -> None:
    loop = Loop()
    ours, theirs = socket.socketpair()
    order: list[str] = []

    def again() -> None:
        order.append("again")
        if len(order) < 4:
            loop.next_turn(again)
        else:
            loop.stop()

    loop.add(ours.fileno(), READABLE, lambda _events: order.append(ours.recv(10).decode()))
    loop.next_turn(again)
    theirs.send(b"other")
    loop.run()
    assert order == ["other", "again", "again", "again"]
    for each in (ours, theirs, loop):
        each.close()
