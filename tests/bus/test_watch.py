from typing import Any

import pytest

from broker.bus.connection import Signal
from broker.bus.watch import NameWatch
from tests.helpers.fakes import FakeBus


class Watched:
    def __init__(self) -> None:
        self.bus = FakeBus(users={":1.1": 0})
        self.gone: list[str] = []
        self.watch = NameWatch(self.bus)
        self.watch.on_gone = self.gone.append

    def matches(self) -> list[str]:
        return [member for member, _ in self.bus.sent]


@pytest.fixture
def watched() -> Watched:
    return Watched()


def owner_changed(name: str, new: str = "", **fields: Any) -> Signal:
    driver = "org.freedesktop.DBus"
    defaults: dict[str, Any] = {
        "sender": driver,
        "path": "/org/freedesktop/DBus",
        "interface": driver,
        "member": "NameOwnerChanged",
        "signature": "sss",
        "values": [name, name, new],
    }
    return Signal(**{**defaults, **fields})


def test_one_match_is_added_for_each_name_and_removed_with_the_last(watched: Watched) -> None:
    for _ in range(2):
        watched.watch.add(":1.1")
    assert watched.matches() == ["AddMatch"]
    assert "arg0=':1.1',arg2=''" in watched.bus.sent[0][1]
    watched.watch.discard(":1.1")
    assert ":1.1" in watched.watch
    watched.watch.discard(":1.1")
    watched.watch.discard(":1.1")
    assert ":1.1" not in watched.watch
    assert watched.matches() == ["AddMatch", "RemoveMatch"]


def test_who_leaves_is_told_once(watched: Watched) -> None:
    watched.watch.add(":1.1")
    watched.watch.take(owner_changed(":1.1", new=":1.2"))
    watched.watch.take(owner_changed(":1.9"))
    assert watched.gone == []
    watched.watch.take(owner_changed(":1.1"))
    watched.watch.take(owner_changed(":1.1"))
    assert watched.gone == [":1.1"]
    assert watched.matches() == ["AddMatch", "RemoveMatch"]
    watched.watch.discard(":1.1")
    assert watched.matches() == ["AddMatch", "RemoveMatch"]


@pytest.mark.parametrize(
    "fields",
    [{"sender": ":1.66"}, {"member": "NameLost"}, {"signature": "s", "values": [":1.1"]}],
)
def test_only_the_bus_is_believed(watched: Watched, fields: dict[str, Any]) -> None:
    watched.watch.add(":1.1")
    watched.watch.take(owner_changed(":1.1", **fields))
    assert watched.gone == []


async def test_who_was_gone_already_is_found(watched: Watched) -> None:
    watched.watch.add(":1.1")
    watched.watch.add(":1.5")
    await watched.watch.check()
    assert watched.gone == [":1.5"]


def test_nobody_has_to_listen() -> None:
    watch = NameWatch(FakeBus())
    watch.add(":1.1")
    watch.take(owner_changed(":1.1"))
    assert ":1.1" not in watch
