from collections import Counter
from random import Random

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from policy.match import Judge
from policy.rules import AccessList, Identity, Rule
from policy.snaps.compiler import Change, Compiler
from policy.snaps.installed import Connection, Port, Snap, SnapError, World, parse_connection
from tests.helpers.snapworlds import (
    compiler,
    connection_sets,
    library,
    port,
    possible_connections,
    some_snaps,
)

NM = parse_connection("client:network-manager", "provider:network-manager")
HOST_NM = parse_connection("client:network-manager", "snapd:network-manager")


def lists(of: Compiler) -> dict[str, AccessList]:
    return {tag: of.access(tag) for tag in of.tags}


def after(access: AccessList, change: Change) -> Counter[Rule]:
    return Counter(access.rules) - Counter(change.removed) + Counter(change.added)


def test_each_app_has_a_list() -> None:
    one = compiler()
    assert one.tags == [
        "snap.client.app",
        "snap.client.other",
        "snap.provider.extra",
        "snap.provider.svc",
        "snap.second_x.app",
    ]
    assert not any(each.receive_from_host for each in lists(one).values())


def test_a_connection_changes_both_ends_and_nobody_else() -> None:
    one = compiler()
    before = lists(one)
    changes = one.connect(NM)
    assert [each.tag for each in changes] == [
        "snap.client.app",
        "snap.client.other",
        "snap.provider.svc",
    ]
    assert all(each.added and not each.removed for each in changes)
    for change in changes:
        assert after(before[change.tag], change) == Counter(one.access(change.tag).rules)
    for tag in set(before) - {each.tag for each in changes}:
        assert one.access(tag) is before[tag]


def test_a_preview_is_what_the_connection_changes() -> None:
    one = compiler()
    before = lists(one)
    expected = one.preview(NM)
    assert lists(one) == before
    assert one.connections == []
    assert one.connect(NM) == expected


def test_origins_say_interface_side_connection_and_file() -> None:
    one = compiler()
    by_tag = {change.tag: change for change in one.connect(NM)}
    about = "connected client:network-manager provider:network-manager (network-manager.toml)"
    origins = {rule.origin for rule in by_tag["snap.client.app"].added}
    assert origins == {f"network-manager plug, {about}"}
    origins = {rule.origin for rule in by_tag["snap.provider.svc"].added}
    assert origins == {f"network-manager slot, {about}"}
    permanent = {rule.origin for rule in one.access("snap.provider.svc").rules}
    assert "network-manager slot provider:network-manager (network-manager.toml)" in permanent
    assert "every-snap (every-snap.toml)" in permanent


def test_connecting_twice_is_connecting_once() -> None:
    one = compiler()
    assert one.connect(NM)
    before = lists(one)
    assert one.connect(NM) == ()
    assert lists(one) == before
    assert one.connections == [NM]


def test_the_host_and_an_app_are_told_apart() -> None:
    """The same plug, once at the system's slot and once at a snap's."""
    me = Identity(type="io.snapcraft.snapd", app="client", component="app")
    provider = Identity(type="io.snapcraft.snapd", app="provider", component="svc")
    path, interface = "/org/freedesktop/NetworkManager", "org.freedesktop.NetworkManager"
    for connection, host, app in ((HOST_NM, True, False), (NM, False, True)):
        one = Compiler(library(), World(system="core", snaps=some_snaps()))
        if connection is HOST_NM:
            one = compiler()
        one.connect(connection)
        judge = Judge(one.access("snap.client.app"), bus="system", me=me)
        names = ("org.freedesktop.NetworkManager",)
        assert judge.send(names, path, interface, "GetDevices", None).allowed is host
        assert judge.send(names, path, interface, "GetDevices", provider).allowed is app


def test_attributes_must_agree_for_a_connection_to_give_rules() -> None:
    one = compiler()
    other = {"bus": "session", "name": "org.example.Other"}
    slots = {"thing": Port(interface="dbus", attributes=other)}
    one.add_snap(Snap(name="differs", apps=("app",), slots=slots))
    assert one.connect(parse_connection("client:dbus", "differs:thing")) == ()
    assert one.connect(parse_connection("client:dbus", "provider:dbus"))


