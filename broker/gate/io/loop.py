"""The event loop of the gate: level-triggered epoll, callbacks, timers.

The gate does not use trio, because a wake-up there costs a re-arm of the descriptor and a task
switch, which is a fifth of a round trip (docs/decisions/0001-the-gate-has-its-own-loop.md). All
callbacks are synchronous and short. A callback that raises ends the gate. So the code that serves a
peer has to catch the errors that the peer can cause.

    one turn:  due timers -> epoll_wait -> handlers of ready descriptors -> callbacks of `next_turn`
"""

import heapq
import itertools
import select
import time
from collections.abc import Callable
from typing import Final

READABLE: Final = select.EPOLLIN
WRITABLE: Final = select.EPOLLOUT
# Events that epoll always reports.
BROKEN: Final = select.EPOLLHUP | select.EPOLLERR
MAX_EVENTS: Final = 64

Handler = Callable[[int], None]


class Timer:
    """A call at a time of the loop's clock.

    A cancelled timer stays in the heap without callback.
    """

    __slots__ = ("callback", "when")

    def __init__(self, callback: Callable[[], None], when: float) -> None:
        self.callback: Callable[[], None] | None = callback
        self.when: Final = when  # of the loop's clock

    def cancel(self) -> None:
        """Drop the callback."""
        self.callback = None


class Loop:
    """File descriptors and timers, with a callback for each."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._epoll: Final = select.epoll()
        self._handlers: Final[dict[int, Handler]] = {}
        self._timers: Final[list[tuple[float, int, Timer]]] = []
        self._next_turn: list[Callable[[], None]] = []
        self._order: Final = itertools.count()
        self._clock: Final = clock
        self._running = True

    def add(self, fd: int, events: int, handler: Handler) -> None:
        """Call `handler(events)` when the descriptor has one of `events`."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def replace(self, fd: int, handler: Handler) -> None:
        """Set another handler for a descriptor in the loop."""
        self._handlers[fd] = handler

    def change(self, fd: int, events: int) -> None:
        """Set other events for a descriptor in the loop."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Remove a descriptor.

        Remove a descriptor before closing, because the kernel may reuse the number at once.
        """
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` once, after `seconds`."""
        return self.call_at(self._clock() + seconds, callback)

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` once, at the time `when` of the loop's clock."""
        timer = Timer(callback, when)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def next_turn(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, after all handlers of this turn."""
        self._next_turn.append(callback)

    def stop(self) -> None:
        """Make `run` return after the present callbacks."""
        self._running = False

    def run(self) -> None:
        """Call handlers and timers until `stop`."""
        handlers = self._handlers
        poll = self._epoll.poll
        while self._running:
            timeout = self._run_timers() if self._timers else -1
            if self._next_turn:
                timeout = 0
            for fd, events in poll(timeout, MAX_EVENTS):
                # An earlier handler of this turn may have removed the descriptor.
                handler = handlers.get(fd)
                if handler is not None:
                    handler(events)
            if self._next_turn:
                callbacks, self._next_turn = self._next_turn, []
                for callback in callbacks:
                    callback()

    def close(self) -> None:
        """Close the epoll descriptor."""
        self._epoll.close()

    def _run_timers(self) -> float:
        """Call the due timers. Return the seconds to the next timer, or -1 without timers."""
        while self._timers and self._running:
            when, _, timer = self._timers[0]
            left = when - self._clock()
            if timer.callback is not None and left > 0:
                return left
            heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
        return -1 if self._running else 0
