"""Common ground of the watches over processes and cgroups.

Theory of operation. `_has_ended` is the only judge of whether a thing has ended. All else says when to ask it: the
kernel, told by `_arm` to report on a key, or a look at intervals, for keys that the kernel cannot tell of.
To look once too often costs a little time, and nothing else, so nothing is tracked more exactly than that.

Several holders may wait for a key, and for different things of the same key: a pid and a path are used again, so a
holder may wait for a thing whose key another thing has by now.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Final, Generic, TypeVar

import trio

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
OnEnd = Callable[[], None]
Judge = Callable[[T], bool | None]


class Watched(Generic[K, T]):
    """Things with an end, each watched for any number of holders.

    A kind of thing is a subclass.
    """

    def __init__(self, *, look_every: float, interval: str, looks_a_turn: int) -> None:
        self._look_every: Final = look_every  # seconds, at keys that the kernel does not tell of
        self._interval: Final = interval  # the same in words
        self._looks_a_turn: Final = looks_a_turn
        self._watched: Final[dict[K, dict[str, tuple[T, OnEnd]]]] = {}
        self._by_hand: Final[set[K]] = set()
        self._has_by_hand = trio.Event()

    def __len__(self) -> int:
        return len(self._watched)

    @property
    def method(self) -> str:
        """The way in which ends are noticed now, in words."""
        by_hand = f", {len(self._by_hand)} looked at {self._interval}" if self._by_hand else ""
        return f"{self._kernel_method()}{by_hand}"

    def watch(self, holder: str, thing: T, on_end: OnEnd) -> None:
        """Call `on_end` once the thing has ended: at once, for an end before the call."""
        key = self._key(thing)
        self._watched.setdefault(key, {})[holder] = (thing, on_end)
        self._arm(key)

    def forget(self, holder: str, thing: T) -> None:
        """Undo `watch`. Harmless if the thing has ended, or was never watched."""
        key = self._key(thing)
        holders = self._watched.get(key, {})
        if holders.pop(holder, None) is not None and not holders:
            del self._watched[key]
            self._by_hand.discard(key)
            self._disarm(key)

    # -- what a kind of thing has to say ----------------------------------------------------------------

    def _key(self, thing: T) -> K:
        """Return the kernel's name for a thing."""
        raise NotImplementedError

    def _has_ended(self, thing: T) -> bool | None:
        """Return whether a thing has ended; None if that cannot be seen now."""
        raise NotImplementedError

    def _arm(self, key: K) -> None:
        """Let the kernel tell of a key, or call `_look_later`; then `_look`."""
        raise NotImplementedError

    def _disarm(self, key: K) -> None:
        """Let the kernel tell of a key no more. Harmless if the kernel does not."""
        raise NotImplementedError

    def _kernel_method(self) -> str:
        """Return the kernel's way to report ends, in words."""
        raise NotImplementedError

    def _look_by_hand(self, keys: Sequence[K]) -> None:
        """Look at some of the keys that the kernel does not tell of."""
        raise NotImplementedError

    # -- looking ----------------------------------------------------------------------------------------

    def _look(self, key: K, has_ended: Judge[T] | None = None) -> bool:
        """Call back the holders of ended things; return whether there were any."""
        judge = self._has_ended if has_ended is None else has_ended
        found = False
        for holder, (thing, on_end) in list(self._watched.get(key, {}).items()):
            ended = judge(thing)
            if ended is None:
                self._look_later(key)
            elif ended:
                self.forget(holder, thing)
                on_end()
                found = True
        return found

    def _look_later(self, key: K) -> None:
        """Look at a key at the next interval."""
        self._by_hand.add(key)
        self._has_by_hand.set()

    async def _for_each(self, do: Callable[[K], object]) -> None:
        """Do something with every key, and let other tasks run meanwhile."""
        for number, key in enumerate(list(self._watched), 1):
            do(key)
            if not number % self._looks_a_turn:
                await trio.lowlevel.checkpoint()

    async def _keep_looking(self) -> None:
        """Look at intervals, until cancelled, at the keys that the kernel does not tell of."""
        while True:
            await self._has_by_hand.wait()
            await trio.sleep(self._look_every)
            keys = list(self._by_hand)
            for start in range(0, len(keys), self._looks_a_turn):
                self._look_by_hand(keys[start : start + self._looks_a_turn])
                await trio.lowlevel.checkpoint()
            if not self._by_hand:
                self._has_by_hand = trio.Event()