def test_an_interface_without_rules_gives_none() -> None:
    one = compiler()
    connection = parse_connection("client:camera", "provider:camera")
    assert one.connect(connection) == ()
    assert one.disconnect(connection) == ()


@pytest.mark.parametrize(
    ("plug", "slot", "problem"),
    [
        ("nobody:x", "snapd:network", "there is no snap 'nobody'"),
        ("client:x", "snapd:network", "snap client has no plug 'x'"),
        ("client:network", "snapd:x", "snap snapd has no slot 'x'"),
        ("client:network", "snapd:bluez", "plug client:network is of interface network, slot"),
    ],
)
def test_what_is_not_there_cannot_be_connected(plug: str, slot: str, problem: str) -> None:
    one = compiler()
    before = lists(one)
    for verb in (one.connect, one.disconnect, one.preview):
        with pytest.raises(SnapError, match=problem):
            verb(parse_connection(plug, slot))
    assert lists(one) == before
    assert one.connections == []


def test_what_is_not_connected_cannot_be_disconnected() -> None:
    with pytest.raises(SnapError, match="are not connected"):
        compiler().disconnect(NM)


def test_a_snap_is_refused_whole() -> None:
    one = compiler()
    before = lists(one)
    bad = Snap(name="bad", apps=("a",), slots={"m": port("mpris"), "d": Port(interface="dbus")})
    with pytest.raises(SnapError, match="slot bad:d: attribute 'bus' is missing"):
        one.add_snap(bad)
    with pytest.raises(SnapError, match="there is a snap client already"):
        one.add_snap(Snap(name="client"))
    assert lists(one) == before
    assert set(one.snaps) == {"snapd", "client", "second_x", "provider"}


def test_a_snap_goes_with_its_connections() -> None:
    one, without = compiler(), compiler()
    second = parse_connection("second_x:network", "snapd:network")
    for each in (NM, HOST_NM, second):
        one.connect(each)
    before = lists(one)
    changes = {change.tag: change for change in one.remove_snap("provider")}
    without.connect(HOST_NM)
    without.connect(second)
    without.remove_snap("provider")
    assert one.connections == [HOST_NM, second]
    assert lists(one) == lists(without)
    assert set(changes) == {
        "snap.client.app",
        "snap.client.other",
        "snap.provider.extra",
        "snap.provider.svc",
    }
    for tag, change in changes.items():
        left = Counter(one.access(tag).rules) if tag in one.tags else Counter()
        assert after(before[tag], change) == left
    with pytest.raises(SnapError, match="no app has the security tag"):
        one.access("snap.provider.svc")
    with pytest.raises(SnapError, match="there is no snap"):
        one.remove_snap("provider")


def test_an_added_snap_says_its_rules() -> None:
    one = compiler()
    (change,) = one.add_snap(Snap(name="new", apps=("app",), plugs={"network": port("network")}))
    assert change == Change(tag="snap.new.app", added=one.access("snap.new.app").rules)


def test_what_no_message_can_match_is_left_out_and_said() -> None:
    one = compiler()
    name = {"bus": "session", "name": "org.example.with-dash"}
    one.add_snap(
        Snap(name="dash", apps=("app",), slots={"d": Port(interface="dbus", attributes=name)})
    )
    left_out = one.left_out("snap.dash.app")
    assert left_out
    assert all("a rule that no message can match is left out" in text for text in left_out)
    assert any(rule.name == "org.example.with-dash" for rule in one.access("snap.dash.app").rules)
    assert one.left_out("snap.client.app") == []


def test_every_snap_can_be_served_without_following_all_names() -> None:
    one = Compiler(library(), World(snaps=(Snap(name="bare", apps=("app",)),)))
    me = Identity(type="io.snapcraft.snapd", app="bare", component="app")
    judge = Judge(one.access("snap.bare.app"), bus="session", me=me)
    assert not judge.uses.globs
    assert not judge.broadcast("/a", "org.x.Y", "Z").allowed
    sister = msgspec.structs.replace(me, component="other")
    assert judge.send((":1.5",), "/a", "org.x.Y", "Z", sister).allowed


