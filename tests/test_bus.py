"""Who is who on a bus, for how long, and how it says that a name is not there."""

import pytest

from broker.gate.bus import ABSENT, ABSENT_UNIQUE, MAX_LATE, Bus
from broker.gate.control import BusSpec
from broker.wire import errors
from policy.rules import Identity

APP = Identity(type="org.test", app="app")


class Member:
    def __init__(self) -> None:
        self.strangers: list[str] = []

    def stranger_appeared(self, unique_name: str) -> None:
        self.strangers.append(unique_name)

    def forget_verdicts(self) -> None:
        self.strangers.append("*")


def make_bus(*members: Member) -> Bus:
    bus = Bus("session", "unix:path=/x")
    bus.members.update(members)
    return bus


def test_spec_is_what_the_supervisor_said() -> None:
    assert make_bus().spec() == BusSpec(name="session", address="unix:path=/x")


def test_members_hear_of_a_new_identity() -> None:
    member = Member()
    bus = make_bus(member)
    bus.connected(":1.5", "c1", APP)
    assert member.strangers == [":1.5"]
    assert (bus.identities, bus.sandboxes) == ({":1.5": APP}, {":1.5": "c1"})


def test_closed_connection_is_known_as_long_as_its_messages_may_come() -> None:
    bus = make_bus(Member())
    bus.connected(":1.5", "c1", APP)
    bus.gone(":1.5")
    bus.gone(":1.9")
    assert bus.identities == {":1.5": APP}
    assert not bus.sandboxes


def test_closed_connections_are_forgotten_when_nobody_is_left() -> None:
    member = Member()
    bus = make_bus(member)
    for name in (":1.5", ":1.6"):
        bus.connected(name, "c1", APP)
    bus.gone(":1.5")
    bus.members.discard(member)
    bus.gone(":1.6")
    assert not bus.identities


def test_closed_connections_are_bounded() -> None:
    bus = make_bus(Member())
    bus.connected(":2.1", "c2", APP)
    for n in range(MAX_LATE + 10):
        bus.connected(f":1.{n}", "c1", APP)
        bus.gone(f":1.{n}")
    assert len(bus.identities) == MAX_LATE + 1
    assert ":1.9" not in bus.identities
    assert ":1.10" in bus.identities


def test_unique_name_that_comes_back_stays() -> None:
    # A bus that started anew counts from the beginning.
    member = Member()
    bus = make_bus(member)
    bus.connected(":1.5", "c1", APP)
    bus.gone(":1.5")
    other = Identity(type="org.test", app="other")
    bus.connected(":1.5", "c2", other)
    for n in range(10, MAX_LATE + 20):
        bus.connected(f":1.{n}", "c1", APP)
        bus.gone(f":1.{n}")
    assert bus.identities[":1.5"] == other


# -- wording -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["call", "unique", "call-no-start", "GetNameOwner", "Other"])
def test_it_words_as_dbus_daemon_until_it_was_heard(question: str) -> None:
    bus = make_bus()
    assert not bus.wording_known
    error, text = bus.no_such_name(question, "org.x")
    assert error in (errors.SERVICE_UNKNOWN, errors.NAME_HAS_NO_OWNER)
    assert "org.x" in text
    assert "\0" not in text


@pytest.mark.parametrize("asked", [ABSENT, ABSENT_UNIQUE], ids=["name", "unique"])
def test_it_words_as_it_was_heard(asked: str) -> None:
    bus = make_bus()
    bus.learn_wording("call", asked, errors.SERVICE_UNKNOWN, f"nobody is {asked}, sorry")
    assert bus.wording_known
    assert bus.no_such_name("call", "org.x") == (errors.SERVICE_UNKNOWN, "nobody is org.x, sorry")


def test_answer_that_says_something_else_is_not_learned() -> None:
    bus = make_bus()
    bus.learn_wording("call", ABSENT, errors.ACCESS_DENIED, "no")
    assert not bus.wording_known


class _Link:
    def __init__(self) -> None:
        self.closed: list[str] = []

    def close(self, reason: str) -> None:
        self.closed.append(reason)


def test_nobody_of_a_bus_that_was_is_known_on_the_one_that_took_its_place() -> None:
    bus = Bus("session", "unix:path=/x")
    link = _Link()
    bus.met("a" * 32)
    bus.links.add(link)
    bus.connected(":1.5", "c0", Identity(type="a.b", app="c"))
    bus.met("a" * 32)
    assert not link.closed
    assert bus.identities
    bus.met("b" * 32)
    assert link.closed
    assert not bus.identities
    assert not bus.sandboxes
