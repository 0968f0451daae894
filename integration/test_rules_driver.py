"""Rules on real buses: what of the bus itself a sandbox may use, and what no rule can allow."""

from typing import Any

import pytest

from broker.wire.header import Flag
from integration.harness.buses import BROKER
from integration.harness.rawclient import BUS, BUS_PATH, RawClient
from integration.harness.stage import (
    DENIED,
    ERROR,
    INTERFACE,
    PATH,
    UNKNOWN,
    Stage,
    listen,
    refusal,
    settle,
    told,
)

EVERYTHING = "send+receive+see+own:"


def _refused(client: RawClient, member: str, signature: str = "", *values: Any) -> str | None:
    """Return the name of the bus's error, None if there is none."""
    error = refusal(client, BUS, BUS_PATH, BUS, member, signature, values)
    return error and error[0]


# for every sandbox


def test_list_names_has_what_may_be_seen(stage: Stage) -> None:
    name, hidden = stage.name(), stage.name()
    host, other = stage.host(name), stage.host(hidden)
    app = stage.app(f"see:{name}")
    names = app.list_names()
    assert set(names) == {BUS, name, host.unique_name, app.unique_name}
    assert len(names) == 4
    stage.set_rules(app, "see:")
    assert set(app.list_names()) == set(stage.warden.host.list_names())
    assert {hidden, other.unique_name} <= set(app.list_names())


def test_name_owner_family_is_for_names_that_may_be_seen(stage: Stage) -> None:
    name, hidden = stage.name(), stage.name()
    host, other, app = stage.host(name), stage.host(hidden), stage.app(f"see:{name}")
    for seen in (name, host.unique_name, app.unique_name, BUS):
        assert app.driver("GetNameOwner", "s", seen) == host.driver("GetNameOwner", "s", seen)
        assert app.driver("NameHasOwner", "s", seen) == (True,)
        for member in ("UnixUser", "UnixProcessID", "Credentials"):
            method = f"GetConnection{member}"
            assert app.driver(method, "s", seen) == host.driver(method, "s", seen)
    for unseen in (hidden, other.unique_name):
        assert app.driver("NameHasOwner", "s", unseen) == (False,)
        for member in ("GetNameOwner", "GetConnectionUnixUser", "GetConnectionCredentials"):
            assert _refused(app, member, "s", unseen) == f"{ERROR}NameHasNoOwner"


def test_driver_takes_calls_without_an_interface_and_on_any_path(stage: Stage) -> None:
    name, app = stage.name(), stage.app()
    stage.host(name)
    assert app.ask(BUS, "/any", None, "GetId") == app.driver("GetId")
    assert app.ask(BUS, "/any", None, "ListNames") == ([BUS, app.unique_name],)
    assert app.ask(BUS, "/any", None, "NameHasOwner", "s", (name,)) == (False,)
    error = refusal(app, BUS, "/any", None, "RequestName", "su", (name, 0))
    assert error is not None
    assert error[0] == UNKNOWN  # the name is hidden


def test_peer_interface_of_nobody(stage: Stage) -> None:
    host, app = stage.host(), stage.app()
    assert app.ask(None, "/", f"{BUS}.Peer", "Ping") == ()
    error = refusal(app, None, "/", INTERFACE, "Do")
    known = refusal(host, None, "/", INTERFACE, "Do")
    assert error is not None
    assert known is not None
    assert error[0] == known[0]


def test_matches_are_counted_and_taken_back(stage: Stage) -> None:
    host, app = stage.host(), stage.app("receive:")
    rule = f"type='signal',interface='{INTERFACE}'"
    for _ in range(2):
        app.add_match(rule)
    app.remove_match(rule)
    host.emit(PATH, INTERFACE, "Done")
    settle(host)
    assert app.wait_signal("Done").header.sender == host.unique_name
    app.remove_match(rule)
    assert _refused(app, "RemoveMatch", "s", rule) == f"{ERROR}MatchRuleNotFound"
    assert _refused(app, "AddMatch", "s", "nonsense") == f"{ERROR}MatchRuleInvalid"


