"""Rules on real buses: how a refusal looks to the app, and that each one is reported."""

from typing import Any

import pytest

from broker.wire.header import Flag
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
from integration.harness.supervised import wait_for
from integration.harness.values import Variant

ABSENT = "org.example.Absent"
ABSENT_UNIQUE = ":1.4000000"


def _says_of_absent(host: RawClient, name: str, *args: Any, **named: Any) -> tuple[str, str]:
    """Return what the bus says to the host of a name that is really absent, as if it had been of this one."""
    absent = ABSENT_UNIQUE if name.startswith(":") else ABSENT
    in_place = {name: absent}
    named["values"] = tuple(in_place.get(each, each) for each in named.get("values", ()))
    error = refusal(host, *(in_place.get(each, each) for each in args), **named)
    assert error is not None
    return error[0], error[1].replace(absent, name)


# what the app is told


@pytest.mark.parametrize("flags", [0, Flag.NO_AUTO_START])
def test_hidden_name_is_as_one_that_does_not_exist(stage: Stage, flags: int) -> None:
    name = stage.name()
    host, peer = stage.host(name), stage.owner(f"{name}.peer")
    for app in (stage.app(), stage.app("send:org.example.Else", "see:org.example.Else.*")):
        for hidden in (name, host.unique_name, f"{name}.peer", peer.unique_name):
            question = (hidden, PATH, INTERFACE, "Do")
            told = refusal(app, *question, flags=flags)
            assert told == _says_of_absent(host, hidden, *question, flags=flags)
            assert told is not None
            assert told[0] == (NO_OWNER if flags else UNKNOWN)
        # And one that does not exist is as one that does not exist.
        for absent in (ABSENT, ABSENT_UNIQUE):
            question = (absent, PATH, INTERFACE, "Do")
            assert refusal(app, *question, flags=flags) == refusal(host, *question, flags=flags)
    assert arrivals(host) == []


@pytest.mark.parametrize(
    "member",
    [
        "GetNameOwner",
        "GetConnectionUnixUser",
        "GetConnectionUnixProcessID",
        "GetConnectionCredentials",
        "GetConnectionSELinuxSecurityContext",
        "GetAdtAuditSessionData",
    ],
)
def test_looking_up_a_hidden_name_is_as_one_that_does_not_exist(stage: Stage, member: str) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app("see:org.example.Else")
    for hidden in (name, host.unique_name, ABSENT, ABSENT_UNIQUE):
        question = (BUS, BUS_PATH, BUS, member)
        told = refusal(app, *question, signature="s", values=(hidden,))
        assert told == _says_of_absent(host, hidden, *question, signature="s", values=(hidden,))


