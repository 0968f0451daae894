"""Who is who on a bus, for how long, and how it says that a name is not there."""

from pathlib import Path

import msgspec
import pytest

from broker.control_protocol.messages import BusSpec
from broker.gate.filter.bus_state import (
    ABSENT_UNIQUE,
    MAX_LATE,
    MAX_LATE_RULES,
    UNKNOWN,
    BusState,
)
from broker.gate.name_ledger import NameLedger
from broker.wire import errors
from policy.match import Judge
from policy.rules import Access, AccessList, Identity, Peer, Rule
from tests.helpers.modelbus import ABSENT

APP = Identity(type="org.test", app="app")


class Member:
    def __init__(self) -> None:
        self.strangers: list[str] = []

    def forget_about(self, *names: str) -> None:
        self.strangers += names

    def forget_all(self) -> None:
        self.strangers.append("*")


def make_bus(*members: Member, folder: Path | None = None) -> BusState:
    bus = BusState("session", "unix:path=/x", NameLedger(folder), ABSENT)
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


def test_connection_that_the_bus_let_go_of_is_known_as_long_as_its_messages_may_come() -> None:
    bus = make_bus(Member())
    bus.connected(":1.5", "c1", APP)
    bus.gone(":1.5")
    bus.gone(":1.9")
    assert (bus.peer(":1.5"), bus.who(":1.5")) == (APP, "c1")
    assert (bus.peer(":1.9"), bus.who(":1.9")) == (None, None)


def test_attack_i1_who_left_last_is_no_host() -> None:
    member = Member()
    bus = make_bus(member)
    bus.connected(":1.5", "c1", APP)
    bus.members.discard(member)
    bus.gone(":1.5")
    assert bus.peer(":1.5") == APP


def test_attack_i1_flood_of_others_makes_nobody_a_host() -> None:
    bus = make_bus(Member())
    bus.connected(":1.1", "c2", APP)  # and lingers
    for n in range(2, MAX_LATE + 12):
        bus.connected(f":1.{n}", "c1", APP)
        bus.gone(f":1.{n}")
    assert len(bus.identities) == len(bus.sandboxes) == MAX_LATE + 1
    assert bus.who(":1.1") == "c2"
    assert (bus.peer(":1.11"), bus.who(":1.11")) == (UNKNOWN, "")
    assert (bus.peer(":1.12"), bus.who(":1.12")) == (APP, "c1")
    assert (bus.peer(":1.0"), bus.who(":1.0")) == (None, None)


def test_attack_i1_next_gate_knows_whom_the_one_that_died_had(tmp_path: Path) -> None:
    bus = make_bus(folder=tmp_path)
    bus.authenticated("a" * 32)
    bus.connected(":1.5", "c1", APP)
    after = make_bus(folder=tmp_path)
    assert after.who(":1.5") is None  # nobody may rely on that:
    assert after.ledger.is_doubtful(":1.5")
    assert not after.ledger.is_doubtful(":1.6")
    after.authenticated("a" * 32)
    assert (after.peer(":1.5"), after.who(":1.5")) == (UNKNOWN, "")
    assert after.peer(":1.6") is None
    another = make_bus(folder=tmp_path)
    another.authenticated("b" * 32)
    assert not another.ledger.is_doubtful(":1.5")
    assert another.peer(":1.5") is None


def make_speaker(rules: int) -> Judge:
    one = Rule(access=frozenset({Access.SEND}), peer=Peer(kind="same-app"))
    return Judge(AccessList(rules=(one,) * rules), bus="session", me=APP)


def leave(bus: BusState, judge: Judge, *names: str) -> None:
    for name in names:
        bus.connected(name, "c1", APP)
        bus.set_broadcast_judge(name, judge)
    for name in names:
        bus.gone(name)


def kept_rules(bus: BusState) -> int:
    return sum(len(judge.access.rules) for judge in set(bus.broadcast_judges.values()))


def test_attack_i1_lists_of_those_who_left_do_not_pile_up() -> None:
    """The lists that are kept are bounded, because a hand-over compiles them all."""
    bus, size = make_bus(), MAX_LATE_RULES // 8
    for n in range(0, 60, 3):
        leave(bus, make_speaker(size), *(f":1.{n + more}" for more in range(3)))
        assert kept_rules(bus) <= MAX_LATE_RULES
    assert kept_rules(bus) == MAX_LATE_RULES
    assert [bus.who(f":1.{n}") for n in (0, 35, 36, 59)] == ["", "", "c1", "c1"]
    assert bus.peer(":1.0") is UNKNOWN
    after = make_bus()
    after.load(bus.dump())
    assert after.dump() == bus.dump()
    for either in (after, bus):
        leave(either, make_speaker(size), ":1.70")
        assert kept_rules(either) == MAX_LATE_RULES
    assert after.dump() == bus.dump()


