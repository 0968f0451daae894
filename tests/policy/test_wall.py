"""The built-in rules between sandboxes and the broker: what they leave open, and that nothing else is."""

import pytest

from broker.api.containers1 import Containers1
from broker.api.management import Management
from broker.api.policy import PolicyInterface
from broker.wire.interfaces import BROKER_PATH, BROKER_POLICY, CONTAINERS1, DRIVER_PATH
from policy.match import Judge
from policy.rules import Access, AccessList, Identity, Rule
from policy.snaps.explain import Question, explain_list
from policy.wall import BROKER, WALL, walled

ME = Identity(type="org.test", app="me")
ANYTHING = Rule(access=frozenset(Access))
OPEN = {"GetConnectionInstance"}
EVERYTHING = walled(AccessList(rules=(ANYTHING,)))
OWNER = (":1.1", BROKER)


def may_send(path: str, interface: str | None, member: str, names: tuple[str, ...] = OWNER) -> bool:
    judge = Judge(EVERYTHING, bus="session", me=ME)
    return judge.send(names, path, interface, member, None).allowed


def members(made: object) -> list[str]:
    interface = made.interface()  # type: ignore[attr-defined]
    return [method.name for method in interface.methods]


def bare(kind: type) -> object:
    """Return an interface that is only asked what it has."""
    made: object = object.__new__(kind)
    made.__dict__.update(dict.fromkeys(("_context", "_supervisor", "_watch"), None))
    return made


def test_of_containers1_one_question_is_left() -> None:
    all_of_it = members(bare(Containers1))
    assert set(all_of_it) > OPEN
    assert {m for m in all_of_it if may_send(DRIVER_PATH, CONTAINERS1, m)} == OPEN
    # One that names no interface could be any of them.
    assert not any(may_send(DRIVER_PATH, None, m) for m in all_of_it)
    assert may_send(DRIVER_PATH, "org.freedesktop.DBus.Peer", "Ping")
    assert may_send(DRIVER_PATH, "org.freedesktop.DBus.Properties", "Get")


@pytest.mark.parametrize(
    ("kind", "interface"), [(Management, BROKER), (PolicyInterface, BROKER_POLICY)]
)
def test_of_management_nothing_is_left(kind: type, interface: str) -> None:
    for member in members(bare(kind)):
        for path in (BROKER_PATH, DRIVER_PATH, "/"):
            assert not may_send(path, interface, member)
            assert not may_send(path, interface, member, (":1.1", BROKER, "org.example.Alias"))
        assert not may_send(BROKER_PATH, None, member)
    assert not may_send(BROKER_PATH, "org.freedesktop.DBus.Properties", "GetAll")
    assert not may_send(BROKER_PATH, "org.freedesktop.DBus.Introspectable", "Introspect")


def test_others_are_not_behind_it() -> None:
    assert may_send(BROKER_PATH, BROKER, "List", (":1.2", "org.example.Other"))


def test_nobody_takes_the_brokers_name() -> None:
    judge = Judge(EVERYTHING, bus="session", me=ME)
    assert not judge.own(BROKER).allowed
    assert judge.own("org.buswarden.Other").allowed


def test_explanation_says_that_it_is_built_in() -> None:
    question = Question(
        access=Access.SEND,
        bus="session",
        names=(BROKER,),
        path=BROKER_PATH,
        interface=BROKER,
        member="ChangeAccess",
    )
    found = explain_list(EVERYTHING, ME, question)
    assert not found.verdict.allowed
    assert found.origin.startswith("built in")
    assert not found.remedies
    assert found.verdict.rule in WALL
