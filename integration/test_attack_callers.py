"""Attacks on the supervisor by who may call it: what they send costs others nothing, and itself little."""

import pytest

from integration.harness.callers import (
    MIB,
    call_bytes,
    flooding,
    list_call,
    list_costs,
    long_bad_list,
    many_variants,
)
from integration.harness.rawclient import RawClient
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    MANAGE,
    MANAGE_PATH,
    NAME,
    Warden,
    wait_for,
)
from integration.harness.threats import ERROR, memory, processor_time
from integration.harness.values import Variant

PING = call_bytes(MANAGE_PATH, "org.freedesktop.DBus.Peer", "Ping")


@pytest.mark.parametrize(
    ("data", "batch"),
    [
        pytest.param(many_variants(), 1, id="variants"),
        pytest.param(long_bad_list(), 1, id="long-lists"),
        pytest.param(list_call(), 50, id="lists"),
        pytest.param(PING, 50, id="pings"),
    ],
)
def test_attack_c6_who_floods_shares_with_who_asks_for_the_list(
    shared: Warden, data: bytes, batch: int
) -> None:
    for _ in range(5):
        shared.add_server()
    with flooding(shared, data, batch=batch):
        costs = list_costs(shared)
    assert costs[-1] < 1.0, costs


def owner(warden: Warden) -> str:
    return warden.host.name_owner(NAME)


def test_attack_c6_a_signal_to_the_supervisor_is_dropped_unread(shared: Warden) -> None:
    with RawClient.connect(shared.bus.address) as person:
        begun = processor_time(shared.process.pid)
        for _ in range(3):
            person.emit(
                MANAGE_PATH,
                "org.example.I",
                "Noise",
                "av",
                [[Variant("y", 0)] * MIB],
                destination=NAME,
            )
        assert not person.call(NAME, MANAGE_PATH, MANAGE, "List", timeout=60).error
        assert processor_time(shared.process.pid) - begun < 1.0


def test_attack_c6_the_longest_list_of_rules_still_works(shared: Warden) -> None:
    rules = [(6, f"org.example.Name{n}", "/org/example/a", "org.example.I") for n in range(9_900)]
    with RawClient.connect(shared.bus.address) as person:
        sandbox = shared.add_server(creator=person)
        reply = person.call(
            NAME,
            CONTAINERS_PATH,
            CONTAINERS,
            "SetContainerAccess",
            "sa(usos)",
            (sandbox.id, rules),
            timeout=60,
        )
        assert reply.error is None, reply.values
        shown = person.call(NAME, MANAGE_PATH, MANAGE, "Show", "s", (sandbox.id,), timeout=60)
        assert len(shown.values[0]["access"]) == 9_900


def test_attack_c7_a_path_of_two_mebibytes_is_refused_and_costs_no_name(shared: Warden) -> None:
    before = owner(shared)
    with RawClient.connect(shared.bus.address) as person:
        for _ in range(3):
            reply = person.call(NAME, "/" + "a" * 2 * MIB, "org.example.I", "M", timeout=60)
            assert reply.error == f"{ERROR}LimitsExceeded"
        assert person.ask(NAME, MANAGE_PATH, MANAGE, "List") == ([],)
    assert owner(shared) == before
    assert "went away" not in shared.log


def test_attack_c7_a_message_of_many_mebibytes_is_refused_unstored(shared: Warden) -> None:
    before, size = owner(shared), 60 * MIB
    with RawClient.connect(shared.bus.address) as person:
        for member, error in (("NoSuch", "UnknownMethod"), ("ChangeAccess", "InvalidArgs")):
            reply = person.call(NAME, MANAGE_PATH, MANAGE, member, "ay", (bytes(size),), timeout=60)
            assert reply.error in (f"{ERROR}{error}", f"{ERROR}LimitsExceeded")
    assert owner(shared) == before
    assert memory(shared.process.pid) < size


def subscribed(warden: Warden) -> RawClient:
    client = warden.connect_host()
    client.ask(NAME, MANAGE_PATH, MANAGE, "Subscribe")
    return client


def test_attack_c8_one_refusal_stays_one(shared: Warden) -> None:
    sandboxes = [shared.add_server(f"org.example.App{n}") for n in range(8)]
    apps = [shared.connect(sandbox) for sandbox in sandboxes]
    for app in apps:
        app.add_match("type='signal'")
    with subscribed(shared) as person:
        apps[0].call("org.example.Nobody", "/a", "org.example.I", "Do")
        path, what = person.wait_signal("Denied").values
        assert (path, what["member"]) == (sandboxes[0].path, "Do")
        # The end of one is broadcast, and the others may not hear it.
        shared.stop_instance(sandboxes.pop())
        person.driver("GetId")
        apps[1].call("org.example.Nobody", "/a", "org.example.I", "Do")
        assert person.wait_signal("Denied").values[0] == sandboxes[1].path
        told = [one for one in person.drain() if one.header.member == "Denied"]
    assert told == []
    denied = [shared.show(sandbox)["denied"] for sandbox in sandboxes]
    assert denied == [1, 1, *[0] * 5]
    assert shared.show(sandboxes[0])["denials"][-1]["member"] == "Do"


def test_attack_c8_refusals_are_told_to_who_asked_alone(shared: Warden) -> None:
    sandbox = shared.add_server()
    app, other = shared.connect(sandbox), shared.connect_host()
    other.add_match("type='signal'")
    person, gone = subscribed(shared), subscribed(shared)
    gone.close()
    app.call("org.example.Nobody", "/a", "org.example.I", "Do")
    person.wait_signal("Denied")
    person.ask(NAME, MANAGE_PATH, MANAGE, "Unsubscribe")
    app.call("org.example.Nobody", "/a", "org.example.I", "Do")
    wait_for(lambda: shared.show(sandbox)["denied"] == 2)
    for client in (person, other):
        assert "Denied" not in [one.header.member for one in client.drain()]
    assert app.call(NAME, MANAGE_PATH, MANAGE, "Subscribe").error is not None


def test_attack_c8_subscribers_are_counted(shared: Warden) -> None:
    people = [subscribed(shared) for _ in range(16)]
    with RawClient.connect(shared.bus.address) as person:
        reply = person.call(NAME, MANAGE_PATH, MANAGE, "Subscribe")
        assert reply.error == f"{ERROR}LimitsExceeded"
        people[0].close()
        wait_for(lambda: not person.call(NAME, MANAGE_PATH, MANAGE, "Subscribe").error)