def test_matches_of_the_gate_cannot_be_taken_away(stage: Stage) -> None:
    name = stage.name()
    app = stage.app(f"send:{name}")
    for rule in (
        f"type='signal',sender='{BUS}',interface='{BUS}',member='NameOwnerChanged',arg0='{name}'",
        f"type='signal',sender='{BUS}',interface='{BUS}',member='NameOwnerChanged'",
    ):
        assert _refused(app, "RemoveMatch", "s", rule) == f"{ERROR}MatchRuleNotFound"


# names


def test_names_are_requested_queued_for_and_released(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"own:{name}")
    assert app.request_name(name, 0) == 2
    assert app.driver("ListQueuedOwners", "s", name) == ([host.unique_name, app.unique_name],)
    app.queue.clear()
    assert host.release_name(name) == 1
    assert app.wait_signal("NameAcquired").values == (name,)
    assert host.name_owner(name) == app.unique_name
    assert app.release_name(name) == 1
    assert app.release_name(name) == 2


def test_bug_9_who_waits_for_a_name_that_may_be_owned_is_told(stage: Stage) -> None:
    name = stage.name()
    host, waiting, app = stage.host(name), stage.host(), stage.app(f"own:{name}")
    assert waiting.request_name(name, 0) == 2
    assert app.request_name(name, 0) == 2
    (queue,) = app.driver("ListQueuedOwners", "s", name)
    assert queue == [host.unique_name, waiting.unique_name, app.unique_name]
    # No more than the number is told of who waits.
    assert _refused(app, "GetNameOwner", "s", waiting.unique_name) == f"{ERROR}NameHasNoOwner"
    assert waiting.unique_name not in app.list_names()


@pytest.mark.parametrize("is_there", [True, False])
def test_program_p2_name_methods_are_for_names_that_may_be_owned(
    stage: Stage, *, is_there: bool
) -> None:
    name, hidden = stage.name(), stage.name()
    host, app = stage.host(), stage.app(f"send+see:{name}")
    if is_there:
        assert host.request_name(name) == 1
        stage.host(hidden)
    for each, error in ((name, DENIED), (hidden, UNKNOWN)):
        assert _refused(app, "RequestName", "su", each, 0) == error
        assert _refused(app, "ReleaseName", "s", each) == error
        assert _refused(app, "ListQueuedOwners", "s", each) == error
    if is_there:
        assert host.name_owner(name) == host.unique_name
    assert [denial["direction"] for denial in stage.denials(app)] == ["own"] * 6


@pytest.mark.parametrize("name", [BUS, ":1.1", "nodots", ""])
def test_names_that_nobody_may_own(stage: Stage, name: str) -> None:
    app = stage.app(EVERYTHING)
    assert _refused(app, "RequestName", "su", name, 0) in (f"{ERROR}InvalidArgs", DENIED)


# what needs a rule


def test_rest_of_the_driver_needs_a_rule(stage: Stage) -> None:
    host, app = stage.host(), stage.app()
    for member in ("ReloadConfig", "NoSuchMethod"):
        assert _refused(app, member) == DENIED
    properties = (BUS, BUS_PATH, f"{BUS}.Properties", "Get", "ss", (BUS, "Interfaces"))
    error = refusal(app, *properties)
    assert error is not None
    assert error[0] == DENIED
    stage.set_rules(app, f"send:{BUS}")
    assert refusal(app, *properties) == refusal(host, *properties)
    assert refusal(app, BUS, BUS_PATH, BUS, "NoSuchMethod") == refusal(
        host, BUS, BUS_PATH, BUS, "NoSuchMethod"
    )
    stage.set_rules(app, f"send:{BUS}:{BUS}.NoSuch*")
    assert _refused(app, "ReloadConfig") == DENIED
    assert _refused(app, "NoSuchMethod") == f"{ERROR}UnknownMethod"


# what no rule allows


