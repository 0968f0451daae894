"""When those who want header field 10 are told that they have it."""

import pytest

from broker.control_protocol.messages import Answer, Done, Refused
from broker.gate.filter.bus_state import BusState
from broker.gate.instance_field import BARRIER_SECONDS, PAUSE, InstanceFieldRounds
from broker.gate.io.loop import Loop
from policy.rules import Identity
from tests.helpers.modelbus import make_bus

APP = Identity(type="org.test", app="app")


class Link:
    """A connection of a sandbox, which the bus reads when the test says so."""

    def __init__(self, bus: BusState, name: str) -> None:
        self._bus, self._name = bus, name
        self.asked: list[int] = []
        self.forgot = 0
        bus.connected(name, "c1", APP)
        bus.connections.add(self)
        bus.members.add(self)

    def close(self, reason: str) -> None:
        raise AssertionError(reason)

    def ask_if_read(self, number: int) -> None:
        self.asked.append(number)

    def forget_about(self, *names: str) -> None:
        pass

    def forget_all(self) -> None:
        self.forgot += 1

    def read(self) -> None:
        for number in self.asked:
            self._bus.has_read(self._name, number)


class Stage:
    def __init__(self) -> None:
        self.now = 0.0
        self.loop = Loop(lambda: self.now)
        self.answers: dict[int, Answer] = {}
        self.tagging = InstanceFieldRounds(self.loop, self.answers.__setitem__)
        self.bus = make_bus()

    def wish(self, name: str, serial: int) -> None:
        self.tagging.wish(self.bus, name, serial)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.loop._run_timers()

    @property
    def done(self) -> list[int]:
        return [serial for serial, answer in self.answers.items() if answer == Done()]

    @property
    def refused(self) -> list[int]:
        return [serial for serial, answer in self.answers.items() if isinstance(answer, Refused)]


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_wish_is_answered_when_the_bus_has_read_all(stage: Stage) -> None:
    link = Link(stage.bus, ":1.5")
    stage.wish(":1.1", 7)
    assert stage.bus.wants_instance_field == {":1.1"}
    assert link.forgot == 1
    assert not stage.answers
    link.read()
    assert stage.done == [7]


def test_attack_i2_second_wish_is_not_answered_before_the_first(stage: Stage) -> None:
    link = Link(stage.bus, ":1.5")
    stage.wish(":1.1", 7)
    stage.wish(":1.1", 8)
    assert not stage.answers
    link.read()
    assert stage.done == [7, 8]
    stage.wish(":1.1", 9)
    assert stage.done == [7, 8, 9]


@pytest.mark.parametrize("why", ["upgrade", "slow bus"])
def test_attack_i2_wish_that_was_refused_is_no_wish(stage: Stage, why: str) -> None:
    """A refused wish waits anew: messages without the field may be on their way."""
    Link(stage.bus, ":1.5")
    stage.wish(":1.1", 7)
    stage.wish(":1.1", 8)
    stage.wish(":1.2", 9)
    if why == "upgrade":
        stage.tagging.give_up("later")
        assert stage.refused == [7, 8, 9]
    else:
        stage.wait(BARRIER_SECONDS)
        assert stage.refused == [7, 8]
        assert stage.bus.wants_instance_field == {":1.2"}
        stage.wait(BARRIER_SECONDS)
        assert stage.refused == [7, 8, 9]
    assert not stage.bus.wants_instance_field
    assert not stage.bus.barriers
    stage.wish(":1.1", 10)
    stage.wait(PAUSE)
    assert stage.bus.wants_instance_field == {":1.1"}
    assert not stage.done


def test_attack_i2_flood_of_wishes_asks_each_connection_a_few_times(stage: Stage) -> None:
    link = Link(stage.bus, ":1.5")
    for n in range(1000):
        stage.wish(f":1.{n + 100}", n)
        link.read()
    assert (len(link.asked), link.forgot) == (1, 1)
    assert stage.done == [0]
    stage.wait(PAUSE)
    link.read()
    assert (len(link.asked), link.forgot) == (2, 2)
    assert len(stage.done) == 1000
    for n in range(1000):
        stage.tagging.take_back(stage.bus, f":1.{n + 100}")
    assert link.forgot == 2
    assert not stage.bus.wants_instance_field


def test_where_nobody_is_asked_nobody_waits(stage: Stage) -> None:
    for n in range(50):
        stage.wish(f":1.{n}", n)
    assert stage.done == list(range(50))
    stage.wait(BARRIER_SECONDS)
    assert not stage.refused


def test_who_leaves_before_its_turn_is_not_tagged(stage: Stage) -> None:
    link = Link(stage.bus, ":1.5")
    stage.wish(":1.1", 7)
    stage.wish(":1.2", 8)
    stage.tagging.take_back(stage.bus, ":1.2")
    stage.tagging.take_back(stage.bus, ":1.1")
    link.read()
    stage.wait(PAUSE)
    assert stage.done == [8, 7]
    assert not stage.bus.wants_instance_field
    assert len(link.asked) == 1
