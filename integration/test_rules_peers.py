"""Rules on real buses: who the other end is, and that between sandboxes both ends are judged."""

import pytest

from integration.harness.stage import (
    DENIED,
    PASSED,
    PATH,
    UNKNOWN,
    Stage,
    call,
    listen,
    mute_call,
    signal,
)
from integration.harness.supervised import (
    PATH_SUBTREE,
    PEER_APP,
    PEER_HOST,
    PEER_SAME_APP,
    SEND,
    TYPE,
)

APP = "org.example.Peer"


# host


def test_host_is_who_is_in_no_sandbox(stage: Stage) -> None:
    name, sandboxed = stage.name(), stage.name()
    host, peer = stage.host(name), stage.owner(sandboxed)
    app = stage.app("send:,peer=host", "see:")
    assert call(app, host, name) == PASSED
    assert call(app, host, host.unique_name) == PASSED
    assert call(app, peer, sandboxed) == DENIED
    assert call(app, peer, peer.unique_name) == DENIED


def test_deny_host_leaves_apps(stage: Stage) -> None:
    name, sandboxed = stage.name(), stage.name()
    host, peer = stage.host(name), stage.owner(sandboxed)
    app = stage.app("send+see:", deny=["send:,peer=host"])
    assert call(app, host, name) == DENIED
    assert call(app, peer, sandboxed) == PASSED


def test_name_that_a_sandbox_took_over_is_not_the_hosts(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name},peer=host", f"see:{name}")
    assert call(app, host, name) == PASSED
    assert host.release_name(name) == 1
    peer = stage.owner(name)
    # The bus tells each connection for itself: only then has the app's one been told, too.
    assert app.name_owner(name) == peer.unique_name
    assert call(app, peer, name) == DENIED


# app, component


def test_app_with_any_component_or_one(stage: Stage) -> None:
    plain, red, blue = (stage.name() for _ in range(3))
    peers = {
        plain: stage.owner(plain, app=APP),
        red: stage.owner(red, app=APP, component="red"),
        blue: stage.owner(blue, app=APP, component="blue"),
    }
    app = stage.app("see:", f"send:,peer=app:{TYPE}/{APP}")
    assert [call(app, peer, name) for name, peer in peers.items()] == [PASSED] * 3
    stage.set_rules(app, "see:", f"send:,peer=app:{TYPE}/{APP}#red")
    assert [call(app, peer, name) for name, peer in peers.items()] == [DENIED, PASSED, DENIED]
    stage.set_rules(app, "see+send:", deny=[f"send:,peer=app:{TYPE}/{APP}#red"])
    assert [call(app, peer, name) for name, peer in peers.items()] == [PASSED, DENIED, PASSED]


@pytest.mark.parametrize("peer", [f"{TYPE}/{APP}.Other", f"org.example.Else/{APP}"])
def test_other_app_or_type_is_another_peer(stage: Stage, peer: str) -> None:
    name = stage.name()
    owner, host = stage.owner(name, app=APP), stage.host(f"{name}.host")
    app = stage.app("see:", f"send:,peer=app:{peer}")
    assert call(app, owner, name) == DENIED
    assert call(app, owner, owner.unique_name) == DENIED
    assert call(app, host, host.unique_name) == DENIED


def test_name_and_peer_must_both_match(stage: Stage) -> None:
    name, other = stage.name(), stage.name()
    owner, second = stage.owner(name, app=APP), stage.owner(other, app=APP)
    app = stage.app("see:", f"send:{name},peer=app:{TYPE}/{APP}")
    assert call(app, owner, name) == PASSED
    assert call(app, second, other) == DENIED


def test_peer_of_what_comes_in(stage: Stage) -> None:
    app = listen(stage.app(f"receive:,peer=app:{TYPE}/{APP}#red", from_host=False))
    red = stage.app("send:", app=APP, component="red")
    blue, host = stage.app("send:", app=APP, component="blue"), stage.host()
    assert call(red, app, app.unique_name) == PASSED
    assert signal(red, app)
    for other in (blue, host):
        assert call(other, app, app.unique_name) == DENIED
        assert not signal(other, app)


def test_app_is_known_by_every_connection_of_it(stage: Stage) -> None:
    first = stage.owner(stage.name(), app=APP)
    second = stage.warden.connect(stage.sandbox(first))
    app = stage.app("see:", f"send:,peer=app:{TYPE}/{APP}")
    assert call(app, second, second.unique_name) == PASSED


# same-app


