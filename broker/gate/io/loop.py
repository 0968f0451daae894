"""The event loop of the gate: level-triggered epoll, callbacks, timers.

Not trio's: a wake-up there costs a re-arm of the descriptor and a task switch, which is a fifth of a round
trip (docs/decisions/0001-the-gate-has-its-own-loop.md). All callbacks are synchronous and short; one that
raises is a defect of ours and ends the gate, so whoever serves a peer contains the peer.
"""

import heapq
import itertools
import select
import time
from collections.abc import Callable
from typing import Final

READABLE: Final = select.EPOLLIN
WRITABLE: Final = select.EPOLLOUT
# Events that come whether asked for or not.
BROKEN: Final = select.EPOLLHUP | select.EPOLLERR
MAX_EVENTS: Final = 64

Handler = Callable[[int], None]


class Timer:
    """A call at some time. Cancelled ones stay in the heap until then, without their callback."""

    __slots__ = ("callback", "when")

    def __init__(self, callback: Callable[[], None], when: float) -> None:
        self.callback: Callable[[], None] | None = callback
        self.when: Final = when  # of the loop's clock

    def cancel(self) -> None:
        """Do not call."""
        self.callback = None


class Loop:
    """File descriptors and timers, and what to call for them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._epoll: Final = select.epoll()
        self._handlers: Final[dict[int, Handler]] = {}
        self._timers: Final[list[tuple[float, int, Timer]]] = []
        self._next_turn: list[Callable[[], None]] = []
        self._order: Final = itertools.count()
        self._clock: Final = clock
        self._running = True

    def add(self, fd: int, events: int, handler: Handler) -> None:
        """Call `handler(events)` when one of `events` is there."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def replace(self, fd: int, handler: Handler) -> None:
        """Call somebody else for a descriptor that is there."""
        self._handlers[fd] = handler

    def change(self, fd: int, events: int) -> None:
        """Wait for other events."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget a descriptor. Call it before closing it: the number may come back at once."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call once, after that time."""
        return self.call_at(self._clock() + seconds, callback)

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call once, at that time of the clock."""
        timer = Timer(callback, when)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def next_turn(self, callback: Callable[[], None]) -> None:
        """Call once, when everybody else had their turn."""
        self._next_turn.append(callback)

    def stop(self) -> None:
        """Return from `run` when the present callbacks are done."""
        self._running = False

    def run(self) -> None:
        """Serve until stopped."""
        handlers = self._handlers
        poll = self._epoll.poll
        while self._running:
            timeout = self._run_timers() if self._timers else -1
            if self._next_turn:
                timeout = 0
            for fd, events in poll(timeout, MAX_EVENTS):
                # An earlier callback of this turn may have closed it.
                handler = handlers.get(fd)
                if handler is not None:
                    handler(events)
            if self._next_turn:
                callbacks, self._next_turn = self._next_turn, []
                for callback in callbacks:
                    callback()

    def close(self) -> None:
        """Give the epoll descriptor back."""
        self._epoll.close()

    def _run_timers(self) -> float:
        """Call what is due; return the seconds to the next one, -1 for none."""
        while self._timers and self._running:
            when, _, timer = self._timers[0]
            left = when - self._clock()
            if timer.callback is not None and left > 0:
                return left
            heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
        return -1 if self._running else 0