@pytest.mark.parametrize(
    ("interface", "member", "signature", "values"),
    [
        (f"{BUS}.Monitoring", "BecomeMonitor", "asu", ([], 0)),
        (BUS, "UpdateActivationEnvironment", "a{ss}", ({"A": "b"},)),
        (f"{BUS}.Debug.Stats", "GetStats", "", ()),
        (f"{BUS}.Debug.Stats", "GetConnectionStats", "s", (":1.0",)),
        (f"{BUS}.Debug.Stats", "GetAllMatchRules", "", ()),
        (f"{BUS}.Containers1", "AddServer", "ssa{sv}a{sv}", ("org.example.T", "a", {}, {})),
        (f"{BUS}.Containers1", "StopInstance", "o", ("/c0",)),
        (f"{BUS}.Containers1", "GetConnectionInstance", "s", (":1.0",)),
        (f"{BUS}.Properties", "GetAll", "s", (f"{BUS}.Debug.Stats",)),
        (f"{BUS}.Properties", "GetAll", "s", (f"{BUS}.Containers1",)),
    ],
)
def test_never_whatever_the_rules(
    stage: Stage, interface: str, member: str, signature: str, values: tuple[Any, ...]
) -> None:
    app = stage.app(EVERYTHING, f"send:{BUS}", f"send:{BUS}:{interface}.{member}")
    interfaces = [interface] if interface.endswith("Properties") else [interface, None]
    for each in interfaces:
        for path in (BUS_PATH, "/any"):
            error = refusal(app, BUS, path, each, member, signature, values)
            assert error is not None
            assert error[0] == DENIED
    app.start_call(
        BUS, BUS_PATH, interface, member, signature, values, flags=Flag.NO_REPLY_EXPECTED
    )
    settle(app)
    assert len(stage.denials(app)) == 2 * len(interfaces) + 1
    # It did not become a monitor: those may say nothing.
    assert app.driver("GetId")


@pytest.mark.parametrize(
    "rule", ["eavesdrop='true'", "type='signal', eavesdrop = 'true'", "eavesdrop='tr''ue'"]
)
def test_eavesdropping_is_refused(stage: Stage, rule: str) -> None:
    app = stage.app(EVERYTHING)
    assert _refused(app, "AddMatch", "s", rule) in (DENIED, f"{ERROR}MatchRuleInvalid")


def test_match_for_everything_hears_no_messages_of_others(stage: Stage) -> None:
    name = stage.name()
    host, other, app = stage.host(name), stage.host(), stage.app(EVERYTHING)
    for rule in ("", "type='method_call'", f"destination='{name}'", "eavesdrop='false'"):
        app.call(BUS, BUS_PATH, BUS, "AddMatch", "s", (rule,))
    other.start_call(name, PATH, INTERFACE, "Do", flags=Flag.NO_REPLY_EXPECTED)
    other.emit(PATH, INTERFACE, "Done", destination=name)
    settle(other, host, app)
    assert not [each for each in app.queue if each.header.sender == other.unique_name]


def test_second_hello_is_refused(stage: Stage) -> None:
    host, app = stage.host(), stage.app(EVERYTHING)
    assert _refused(app, "Hello") == _refused(host, "Hello") == f"{ERROR}Failed"


# owner changes


def test_owner_changes_are_told_of_names_that_may_be_seen(stage: Stage) -> None:
    name, hidden = stage.name(), stage.name()
    app = stage.app(f"see:{name}")
    app.add_match(f"type='signal',sender='{BUS}',member='NameOwnerChanged'")
    host = stage.host(name, hidden)
    settle(host)
    assert told(app) == [(name, "", host.unique_name)]
    assert host.release_name(hidden) == 1
    assert host.release_name(name) == 1
    assert told(app) == [(name, host.unique_name, "")]
    assert told(app) == []


def test_owner_changes_are_not_told_without_a_subscription(stage: Stage) -> None:
    name = stage.name()
    app = listen(stage.app(f"see:{name}"))
    settle(stage.host(name))
    assert told(app) == []


def test_end_of_a_visible_connection_is_told(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"see:{name}")
    app.add_match(f"type='signal',sender='{BUS}',member='NameOwnerChanged'")
    assert app.name_owner(name) == host.unique_name
    host.close()
    stage.warden.host.driver("GetId")
    changes = told(app)
    assert (name, host.unique_name, "") in changes
    if stage.warden.bus.kind == BROKER:
        assert len(changes) == len(set(changes))