def test_starting_a_hidden_name_is_as_one_that_does_not_exist(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app()
    for hidden in (name, ABSENT):
        question = (BUS, BUS_PATH, BUS, "StartServiceByName", "su", (hidden, 0))
        absent = refusal(host, *question[:5], (ABSENT, 0))
        assert absent is not None
        assert refusal(app, *question) == (absent[0], absent[1].replace(ABSENT, hidden))


def test_visible_name_is_denied_with_the_reason(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"see:{name}")
    error = refusal(app, name, PATH, INTERFACE, "Do")
    assert error is not None
    assert error[0] == DENIED
    for word in (f"{INTERFACE}.Do", PATH, name, "no rule allows"):
        assert word in error[1]
    rule = f"send:{host.unique_name}:{INTERFACE}.Do"
    stage.set_rules(app, "send+see:", deny=[rule])
    error = refusal(app, host.unique_name, PATH, INTERFACE, "Do")
    assert error is not None
    assert error[0] == DENIED
    assert rule in error[1]


def test_deny_rule_shows_nothing_of_the_name_it_denies(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app("send:", deny=[f"send:{name}"])
    assert call(app, host, name) == UNKNOWN
    assert call(app, host, host.unique_name) == UNKNOWN


def test_refusal_comes_from_the_bus(stage: Stage) -> None:
    name = stage.name()
    stage.host(name)
    for app in (stage.app(), stage.app(f"see:{name}")):
        header = app.call(name, PATH, INTERFACE, "Do").header
        assert (header.sender, header.destination) == (BUS, app.unique_name)


def test_caller_may_call_back_and_is_told_why_not(stage: Stage) -> None:
    host, app = stage.host(), stage.app()
    assert call(app, host, host.unique_name) == UNKNOWN
    host.start_call(app.unique_name, PATH, INTERFACE, "Do", flags=Flag.NO_REPLY_EXPECTED)
    settle(host)
    arrivals(app)
    assert call(app, host, host.unique_name) == DENIED


def test_receiver_that_refuses_says_so_to_who_may_call_it(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(), stage.app(f"own:{name}", from_host=False)
    assert app.request_name(name) == 1
    error = refusal(host, name, PATH, INTERFACE, "Do")
    assert error is not None
    assert error[0] == DENIED


def test_refused_calls_and_signals_in_a_row_are_answered_in_order(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}:{INTERFACE}.Do")
    serials = [
        app.start_call(name, PATH, INTERFACE, "Undo" if number % 3 else "Do")
        for number in range(30)
    ]
    app.emit(PATH, INTERFACE, "Done", destination=name)
    settle(app)
    got = arrivals(host)
    assert [each.header.serial for each in got] == serials[::3]
    for each in got:
        host.reply(each)
    for number, serial in enumerate(serials):
        assert app.wait_reply(serial).error == (DENIED if number % 3 else None)


# what vanishes


def test_refused_signals_and_mute_calls_vanish(stage: Stage) -> None:
    name = stage.name()
    host = listen(stage.host(name))
    for app in (stage.app(), stage.app(f"see:{name}")):
        assert not mute_call(app, host, name)
        assert not mute_call(app, host, host.unique_name)
        assert not mute_call(app, host, ABSENT)
        assert not signal(app, host, name)
        assert not signal(app, host, host.unique_name)
        assert not signal(app, host)


def test_refused_mute_calls_to_an_app_vanish(stage: Stage) -> None:
    host, app = stage.host(), stage.app(from_host=False)
    assert not mute_call(host, app, app.unique_name)
    assert not signal(host, app, app.unique_name)


# reports


def _what(denial: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        denial[key] for key in ("direction", "kind", "peer", "path", "interface", "member")
    )


def test_every_refusal_out_is_reported(stage: Stage) -> None:
    name, hidden = stage.name(), stage.name()
    host, app = stage.host(name, hidden), stage.app(f"own:{name}.mine")
    do, done = (PATH, INTERFACE, "Do"), (PATH, INTERFACE, "Done")
    call(app, host, name)
    mute_call(app, host, name)
    call(app, host, host.unique_name)
    signal(app, host, name)
    signal(app, host)
    for member, signature, values in (
        ("RequestName", "su", (name, 0)),
        ("GetNameOwner", "s", (hidden,)),
        ("NameHasOwner", "s", (hidden,)),
        ("StartServiceByName", "su", (hidden, 0)),
        ("ReloadConfig", "", ()),
        ("BecomeMonitor", "asu", ([], 0)),
    ):
        app.call(BUS, BUS_PATH, BUS, member, signature, values)
    assert [_what(each) for each in stage.denials(app)] == [
        ("send", "call", name, *do),
        ("send", "call", name, *do),
        ("send", "call", host.unique_name, *do),
        ("send", "signal", name, *done),
        ("send", "signal", "", *done),
        ("own", "call", name, BUS_PATH, BUS, "RequestName"),
        ("see", "call", hidden, BUS_PATH, BUS, "GetNameOwner"),
        ("see", "call", hidden, BUS_PATH, BUS, "NameHasOwner"),
        ("send", "call", hidden, BUS_PATH, BUS, "StartServiceByName"),
        ("send", "call", BUS, BUS_PATH, BUS, "ReloadConfig"),
        ("send", "call", BUS, BUS_PATH, BUS, "BecomeMonitor"),
    ]


def test_every_refusal_in_is_reported(stage: Stage) -> None:
    host = stage.host()
    peer = stage.app("send:", app="org.example.Peer")
    app = listen(stage.app(from_host=False))
    for sender in (host, peer):
        call(sender, app, app.unique_name)
        mute_call(sender, app, app.unique_name)
        signal(sender, app, app.unique_name)
        signal(sender, app)
    expected = [
        ("receive", kind, sender.unique_name, PATH, INTERFACE, member)
        for sender in (host, peer)
        for kind, member in (("call", "Do"), ("call", "Do"), ("signal", "Done"), ("signal", "Done"))
    ]
    assert [_what(each) for each in stage.denials(app)] == expected
    assert stage.denials(peer) == []


def test_report_says_which_rule_and_whose(stage: Stage) -> None:
    name, rule = stage.name(), "send::org.example.Thing.Undo"
    host, app = stage.host(name), stage.app(f"send:{name}", deny=[rule])
    call(app, host, name, member="Undo")
    (denial,) = stage.denials(app)
    assert rule in denial["reason"]
    assert denial["origin"]
    assert denial["bus"] == "session"


def test_refusals_are_counted_beyond_those_reported(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app()
    for _ in range(500):
        app.start_call(name, PATH, INTERFACE, "Do", flags=Flag.NO_REPLY_EXPECTED)
    settle(app)
    reported = stage.denials(app)
    assert 0 < len(reported) <= 50
    assert all(_what(each)[:3] == ("send", "call", name) for each in reported)
    assert arrivals(host) == []
    wait_for(lambda: stage.warden.show(stage.sandbox(app))["denied"] == 500)


def test_what_is_allowed_is_not_reported(stage: Stage) -> None:
    name = stage.name()
    host, app = listen(stage.host(name)), stage.app("send+see:", f"own:{name}.mine")
    call(app, host, name)
    mute_call(app, host, name)
    signal(app, host)
    app.request_name(f"{name}.mine")
    app.list_names()
    app.name_owner(name)
    call(host, app, app.unique_name)
    assert stage.denials(app) == []


def test_portals_are_denied_with_the_reason_unless_asked_for(stage: Stage) -> None:
    portal = "org.freedesktop.portal.Test"
    host, app = stage.host(portal), stage.app("send+see:", f"send:{portal}")
    assert call(app, host, portal) == DENIED
    assert call(app, host, host.unique_name) == DENIED
    assert all("portals" in each["origin"] for each in stage.denials(app))
    insists = Variant("b", True)
    sandbox = stage.warden.add_server(rules=[f"send:{portal}"], PortalsAsHost=insists)
    assert call(stage.warden.connect(sandbox), host, portal) == PASSED
