"""Threats D1 to D11: the bus's own methods. Match rules are in test_threats_matches.py."""

from typing import Any

import pytest

from broker.wire.header import Flag, MessageType
from integration.harness.messages import make_header, make_message
from integration.harness.rawclient import BUS, BUS_PATH, RawClient
from integration.harness.stage import (
    DENIED,
    ERROR,
    INTERFACE,
    NO_OWNER,
    UNKNOWN,
    Stage,
    refusal,
    settle,
)
from integration.harness.threats import Scene

EVERYTHING = "send+receive+see+own:"
ABSENT = "org.example.Absent"
ABSENT_UNIQUE = ":1.4000000"
INVALID = f"{ERROR}InvalidArgs"
LOOK_UPS = (
    "GetNameOwner",
    "GetConnectionUnixUser",
    "GetConnectionUnixProcessID",
    "GetConnectionCredentials",
    "GetConnectionSELinuxSecurityContext",
    "GetAdtAuditSessionData",
)


@pytest.fixture
def stage(scene: Scene) -> Stage:
    """More apps and hosts, on the same gate."""
    return Stage(scene.warden)


def error_of(client: RawClient, member: str, signature: str = "", *values: Any) -> str | None:
    """Return the name of the bus's error, None if there is none."""
    return client.call(BUS, BUS_PATH, BUS, member, signature, values).error


def driver_message(
    serial: int, member: str, signature: str = "", *values: Any, flags: int = 0
) -> bytes:
    """Return a call to the bus with a serial of the test's choice."""
    header = make_header(
        MessageType.METHOD_CALL,
        serial,
        flags=flags,
        path=BUS_PATH,
        interface=BUS,
        member=member,
        destination=BUS,
        signature=signature,
    )
    return make_message(header, values)


def test_d1_only_what_is_listed(stage: Stage) -> None:
    app = stage.app("send:org.example.Else")
    for interface, member in (
        (BUS, "NoSuchMethod"),
        (BUS, "hello"),
        (BUS, "Ping"),
        (INTERFACE, "GetId"),
        (INTERFACE, "Do"),
        (f"{BUS}.Peer", "GetMachineId"),
        (f"{BUS}.Verbose", "EnableVerbose"),
        (f"{BUS}.Peer", "ListNames"),
    ):
        assert app.call(BUS, BUS_PATH, interface, member).error == DENIED, (interface, member)
    assert len(stage.denials(app)) == 8


@pytest.mark.parametrize(
    ("member", "signature", "values"),
    [
        ("AddMatch", "", ()),
        ("AddMatch", "ss", ("", "")),
        ("RemoveMatch", "u", (1,)),
        ("GetNameOwner", "o", ("/a",)),
        ("NameHasOwner", "ss", ("a.b", "a.b")),
        ("NameHasOwner", "s", ("nodots",)),
        ("GetConnectionCredentials", "s", ("",)),
        ("RequestName", "s", ("org.example.D1",)),
        ("RequestName", "us", (0, "org.example.D1")),
        ("ReleaseName", "", ()),
        ("ListQueuedOwners", "as", (["org.example.D1"],)),
        ("StartServiceByName", "s", ("org.example.D1",)),
    ],
)
def test_d1_arguments_have_the_right_types(
    stage: Stage, member: str, signature: str, values: tuple[Any, ...]
) -> None:
    app = stage.app(EVERYTHING)
    assert error_of(app, member, signature, *values) == INVALID
    app.start_call(BUS, BUS_PATH, BUS, member, signature, values, flags=Flag.NO_REPLY_EXPECTED)
    assert app.driver("GetId")


def test_d2_lists_have_only_what_may_be_seen(stage: Stage) -> None:
    seen, hidden, mine = stage.name(), stage.name(), stage.name()
    host, other = stage.host(seen, mine), stage.host(hidden)
    assert other.request_name(mine, 0) == 2
    app = stage.app(f"see:{seen}", f"own:{mine}")
    assert set(app.list_names()) == {BUS, seen, mine, host.unique_name, app.unique_name}
    assert app.ask(BUS, "/any", None, "ListNames") == (app.list_names(),)
    assert app.request_name(mine, 0) == 2
    queue = [host.unique_name, other.unique_name, app.unique_name]
    assert app.driver("ListQueuedOwners", "s", mine) == (queue,)
    assert hidden not in app.driver("ListActivatableNames")[0]


