import pytest

from broker.proxy.judge import MACHINE_ID, TO_ITSELF, ProxyJudge, copy_judge
from policy.importers.xdg_dbus_proxy import import_options
from policy.match import BUS_NAME
from policy.rules import Identity

ME = Identity(type="org.test", app="proxy")
PEER = "org.freedesktop.DBus.Peer"


def judge(*options: str) -> ProxyJudge:
    access = import_options(["--filter", *options]).access
    made = copy_judge(ProxyJudge(access, bus="bus", me=ME))
    made.unique_name = ":1.5"
    return made


def test_an_app_may_talk_to_itself_and_to_no_stranger() -> None:
    assert judge().send({":1.5"}, "/", "a.b", "C", None) is TO_ITSELF
    assert not judge().send({":1.6"}, "/", "a.b", "C", None).allowed


def test_nobody_is_itself_before_hello() -> None:
    fresh = ProxyJudge(import_options(["--filter"]).access, bus="bus", me=ME)
    assert not fresh.send({""}, "/", "a.b", "C", None).allowed


def test_a_copy_is_for_one_connection() -> None:
    one = judge()
    two = copy_judge(one)
    two.unique_name = ":1.6"
    assert not two.send({":1.5"}, "/", "a.b", "C", None).allowed
    assert one.send({":1.5"}, "/", "a.b", "C", None).allowed


@pytest.mark.parametrize("interface", [None, PEER])
def test_the_machine_id_may_be_asked_for(interface: str | None) -> None:
    assert judge().send((BUS_NAME,), "/", interface, "GetMachineId", None) is MACHINE_ID


@pytest.mark.parametrize(
    ("name", "interface", "member"),
    [
        (BUS_NAME, "org.freedesktop.DBus.Properties", "GetMachineId"),
        (BUS_NAME, PEER, "Other"),
        ("org.example.A", PEER, "GetMachineId"),
    ],
)
def test_and_nothing_else_of_it(name: str, interface: str, member: str) -> None:
    assert not judge().send((name,), "/", interface, member, None).allowed


def test_rules_count_as_they_do_elsewhere() -> None:
    talk = judge("--talk=org.example.A")
    assert talk.send({"org.example.A", ":1.9"}, "/", "a.b", "C", None).allowed
    assert talk.receive({"org.example.A"}, "/", "a.b", "C", None, broadcast=True).allowed
    assert not talk.receive({"org.example.B"}, "/", "a.b", "C", None, broadcast=True).allowed
    assert talk.receive({"org.example.B"}, "/", "a.b", "C", None, broadcast=False).allowed