# -- laws ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(connections=connection_sets, order=st.randoms(use_true_random=False))
def test_the_way_to_a_state_does_not_matter(connections: set[Connection], order: Random) -> None:
    one, other = compiler(), compiler()
    for each in sorted(connections):
        one.connect(each)
    shuffled = sorted(connections)
    order.shuffle(shuffled)
    for each in shuffled:
        other.connect(each)
    pairs = [tuple(str(each).split()) for each in shuffled]
    world = World(snaps=some_snaps()[::-1], connections=tuple((a, b) for a, b in pairs))
    assert lists(one) == lists(other) == lists(Compiler(library(), world))


@settings(max_examples=40, deadline=None)
@given(connections=connection_sets, more=st.sampled_from(possible_connections()))
def test_connect_then_disconnect_is_identity(
    connections: set[Connection], more: Connection
) -> None:
    one = compiler()
    for each in connections - {more}:
        one.connect(each)
    before = lists(one)
    made, undone = one.connect(more), one.disconnect(more)
    assert lists(one) == before
    assert [(each.tag, each.added) for each in made] == [
        (each.tag, each.removed) for each in undone
    ]


@settings(max_examples=40, deadline=None)
@given(connections=connection_sets, more=st.sampled_from(possible_connections()))
def test_changes_are_the_difference_of_the_lists(
    connections: set[Connection], more: Connection
) -> None:
    one = compiler()
    for each in connections - {more}:
        one.connect(each)
    before = lists(one)
    changes = {change.tag: change for change in one.connect(more)}
    for tag, access in lists(one).items():
        change = changes.get(tag, Change(tag=tag))
        assert after(before[tag], change) == Counter(access.rules)


def test_allows_of_a_connection_take_nothing_away() -> None:
    one = compiler()
    for connection in possible_connections():
        before = {tag: Counter(access.rules) for tag, access in lists(one).items()}
        one.connect(connection)
        for tag, rules in before.items():
            assert not rules - Counter(one.access(tag).rules)


@pytest.mark.slow
def test_a_thousand_snaps() -> None:
    names = sorted(set(library().interfaces) - {"dbus"})
    host = Snap(name="snapd", system=True, slots={name: Port(interface=name) for name in names})
    clients = tuple(
        Snap(
            name=f"s{number}",
            apps=("app",),
            plugs={name: Port(interface=name) for name in (names * 2)[number % 64 :][:10]},
        )
        for number in range(1000)
    )
    pairs = tuple(
        (f"{snap.name}:{name}", f"snapd:{name}") for snap in clients for name in snap.plugs
    )
    # How long this takes is measured by the rows compile-1000 and connect-one of `make bench`.
    one = Compiler(library(), World(snaps=(host, *clients), connections=pairs))
    assert len(one.connections) == 10_000
    lists = {tag: one.access(tag) for tag in one.tags}
    assert sum(len(access.rules) for access in lists.values()) > 50_000
    for connection in one.connections[5000:5010]:
        one.disconnect(connection)
        one.connect(connection)
        touched = {tag for tag in one.tags if one.access(tag) is not lists[tag]}
        assert touched <= {f"snap.{connection.plug_snap}.app"}
        lists = {tag: one.access(tag) for tag in one.tags}


def test_an_app_that_may_use_some_plugs_gets_the_rules_of_these_and_of_its_slots() -> None:
    one = compiler()
    one.connect(NM)
    whole = one.access("snap.client.app")
    every_plug = list(one.snaps["client"].plugs)
    assert one.narrowed("snap.client.app", every_plug) == whole
    none = one.narrowed("snap.client.app", ["no-such-plug"])
    assert set(none.rules) < set(whole.rules)
    assert not none.receive_from_host
    # A provider's rules are its slots': naming plugs takes none of them away.
    assert one.narrowed("snap.provider.svc", ["x"]) == one.access("snap.provider.svc")
