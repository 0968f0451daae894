"""Refusals are told one by one up to a number a second, in texts of bounded length."""

from collections.abc import Iterator

import msgspec
import pytest

from broker.control_protocol.messages import MAX_DENIAL_TEXT, Denied, Event
from broker.gate.event_journal import MAX_DENIALS, EventJournal
from broker.gate.filter.bus_state import BusState
from broker.gate.filter.denials import Denial
from broker.gate.io.loop import Loop
from broker.gate.sandbox.denial_reports import REPORTS_PER_SECOND, DenialReports, is_news
from policy.rules import Identity
from tests.helpers.modelbus import make_bus

SHORT = Denial("send", "call", "org.a", "/a", "a.b", "Do", "no rule", "")
LONG = Denial("send", "call", *(part * 2**20 for part in ("a", "/a", "a.b", "M", "why", "from")))
MIB = 1024 * 1024


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class World:
    def __init__(self) -> None:
        self.clock = Clock()
        self.loop = Loop(self.clock)
        self.told: list[Denied] = []
        self.reports = DenialReports(self.loop, "c0", self.emit)

    def emit(self, event: Event) -> None:
        assert isinstance(event, Denied)
        self.told.append(event)

    def turn(self, seconds: float) -> None:
        self.clock.now += seconds
        self.loop.call_later(0, self.loop.stop)
        self.loop.run()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.loop.close()


def test_refusal_is_told_as_it_was(world: World) -> None:
    world.reports.add("session", SHORT)
    (event,) = world.told
    texts = {name: getattr(event, name) for name in Denial._fields}
    assert Denial(**texts) == SHORT
    assert (event.sandbox, event.bus, event.more) == ("c0", "session", 0)


def test_long_texts_are_cut_and_marked(world: World) -> None:
    as_long_as_may_be = "/" + "x" * (MAX_DENIAL_TEXT - 1)
    world.reports.add("session", SHORT._replace(path=as_long_as_may_be))
    world.reports.add("session", SHORT._replace(path=as_long_as_may_be + "x"))
    whole, cut = (event.path for event in world.told)
    assert whole == as_long_as_may_be
    assert cut == as_long_as_may_be[:-1] + "…"
    world.reports.add("session", LONG)
    texts = [value for value in msgspec.structs.astuple(world.told[-1]) if isinstance(value, str)]
    assert max(map(len, texts)) == MAX_DENIAL_TEXT


def test_what_is_kept_of_refusals_has_a_bound_of_bytes(world: World) -> None:
    world.reports.add("session", LONG)
    kept = EventJournal()
    for _ in range(2 * MAX_DENIALS):
        kept.add(world.told[0], was_sent=True)
    assert len(msgspec.msgpack.encode(kept)) < 2 * MIB


def test_too_many_a_second_are_counted(world: World) -> None:
    for _ in range(REPORTS_PER_SECOND + 3):
        world.reports.add("session", SHORT)
    assert len(world.told) == REPORTS_PER_SECOND
    world.turn(1.1)
    assert [event.more for event in world.told[REPORTS_PER_SECOND:]] == [3]
    world.reports.add("session", SHORT)
    assert world.told[-1].path == "/a"


@pytest.mark.parametrize(
    ("changes", "news"),
    [
        ({}, False),
        ({"interface": "org.buswarden.Broker1"}, False),
        ({"peer": ":1.5"}, True),  # a sandbox that gives itself out for the broker
        ({"direction": "send"}, True),
        ({"kind": "call"}, True),
        ({"interface": "org.example.I"}, True),
    ],
)
def test_attack_c8_refusals_of_the_brokers_own_signals_are_no_news(
    changes: dict[str, str], news: bool
) -> None:
    bus = make_bus()
    bus.identities[":1.5"] = Identity(type="org.example.T", app="a")
    denial = Denial(
        direction="receive",
        kind="signal",
        peer=":1.3",
        path="/org/freedesktop/DBus",
        interface="org.freedesktop.DBus.Containers1",
        member="InstanceRemoved",
        reason="no rule",
        origin="",
    )._replace(**changes)
    assert is_news(FakeCore(bus), denial) is news  # type: ignore[arg-type]


class FakeCore:
    def __init__(self, bus: BusState) -> None:
        self.bus = bus