def test_newest_list_is_kept_however_long_it_is() -> None:
    bus = make_bus()
    leave(bus, make_speaker(1), ":1.4")
    leave(bus, make_speaker(MAX_LATE_RULES + 1), ":1.5", ":1.6")
    assert [bus.who(name) for name in (":1.4", ":1.5", ":1.6")] == ["", "c1", "c1"]
    for n in range(10, 10 + MAX_LATE):
        bus.connected(f":1.{n}", "c1", APP)
        bus.gone(f":1.{n}")
    assert not bus.broadcast_judges
    leave(bus, make_speaker(1), ":1.9999")
    assert kept_rules(bus) == 1


def test_names_of_a_gate_that_wrote_none_down_are_written_down(tmp_path: Path) -> None:
    old = make_bus()
    old.authenticated("a" * 32)
    old.connected(":1.5", "c1", APP)
    new = make_bus(folder=tmp_path)
    new.load(msgspec.structs.replace(old.dump(), spans=()))
    new.resume()
    after = make_bus(folder=tmp_path)
    after.authenticated("a" * 32)
    assert after.peer(":1.5") is UNKNOWN


class Rest:
    def __init__(self, bus: BusState, name: str) -> None:
        self._bus, self._name = bus, name

    def close(self) -> None:
        del self._bus.lingering[self._name]
        self._bus.gone(self._name)


def test_attack_i1_name_of_a_bus_that_was_is_not_what_a_lingering_one_makes_it() -> None:
    bus = make_bus()
    bus.authenticated("a" * 32)
    bus.connected(":1.5", "c1", APP)
    bus.lingering[":1.5"] = Rest(bus, ":1.5")
    bus.authenticated("b" * 32)
    assert not bus.lingering
    assert bus.peer(":1.5") is None
    bus.gone(":1.5")
    assert bus.peer(":1.5") is None


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


def test_attack_i2_bus_has_read_all_when_each_has_been_read_or_let_go_of() -> None:
    bus, passed = make_bus(), []
    for name in (":1.5", ":1.6", ":1.7"):
        bus.connected(name, "c1", APP)
    bus.gone(":1.5")
    bus.wait_read(3, lambda: passed.append(3))
    bus.has_read(":1.6", 3)
    bus.has_read(":1.7", 4)
    bus.has_read(":1.6", 3)
    assert not passed
    bus.gone(":1.7")
    assert passed == [3]
    bus.wait_read(4, lambda: passed.append(4))
    assert passed == [3]
    bus.has_read(":1.6", 4)
    assert passed == [3, 4]


def test_bus_that_nobody_has_sent_anything_has_read_it() -> None:
    passed: list[int] = []
    make_bus().wait_read(1, lambda: passed.append(1))
    assert passed == [1]


# -- wording -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["call", "unique", "call-no-start", "GetNameOwner", "Other"])
def test_it_words_as_dbus_daemon_until_it_was_heard(question: str) -> None:
    bus = make_bus()
    assert not bus.knows_absent_name_errors
    error, text = bus.absent_name_error(question, "org.x")
    assert error in (errors.SERVICE_UNKNOWN, errors.NAME_HAS_NO_OWNER)
    assert "org.x" in text
    assert "\0" not in text


@pytest.mark.parametrize("asked", [ABSENT, ABSENT_UNIQUE], ids=["name", "unique"])
def test_it_words_as_it_was_heard(asked: str) -> None:
    bus = make_bus()
    bus.learn_absent_name_error("call", asked, errors.SERVICE_UNKNOWN, f"nobody is {asked}, sorry")
    assert bus.knows_absent_name_errors
    assert bus.absent_name_error("call", "org.x") == (
        errors.SERVICE_UNKNOWN,
        "nobody is org.x, sorry",
    )


def test_answer_that_says_something_else_is_not_learned() -> None:
    bus = make_bus()
    bus.learn_absent_name_error("call", ABSENT, errors.ACCESS_DENIED, "no")
    assert not bus.knows_absent_name_errors


class _Link:
    def __init__(self) -> None:
        self.closed: list[str] = []

    def close(self, reason: str) -> None:
        self.closed.append(reason)

    def ask_if_read(self, number: int) -> None:
        self.closed.append(str(number))


def test_nobody_of_a_bus_that_was_is_known_on_the_one_that_took_its_place() -> None:
    bus = make_bus()
    link = _Link()
    bus.authenticated("a" * 32)
    bus.connections.add(link)
    bus.connected(":1.5", "c0", Identity(type="a.b", app="c"))
    bus.authenticated("a" * 32)
    assert not link.closed
    assert bus.identities
    bus.authenticated("b" * 32)
    assert link.closed
    assert not bus.identities
    assert not bus.sandboxes
