"""Rules on real buses: what each access lets through, on which bus, and that deny beats allow."""

from pathlib import Path

import pytest

from broker.wire.header import MessageType
from integration.harness.buses import Bus, open_bus
from integration.harness.rawclient import BUS, BUS_PATH, RawClient
from integration.harness.stage import (
    DENIED,
    INTERFACE,
    NO_OWNER,
    PASSED,
    PATH,
    UNKNOWN,
    Stage,
    arrivals,
    call,
    listen,
    mute_call,
    refusal,
    settle,
    signal,
)
from integration.harness.supervised import (
    DENY,
    INTERFACE_IS_MEMBER,
    NAME_SUBTREE,
    OWN,
    PATH_SUBTREE,
    RECEIVE,
    SEE,
    SEND,
    open_warden,
)
from integration.harness.values import Variant

ANY: tuple[str, str] = ("/", "")  # path and interface of a(usos), with PATH_SUBTREE


# send


def test_send_lets_calls_and_signals_out(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    assert call(app, host, name) == PASSED
    assert call(app, host, name, interface=None) == PASSED
    assert mute_call(app, host, name)
    assert signal(app, host, name)


def test_send_without_a_name_is_to_anybody(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app("send:")
    assert call(app, host, name) == PASSED
    assert call(app, host, host.unique_name) == PASSED


def test_send_is_not_own(stage: Stage) -> None:
    name = stage.name()
    app = stage.app(f"send+receive+see:{name}", "send:")
    assert refusal(app, BUS, BUS_PATH, BUS, "RequestName", "su", (name, 4)) is not None
    assert not stage.host().driver("NameHasOwner", "s", name)[0]


def test_see_shows_a_name_and_lets_nothing_out(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"see:{name}")
    assert app.name_owner(name) == host.unique_name
    assert {name, host.unique_name} <= set(app.list_names())
    assert call(app, host, name) == DENIED
    assert not mute_call(app, host, name)
    assert not signal(app, host, name)


@pytest.mark.parametrize("access", ["send", "receive", "own"])
def test_see_follows_from_any_rule_that_names_the_name(stage: Stage, access: str) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"{access}:{name}")
    assert app.name_owner(name) == host.unique_name
    assert app.driver("NameHasOwner", "s", name) == (True,)
    assert {name, host.unique_name} <= set(app.list_names())
    assert app.driver("GetConnectionUnixUser", "s", host.unique_name)


def test_see_does_not_follow_from_a_rule_without_a_name(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app("send+receive:")
    assert app.driver("NameHasOwner", "s", name) == (False,)
    assert not {name, host.unique_name} & set(app.list_names())


# receive


def test_receive_from_the_host_is_the_default(stage: Stage) -> None:
    host, app = stage.host(), stage.app()
    assert call(host, app, app.unique_name) == PASSED
    assert mute_call(host, app, app.unique_name)
    assert signal(host, app, app.unique_name)


def test_receive_from_host_deny_lets_in_only_what_a_rule_lets_in(stage: Stage) -> None:
    host = stage.host()
    app = stage.app(f"receive::{INTERFACE}.Do", from_host=False)
    assert call(host, app, app.unique_name) == PASSED
    assert call(host, app, app.unique_name, member="Undo") == DENIED
    assert not mute_call(host, app, app.unique_name, member="Undo")
    assert not signal(host, app, app.unique_name)


def test_receive_from_host_is_not_receive_from_other_sandboxes(stage: Stage) -> None:
    app, other = stage.app(from_host=True), stage.app("send:", app="org.example.Other")
    assert call(other, app, app.unique_name) == DENIED
    assert not mute_call(other, app, app.unique_name)
    assert not signal(other, app, app.unique_name)


def test_deny_beats_the_default_for_the_host(stage: Stage) -> None:
    host, app = stage.host(), stage.app(deny=[f"receive::{INTERFACE}.Undo"])
    assert call(host, app, app.unique_name, member="Undo") == DENIED
    assert call(host, app, app.unique_name) == PASSED


# own


def test_own_gives_the_name_and_no_other(stage: Stage) -> None:
    name, host = stage.name(), stage.host()
    app = stage.app(f"own:{name}")
    assert app.request_name(name) == 1
    assert host.name_owner(name) == app.unique_name
    assert call(host, app, name) == PASSED
    error = refusal(app, BUS, BUS_PATH, BUS, "RequestName", "su", (f"{name}.x", 4))
    assert error is not None
    assert error[0] == UNKNOWN
    assert app.release_name(name) == 1


def test_own_covers_a_subtree_and_deny_a_part_of_it(stage: Stage) -> None:
    name = stage.name()
    app = stage.app(f"own:{name}.*", deny=[f"own:{name}.secret.*"])
    assert [app.request_name(each) for each in (name, f"{name}.x", f"{name}.x.y")] == [1, 1, 1]
    for hidden in (f"{name}.secret", f"{name}.secret.x", f"{name}x"):
        error = refusal(app, BUS, BUS_PATH, BUS, "RequestName", "su", (hidden, 4))
        assert error is not None
        assert error[0] == (DENIED if hidden.startswith(f"{name}.") else UNKNOWN)


# deny, and nothing at all


def test_deny_beats_allow_in_any_order(stage: Stage) -> None:
    name = stage.name()
    host = stage.host(name)
    app = stage.app(f"send:{name}", deny=[f"send:{name}:{INTERFACE}.Undo"])
    assert call(app, host, name) == PASSED
    assert call(app, host, name, member="Undo") == DENIED
    stage.warden.change_access(stage.sandbox(app), rules=[f"send:{name}:{INTERFACE}.Undo"])
    assert call(app, host, name, member="Undo") == DENIED


def test_deny_see_hides_what_another_rule_names(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app("see:", deny=[f"see:{name}"])
    assert app.driver("NameHasOwner", "s", name) == (False,)
    assert not {name, host.unique_name} & set(app.list_names())


def test_nothing_matching_means_no(stage: Stage) -> None:
    name, other = stage.name(), stage.name()
    host, app = stage.host(name), stage.app(f"send:{other}")
    assert call(app, host, name) == UNKNOWN
    assert not signal(app, host, name)


def test_sandbox_without_rules_can_do_the_list_and_no_more(stage: Stage) -> None:
    name = stage.name()
    host, app = listen(stage.host(name)), stage.app()
    assert app.list_names() == [BUS, app.unique_name]
    assert app.driver("ListActivatableNames") in (([],), ([BUS],))
    assert app.driver("GetId") == host.driver("GetId")
    assert app.name_owner(BUS) == BUS
    assert app.name_owner(app.unique_name) == app.unique_name
    assert app.driver("GetConnectionUnixUser", "s", app.unique_name)
    assert app.driver("NameHasOwner", "s", name) == (False,)
    assert app.ask(BUS, BUS_PATH, f"{BUS}.Peer", "Ping") == ()
    (xml,) = app.ask(BUS, BUS_PATH, f"{BUS}.Introspectable", "Introspect")
    assert "ListNames" in xml
    app.add_match("type='signal'")
    app.remove_match("type='signal'")

    assert call(app, host, name) == UNKNOWN
    assert call(app, host, host.unique_name) == UNKNOWN
    assert not signal(app, host)
    assert not signal(app, host, host.unique_name)
    assert not signal(host, listen(app))
    for member, signature, values in (
        ("RequestName", "su", (name, 0)),
        ("ReleaseName", "s", (name,)),
        ("ListQueuedOwners", "s", (name,)),
        ("ReloadConfig", "", ()),
    ):
        error = refusal(app, BUS, BUS_PATH, BUS, member, signature, values)
        assert error is not None
        assert error[0] == (UNKNOWN if values else DENIED), member
    error = refusal(app, BUS, BUS_PATH, f"{BUS}.Properties", "GetAll", "s", (BUS,))
    assert error is not None
    assert error[0] == DENIED
    error = refusal(app, BUS, BUS_PATH, BUS, "GetNameOwner", "s", (name,))
    assert error is not None
    assert error[0] == NO_OWNER


# bus


def test_rule_of_another_bus_says_nothing_here(stage: Stage) -> None:
    name, denied = stage.name(), stage.name()
    host = stage.host(name, denied)
    app = stage.app(
        f"send:{name},bus=session",
        f"send:{denied},bus=system",
        deny=[f"send:{name},bus=system"],
    )
    assert call(app, host, name) == PASSED
    stage.set_rules(app, f"send:{denied},bus=system")
    assert call(app, host, denied) == UNKNOWN


def test_each_bus_of_a_sandbox_has_its_rules(bus: Bus, folder: Path) -> None:
    name = "org.example.TwoBuses"
    (folder / "other").mkdir()
    with (
        open_bus(bus.kind, folder / "other") as other,
        open_warden(bus, folder / "run", "--bus", f"other={other.address}") as warden,
    ):
        rules = [f"send:{name}:{INTERFACE}.Here,bus=session", f"send:{name}:*.There,bus=other"]
        sandbox = warden.add_server(rules=rules, Buses=Variant("as", ["session", "other"]))
        addresses = warden.show(sandbox)["addresses"]
        for real, label, passes in ((bus, "session", "Here"), (other, "other", "There")):
            with (
                RawClient.connect(real.address) as host,
                RawClient.connect(addresses[label]) as app,
            ):
                assert host.request_name(name) == 1
                for member in ("Here", "There"):
                    expected = PASSED if member == passes else DENIED
                    assert call(app, host, name, member=member) == expected


# the form of SetContainerAccess


def test_usos_flags_mean_what_they_say(stage: Stage) -> None:
    name = stage.name()
    host, below, app = stage.host(name), stage.host(f"{name}.below"), stage.app()
    sandbox = stage.sandbox(app)

    stage.warden.set_access(sandbox, (SEE | PATH_SUBTREE, name, *ANY))
    assert call(app, host, name) == DENIED
    assert call(app, below, f"{name}.below") == UNKNOWN

    stage.warden.set_access(sandbox, (SEND | NAME_SUBTREE | PATH_SUBTREE, name, *ANY))
    assert call(app, below, f"{name}.below") == PASSED

    stage.warden.set_access(sandbox, (SEND, name, PATH, INTERFACE))
    assert call(app, host, name) == PASSED
    assert call(app, host, name, path=f"{PATH}/x") == DENIED
    assert call(app, host, name, interface="org.example.Else") == DENIED

    stage.warden.set_access(
        sandbox,
        (SEND | PATH_SUBTREE, name, PATH, ""),
        (SEND | PATH_SUBTREE | INTERFACE_IS_MEMBER | DENY, name, "/", f"{INTERFACE}.Undo"),
    )
    assert call(app, host, name, path=f"{PATH}/x") == PASSED
    assert call(app, host, name, path=f"{PATH}x") == DENIED
    assert call(app, host, name, member="Undo") == DENIED


def test_usos_receive_and_own(stage: Stage) -> None:
    name = stage.name()
    host = stage.host()
    app = stage.app(
        allow=[
            (OWN | PATH_SUBTREE, name, *ANY),
            (RECEIVE | PATH_SUBTREE | INTERFACE_IS_MEMBER, "", "/", f"{INTERFACE}.Do"),
        ],
        from_host=False,
    )
    assert app.request_name(name) == 1
    assert call(host, app, name) == PASSED
    assert call(host, app, name, member="Undo") == DENIED


# seeing callers


def test_caller_is_seen_as_long_as_it_lives(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app()
    assert app.driver("NameHasOwner", "s", host.unique_name) == (False,)
    host.start_call(app.unique_name, PATH, INTERFACE, "Do", flags=1)
    settle(host)
    assert [each.header.type for each in arrivals(app)] == [MessageType.METHOD_CALL]
    assert app.driver("GetConnectionUnixUser", "s", host.unique_name)
    assert app.name_owner(host.unique_name) == host.unique_name
    assert host.unique_name in app.list_names()
    host.close()
    settle(app)
    assert app.driver("NameHasOwner", "s", host.unique_name) == (False,)


def test_who_was_refused_is_not_seen(stage: Stage) -> None:
    host, app = stage.host(), stage.app(from_host=False)
    assert call(host, app, app.unique_name) == DENIED
    assert app.driver("NameHasOwner", "s", host.unique_name) == (False,)
    assert host.unique_name not in app.list_names()