def test_same_app_is_type_and_identifier_whatever_the_component(stage: Stage) -> None:
    app = stage.app("send+receive+see:,peer=same-app", "see:", app=APP, component="red")
    twin = stage.app("send+receive+see:,peer=same-app", app=APP, component="blue")
    other, host = stage.app("send+receive:", app=f"{APP}.Other"), stage.host()
    assert call(app, twin, twin.unique_name) == PASSED
    assert call(twin, app, app.unique_name) == PASSED
    assert call(app, other, other.unique_name) == DENIED
    assert call(other, app, app.unique_name) == DENIED
    assert call(app, host, host.unique_name) == DENIED


# see


def test_see_by_peer_shows_the_names_of_those_peers(stage: Stage) -> None:
    sandboxed, hosts = stage.name(), stage.name()
    peer, host = stage.owner(sandboxed, app=APP), stage.host(hosts)
    for rule, seen, hidden in (
        (f"see:,peer=app:{TYPE}/{APP}", {sandboxed, peer.unique_name}, {hosts, host.unique_name}),
        ("see:,peer=host", {hosts, host.unique_name}, {sandboxed, peer.unique_name}),
    ):
        app = stage.app(rule)
        names = set(app.list_names())
        assert seen <= names
        assert not hidden & names
        for name in seen | hidden:
            assert app.driver("NameHasOwner", "s", name) == (name in seen,), (rule, name)


# the form of SetContainerAccess


def test_usos_peers(stage: Stage) -> None:
    name, sandboxed, twins = stage.name(), stage.name(), stage.name()
    host, peer = stage.host(name), stage.owner(sandboxed, app=APP, component="red")
    twin, app = stage.owner(twins, app="org.example.Twin"), stage.app(app="org.example.Twin")

    def passing(*allow: tuple[int, str, str, str]) -> list[bool]:
        stage.warden.set_access(stage.sandbox(app), *allow)
        ends = ((host, name), (peer, sandboxed), (twin, twins))
        return [call(app, end, known) == PASSED for end, known in ends]

    any_of = SEND | PATH_SUBTREE
    assert passing((any_of, "", "/", "")) == [True, True, True]
    assert passing((any_of | PEER_HOST, "", "/", "")) == [True, False, False]
    assert passing((any_of | PEER_SAME_APP, "", "/", "")) == [False, False, True]
    assert passing((any_of | PEER_APP, f"{TYPE}/{APP}", "/", "")) == [False, True, False]
    assert passing((any_of | PEER_APP, f"{TYPE}/{APP}#red", "/", "")) == [False, True, False]
    assert passing((any_of | PEER_APP, f"{TYPE}/{APP}#blue", "/", "")) == [False, False, False]


# both ends


def test_call_between_sandboxes_needs_send_here_and_receive_there(stage: Stage) -> None:
    name = stage.name()
    caller, callee = stage.app(), stage.app(f"own:{name}", app=APP)
    assert callee.request_name(name) == 1
    for send, receive, expected in (
        (False, False, UNKNOWN),
        (False, True, UNKNOWN),
        (True, False, DENIED),
        (True, True, PASSED),
    ):
        stage.set_rules(caller, *([f"send:{name}"] if send else []))
        stage.set_rules(callee, f"own:{name}", *(["receive:"] if receive else []))
        assert call(caller, callee, name) == expected, (send, receive)
        assert mute_call(caller, callee, name) is (expected == PASSED)
        assert signal(caller, callee, name) is (expected == PASSED)


def test_deny_at_either_end_is_enough(stage: Stage) -> None:
    caller = stage.app("send+see:")
    callee = stage.app("receive:", app=APP)
    assert call(caller, callee, callee.unique_name) == PASSED
    stage.set_rules(callee, "receive:", deny=[f"receive:,peer=app:{TYPE}/org.example.App"])
    assert call(caller, callee, callee.unique_name) == DENIED
    stage.set_rules(callee, "receive:")
    stage.set_rules(caller, "send+see:", deny=[f"send:,peer=app:{TYPE}/{APP}"])
    assert call(caller, callee, callee.unique_name) == DENIED


def test_receiver_judges_path_interface_and_member_too(stage: Stage) -> None:
    caller = stage.app("send:")
    callee = stage.app(f"receive:@{PATH}:org.one.Get*", app=APP)
    to = callee.unique_name
    assert call(caller, callee, to, interface="org.one", member="GetIt") == PASSED
    assert call(caller, callee, to, interface="org.one", member="SetIt") == DENIED
    assert call(caller, callee, to, path="/else", interface="org.one", member="GetIt") == DENIED


def test_connections_of_one_sandbox_are_judged_as_well(stage: Stage) -> None:
    first = stage.app()
    second = stage.warden.connect(stage.sandbox(first))
    assert call(first, second, second.unique_name) == UNKNOWN
    stage.set_rules(first, "send+receive:,peer=same-app")
    assert call(first, second, second.unique_name) == PASSED
