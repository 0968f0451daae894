"""The common ground of the watches: holders, ends, and looks at intervals."""

from collections.abc import Sequence

import trio
import trio.testing

from broker.supervisor.watches.watched import Watched


class Things(Watched[str, str]):
    """Things by the first letter of their names, of which no kernel tells."""

    def __init__(self) -> None:
        super().__init__(look_every=1.0, interval="each second", looks_a_turn=2)
        self.ended: dict[str, bool | None] = {}
        self.disarmed: list[str] = []

    def _key(self, thing: str) -> str:
        return thing[0]

    def _has_ended(self, thing: str) -> bool | None:
        return self.ended.get(thing, False)

    def _arm(self, key: str) -> None:
        self._look_later(key)
        self._look(key)

    def _disarm(self, key: str) -> None:
        self.disarmed.append(key)

    def _kernel_method(self) -> str:
        return "nothing"

    def _look_by_hand(self, keys: Sequence[str]) -> None:
        assert len(keys) <= 2
        for key in keys:
            self._look(key)


def test_each_holder_is_called_back_once() -> None:
    things, told = Things(), list[str]()
    for holder in ("h1", "h2"):
        things.watch(holder, "apple", lambda holder=holder: told.append(holder))  # type: ignore[misc]
    things.watch("h3", "avocado", lambda: told.append("h3"))  # another thing of the same key
    things.ended["apple"] = True
    assert things._look("a")
    assert not things._look("a")
    assert (told, len(things), things.disarmed) == (["h1", "h2"], 1, [])
    things.forget("h3", "avocado")
    things.forget("h3", "avocado")
    assert (told, len(things), things.disarmed) == (["h1", "h2"], 0, ["a"])
    assert things.method == "nothing"


def test_an_end_before_the_watch_is_told_at_once() -> None:
    things, told = Things(), list[str]()
    things.ended["apple"] = True
    things.watch("h1", "apple", lambda: told.append("h1"))
    assert (told, len(things)) == (["h1"], 0)


async def test_what_cannot_be_seen_is_looked_at_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    things, told = Things(), list[str]()
    for name in ("apple", "banana", "cherry"):
        things.ended[name] = None
        things.watch("h", name, lambda name=name: told.append(name))  # type: ignore[misc]
    assert things.method == "nothing, 3 looked at each second"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(things._keep_looking)
        await trio.sleep(1.5)
        assert told == []
        things.ended = {"apple": True, "cherry": True}
        await trio.sleep(1)
        assert sorted(told) == ["apple", "cherry"]
        assert things.method == "nothing, 1 looked at each second"
        nursery.cancel_scope.cancel()


async def test_other_tasks_run_between_slices() -> None:
    things, turns = Things(), list[str]()
    for letter in "abcde":
        things.watch("h", letter, lambda: None)

    async def other() -> None:
        while len(turns) < 5:
            turns.append("other")
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await things._for_each(turns.append)
    assert "other" in turns[turns.index("a") : turns.index("e")]