def test_d2_a_list_that_nobody_waits_for_is_no_other_calls_answer(stage: Stage) -> None:
    hidden, mine = stage.name(), stage.name()
    other, app = stage.host(hidden), stage.app(f"own:{mine}")
    # dbus-daemon answers calls to itself that want no reply.
    for member, signature, values, body in (
        ("GetId", "", (), app.driver("GetId")),
        ("RequestName", "su", (mine, 0), (1,)),
    ):
        serial = app.next_serial()
        questions = (
            driver_message(serial, "ListNames", flags=Flag.NO_REPLY_EXPECTED),
            driver_message(serial, "GetConnectionUnixUser", "s", BUS, flags=1),
            driver_message(serial, member, signature, *values),
        )
        app.send_raw(b"".join(questions))
        assert app.wait_reply(serial).values == body
    assert hidden not in str(app.queue)
    stage.set_rules(app)
    settle(app)
    assert other.driver("NameHasOwner", "s", mine) == (False,)


def test_d3_hidden_names_have_no_owner(stage: Stage) -> None:
    hidden = stage.name()
    other = stage.host(hidden)
    for app in (stage.app(), stage.app(f"see:{hidden}.x.*", "send:,peer=same-app")):
        for name in (hidden, other.unique_name, ABSENT, ABSENT_UNIQUE):
            assert app.driver("NameHasOwner", "s", name) == (False,)
            assert error_of(app, "GetNameOwner", "s", name) == NO_OWNER


@pytest.mark.parametrize("member", LOOK_UPS)
def test_d4_credentials_of_hidden_names(stage: Stage, member: str) -> None:
    seen, hidden = stage.name(), stage.name()
    host, other, app = stage.host(seen), stage.host(hidden), stage.app(f"see:{seen}")
    question = (BUS, BUS_PATH, BUS, member, "s")
    for name, absent in ((hidden, ABSENT), (other.unique_name, ABSENT_UNIQUE)):
        expected = refusal(host, *question, (absent,))
        assert expected is not None
        assert refusal(app, *question, (name,)) == (expected[0], expected[1].replace(absent, name))
    # What it may see it may ask about, itself and the bus too: docs/design.md.
    for name in (seen, host.unique_name, app.unique_name, BUS):
        mine, theirs = app.call(*question, (name,)), host.call(*question, (name,))
        if not theirs.fds:
            assert (mine.error, mine.body) == (theirs.error, theirs.body)


def test_attack_d4_no_descriptor_of_a_process_reaches_an_app(stage: Stage) -> None:
    host, app = stage.host(), stage.app("see:")
    for name in (app.unique_name, host.unique_name, BUS):
        question = (BUS, BUS_PATH, BUS, "GetConnectionCredentials", "s", (name,))
        theirs, mine = host.call(*question), app.call(*question)
        (expected,), (told,) = theirs.values, mine.values
        # Only newer buses (dbus 1.16, dbus-broker 37) have one: of the gate, of the host, of the bus.
        expected.pop("ProcessFD", None)
        assert (told, mine.fds) == (expected, [])


@pytest.mark.parametrize("name", [BUS, "org.freedesktop.DBus.x", ":1.1", "nodots", "", "a..b"])
def test_d5_names_that_are_not_for_it(stage: Stage, name: str) -> None:
    expected = {UNKNOWN} if name == "org.freedesktop.DBus.x" else {INVALID, DENIED}
    assert error_of(stage.app("own:org.example.*"), "RequestName", "su", name, 0) in expected
    if name != "org.freedesktop.DBus.x":
        assert error_of(stage.app(EVERYTHING), "RequestName", "su", name, 0) in expected


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 4, 7, 0xFFFFFFFF])
def test_d5_foreign_names_are_not_taken(stage: Stage, flags: int) -> None:
    name = stage.name()
    host, app = stage.host(), stage.app(f"send+see:{name}", f"own:{name}.mine")
    assert host.request_name(name, 1) == 1  # it allows to be replaced
    assert error_of(app, "RequestName", "su", name, flags) == DENIED
    assert host.name_owner(name) == host.unique_name
    assert app.request_name(f"{name}.mine", flags & 7) == 1
    assert app.request_name(f"{name}.mine", flags) == 4


def test_d5_unknown_flags_are_taken_away(stage: Stage) -> None:
    name = stage.name()
    app, host = stage.app(f"own:{name}"), stage.host()
    assert app.request_name(name, 0xFFFFFFF8) == 1
    assert host.request_name(name, 2 | 4) == 3  # it did not allow to be replaced


def test_d5_names_are_bounded(stage: Stage) -> None:
    base = stage.name()
    app = stage.app(f"own:{base}.*")
    for number in range(8):
        assert app.request_name(f"{base}.n{number}") == 1
    assert error_of(app, "RequestName", "su", f"{base}.more", 0) == f"{ERROR}LimitsExceeded"
    assert app.request_name(f"{base}.n0") == 4
    assert app.release_name(f"{base}.n0") == 1
    assert app.request_name(f"{base}.more") == 1


@pytest.mark.parametrize("member", ["ReleaseName", "ListQueuedOwners"])
def test_d6_names_of_others(stage: Stage, member: str) -> None:
    name, mine = stage.name(), stage.name()
    host, app = stage.host(name), stage.app(f"send+receive+see:{name}", f"own:{mine}")
    for each in (name, f"{mine}.more", ABSENT):
        assert error_of(app, member, "s", each) == (DENIED if each == name else UNKNOWN)
    assert error_of(app, member, "s", host.unique_name) == INVALID
    assert host.name_owner(name) == host.unique_name
    assert error_of(app, "ReleaseName", "s", mine) is None


NEVER: list[tuple[str, str, str, str, tuple[Any, ...]]] = [
    ("d8", BUS, "UpdateActivationEnvironment", "a{ss}", ({"A": "b"},)),
    ("d9", f"{BUS}.Monitoring", "BecomeMonitor", "asu", ([], 0)),
    ("d9", BUS, "BecomeMonitor", "asu", ([], 0)),
    ("d10", f"{BUS}.Debug.Stats", "GetStats", "", ()),
    ("d10", f"{BUS}.Debug.Stats", "GetConnectionStats", "s", (":1.0",)),
    ("d10", f"{BUS}.Debug.Stats", "GetAllMatchRules", "", ()),
    ("d10", f"{BUS}.Containers1", "AddServer", "ssa{sv}a{sv}", ("org.example.T", "a", {}, {})),
    ("d10", f"{BUS}.Containers1", "StopInstance", "o", ("/c0",)),
    ("d10", f"{BUS}.Containers1", "Anything", "", ()),
]


@pytest.mark.parametrize(
    ("interface", "member", "signature", "values"),
    [pytest.param(*rest, id=f"{item}-{rest[1]}") for item, *rest in NEVER],
)
def test_d8_d9_d10_never_whatever_the_rules(
    stage: Stage, interface: str, member: str, signature: str, values: tuple[Any, ...]
) -> None:
    app = stage.app(EVERYTHING, f"send:{BUS}", f"send:{BUS}:{interface}.{member}")
    anywhere = [interface] if member == "Anything" else [interface, None]
    for path in (BUS_PATH, "/any", "/org/freedesktop/DBus/Monitoring"):
        for each in anywhere:
            question = (BUS, path, each, member, signature, values)
            assert app.call(*question).error == DENIED
            app.start_call(*question, flags=Flag.NO_REPLY_EXPECTED)
    settle(app)
    assert app.driver("GetId")  # it did not become a monitor: those may say nothing


def test_d10_rest_needs_a_rule(stage: Stage) -> None:
    app, host = stage.app(), stage.host()
    properties = f"{BUS}.Properties"
    for member, signature, values in (
        ("Get", "ss", (BUS, "Features")),
        ("GetAll", "s", (BUS,)),
        ("GetAll", "s", ("",)),
        ("Set", "ss", (BUS, "Features")),
    ):
        for interface in (properties, None):
            question = (BUS, BUS_PATH, interface, member, signature, values)
            assert app.call(*question).error == DENIED
    assert error_of(app, "ReloadConfig") == DENIED
    stage.set_rules(app, f"send:{BUS}:{properties}.Get")
    question = (BUS, BUS_PATH, properties, "Get", "ss", (BUS, "Features"))
    mine, theirs = app.call(*question), host.call(*question)
    assert (mine.error, mine.body) == (theirs.error, theirs.body)
    assert app.call(BUS, BUS_PATH, properties, "GetAll", "s", (BUS,)).error == DENIED
    for never in ("Debug.Stats", "Containers1", "Monitoring"):
        question = (BUS, BUS_PATH, properties, "Get", "ss", (f"{BUS}.{never}", "X"))
        assert app.call(*question).error == DENIED


def test_d11_introspection_is_the_bus_s_own(stage: Stage) -> None:
    app, host = stage.app(), stage.host()
    for path in (BUS_PATH, "/"):
        question = (BUS, path, f"{BUS}.Introspectable", "Introspect")
        assert app.ask(*question) == host.ask(*question)
