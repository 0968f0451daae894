"""Threats C1 to C17: registration, and where messages go."""

from pathlib import Path

import pytest

from broker.wire.header import Flag, MessageType
from integration.harness.clients import TEXT_CALLS
from integration.harness.messages import make_header, make_message
from integration.harness.processes import running
from integration.harness.rawclient import BUS, BUS_PATH
from integration.harness.scripts import echo, echo_message
from integration.harness.service import ECHO, PATH as ECHO_PATH
from integration.harness.stage import (
    DENIED,
    ERROR,
    INTERFACE,
    NO_OWNER,
    OWNER_CHANGED,
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
from integration.harness.threats import Scene

ABSENT = "org.example.Absent"
ABSENT_UNIQUE = ":1.4000000"


@pytest.fixture
def stage(scene: Scene) -> Stage:
    """More apps and hosts, on the same gate."""
    return Stage(scene.warden)


# -- registration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("destination", [BUS, None])
def test_c1_calls_before_hello_are_denied(scene: Scene, destination: str | None) -> None:
    client = scene.attack(hello=False)
    for interface, member in ((f"{BUS}.Peer", "Ping"), (BUS, "ListNames"), (None, "GetId")):
        assert client.call(destination, BUS_PATH, interface, member).error == DENIED
    client.hello()
    echo(client)


@pytest.mark.parametrize("kind", MessageType)
def test_c1_messages_to_others_before_hello_end_the_connection(
    scene: Scene, kind: MessageType
) -> None:
    listen(scene.host)
    client = scene.attack(hello=False)
    is_reply = kind in (MessageType.METHOD_RETURN, MessageType.ERROR)
    header = make_header(
        kind,
        1,
        path=None if is_reply else PATH,
        interface=None if is_reply else INTERFACE,
        member=None if is_reply else "Done",
        error_name=f"{ERROR}Failed" if kind == MessageType.ERROR else None,
        reply_serial=1 if is_reply else None,
        destination=None if kind == MessageType.SIGNAL else scene.host.unique_name,
    )
    client.send_raw(make_message(header))
    scene.assert_closed(client)
    assert arrivals(scene.host) == []


def test_c2_hello_again_fails_and_changes_nothing(scene: Scene) -> None:
    client = scene.attack()
    names = set(scene.host.list_names())
    for path, interface in ((BUS_PATH, BUS), ("/any", None)):
        assert client.call(BUS, path, interface, "Hello").error == f"{ERROR}Failed"
    client.start_call(BUS, BUS_PATH, BUS, "Hello", flags=Flag.NO_REPLY_EXPECTED)
    echo(client)
    assert set(scene.host.list_names()) == names
    assert scene.warden.who(client.unique_name) == scene.villain.path


def test_c3_serials_may_be_any(scene: Scene) -> None:
    client = scene.attack()
    serials = [0xFFFFFFFF, 0xFFF00000, 7, 0xFFFFFFFE, 6, 0x80000000]
    for _ in range(2):
        client.send_raw(b"".join(echo_message(serial, str(serial)) for serial in serials))
        for serial in serials:
            assert client.wait_reply(serial).values == (str(serial),)


def test_c3_proxy_in_front_of_the_gate(scene: Scene, folder: Path) -> None:
    # It numbers the messages anew, and asks the bus things of its own in between.
    path = folder / "proxy"
    argv = ["xdg-dbus-proxy", scene.villain.address, str(path), "--filter", f"--talk={ECHO}"]
    with running(argv):
        wait_for(path.exists)
        for library in ("gdbus", "dbus-send"):  # it cannot do with sd-bus's handshake
            outcome = TEXT_CALLS[library](
                f"unix:path={path}", ECHO, ECHO_PATH, f"{ECHO}.Echo", "through two"
            )
            assert "through two" in outcome.out, outcome


def test_c4_serial_of_a_call_that_waits_is_refused(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    for serial in (70, 0xFFFFFFFD):
        header = make_header(
            MessageType.METHOD_CALL,
            serial,
            path=PATH,
            interface=INTERFACE,
            member="Do",
            destination=name,
        )
        app.send_raw(make_message(header) * 3)
        settle(app)
        for _ in range(2):
            assert app.wait_reply(serial).error == DENIED
        (got,) = arrivals(host)
        host.reply(got, "s", ("once",))
        assert app.wait_reply(serial).values == ("once",)
        app.send_raw(make_message(header))
        host.reply(host.wait_call("Do"), "s", ("again",))
        assert app.wait_reply(serial).values == ("again",)


def test_c5_waiting_calls_are_bounded_and_forgotten(scene: Scene, stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    for _ in range(2):
        serials = [app.start_call(name, PATH, INTERFACE, "Do") for _ in range(40)]
        errors = [app.wait_reply(serial).error for serial in serials[32:]]
        assert set(errors) == {f"{ERROR}LimitsExceeded"}
        for _ in range(32):
            host.reply(host.wait_call("Do"))
        assert {app.wait_reply(serial).error for serial in serials[:32]} == {None}
    for _ in range(32):
        app.start_call(name, PATH, INTERFACE, "Do")
    again = scene.warden.connect(stage.sandbox(app))
    for _ in range(32):
        host.wait_call("Do")
    app.close()
    assert call(again, host, name) == PASSED


# -- destinations ------------------------------------------------------------------------------------------


def test_c6_calls_to_nobody(stage: Stage) -> None:
    app, host = stage.app("send:org.example.Else"), stage.host()
    assert app.ask(None, "/any", f"{BUS}.Peer", "Ping") == ()
    assert app.call(None, "/", f"{BUS}.Peer", "GetMachineId").error == DENIED
    for interface, member in ((INTERFACE, "Do"), (None, "Do"), (BUS, "GetId"), (BUS, "Hello")):
        error = app.call(None, PATH, interface, member).error
        assert error == f"{ERROR}UnknownMethod"
    stage.set_rules(app, f"send:{BUS}")
    expected = host.ask(None, "/", f"{BUS}.Peer", "GetMachineId")
    assert app.ask(None, "/", f"{BUS}.Peer", "GetMachineId") == expected


@pytest.mark.parametrize("error", [None, f"{ERROR}Failed"])
def test_c7_replies_to_nobody_vanish(stage: Stage, error: str | None) -> None:
    host, app = stage.host(), stage.app()
    serial = host.start_call(app.unique_name, PATH, INTERFACE, "Do")
    got = app.wait_call("Do")
    kind = MessageType.ERROR if error else MessageType.METHOD_RETURN
    header = make_header(kind, 9, error_name=error, reply_serial=serial)
    app.send_raw(make_message(header))
    settle(app)
    assert arrivals(host) == []
    app.reply(got, "s", ("real",))
    assert host.wait_reply(serial).values == ("real",)


def test_c8_call_without_interface(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}:{INTERFACE}.Do")
    assert call(app, host, name, interface=None) == DENIED
    stage.set_rules(app, f"send:{name}")
    assert call(app, host, name, interface=None) == PASSED
    # A service looks for the member in all its interfaces: a deny for one of them counts.
    stage.set_rules(app, f"send:{name}", deny=[f"send:{name}:{INTERFACE}.Undo"])
    assert call(app, host, name, interface=None, member="Undo") == DENIED
    assert call(app, host, name, interface=None) == PASSED
    stage.set_rules(app, f"send:{name}", deny=[f"send::{INTERFACE}.*"])
    assert call(app, host, name, interface=None) == DENIED


@pytest.mark.parametrize("path", [BUS_PATH, "/any"])
def test_c9_bus_calls_without_interface_or_on_odd_paths(stage: Stage, path: str) -> None:
    name = stage.name()
    stage.host(name)
    app = stage.app("send:", deny=[f"send:{BUS}:{BUS}.Reload*", f"send:{name}"])
    for interface in (None, BUS):
        for member, signature, values, error in (
            ("BecomeMonitor", "asu", ([], 0), DENIED),
            ("GetConnectionStats", "s", (":1.0",), DENIED),
            ("UpdateActivationEnvironment", "a{ss}", ({"A": "b"},), DENIED),
            ("ReloadConfig", "", (), DENIED),
            ("RequestName", "su", (name, 0), UNKNOWN),
            ("RequestName", "s", (name,), f"{ERROR}InvalidArgs"),
            ("NameHasOwner", "u", (1,), f"{ERROR}InvalidArgs"),
            ("GetNameOwner", "s", (name,), NO_OWNER),
        ):
            reply = app.call(BUS, path, interface, member, signature, values)
            assert reply.error == error, (interface, member)
        assert name not in app.ask(BUS, path, interface, "ListNames")[0]


def test_c10_unique_name_of_a_hidden_service(stage: Stage) -> None:
    host = stage.host(stage.name())
    question = (PATH, INTERFACE, "Do")
    for app in (stage.app(), stage.app("send:org.example.Else")):
        for flags in (0, Flag.NO_AUTO_START):
            absent = refusal(host, ABSENT_UNIQUE, *question, flags=flags)
            assert absent is not None
            told = refusal(app, host.unique_name, *question, flags=flags)
            assert told == (absent[0], absent[1].replace(ABSENT_UNIQUE, host.unique_name))
            assert refusal(app, ABSENT_UNIQUE, *question, flags=flags) == absent


def test_c11_names_of_one_owner_are_one_other_end(stage: Stage) -> None:
    name, other = stage.name(), stage.name()
    host, app = stage.host(name, other), stage.app(f"send:{name}")
    assert call(app, host, other) == PASSED
    assert host.release_name(name) == 1
    assert call(app, host, other) == UNKNOWN
    assert host.request_name(name) == 1
    stage.set_rules(app, f"send:{name}", deny=[f"send+see:{other}"])
    for each in (name, other, host.unique_name):
        assert call(app, host, each) == UNKNOWN


def test_c12_unique_name_has_the_rules_of_its_names(stage: Stage) -> None:
    one, two = stage.name(), stage.name()
    host = stage.host(one, two)
    app = stage.app(f"send:{one}:org.one.*", f"send:{two}@/two/*:org.two.*")
    for each in (host.unique_name, one, two):
        assert call(app, host, each, interface="org.one") == PASSED
        assert call(app, host, each, interface="org.two") == DENIED
        assert call(app, host, each, interface="org.two", path="/two/x") == PASSED
        assert call(app, host, each, interface="org.three") == DENIED
    assert host.release_name(two) == 1
    assert call(app, host, host.unique_name, interface="org.two", path="/two/x") == DENIED


def test_c13_rights_end_with_the_name(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    assert call(app, host, host.unique_name) == PASSED
    serial = app.start_call(host.unique_name, PATH, INTERFACE, "Do")
    got = host.wait_call("Do")
    assert host.release_name(name) == 1
    settle(app)
    assert call(app, host, host.unique_name) == UNKNOWN
    assert not mute_call(app, host, host.unique_name)
    assert not signal(app, host, host.unique_name)
    host.reply(got, "s", ("late",))
    assert app.wait_reply(serial).values == ("late",)


def test_c14_owner_that_changes_meanwhile(stage: Stage) -> None:
    name = stage.name()
    one, two = stage.host(name), stage.host()
    app = stage.app(f"send:{name}")
    app.add_match(OWNER_CHANGED)
    for _ in range(10):
        # Sent while the name moves: by the name it comes to whoever has it, or to nobody.
        for _ in range(3):
            app.start_call(name, PATH, INTERFACE, "Do", flags=Flag.NO_REPLY_EXPECTED)
        assert one.release_name(name) == 1
        assert two.request_name(name) == 1
        settle(app, one, two)
        arrivals(one), arrivals(two)
        # The change has been told: the remembered verdict is gone.
        assert call(app, one, one.unique_name) == UNKNOWN
        assert call(app, two, two.unique_name) == PASSED
        one, two = two, one


def test_c15_unicast_signals_need_a_rule(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"see:{name}", f"send:{name}:{INTERFACE}.Done")
    for destination in (name, host.unique_name):
        assert signal(app, host, destination)
        assert not signal(app, host, destination, member="Undone")
    stage.set_rules(app)
    # Also to who has called: it is seen, and that is all.
    host.start_call(app.unique_name, PATH, INTERFACE, "Do", flags=Flag.NO_REPLY_EXPECTED)
    settle(host)
    arrivals(app)
    for destination in (name, host.unique_name):
        assert not signal(app, host, destination)


def test_c16_broadcasts_that_claim_to_be_of_the_system(stage: Stage) -> None:
    host = listen(stage.host())
    host.add_match("type='signal',path_namespace='/org/freedesktop/login1'")
    app = stage.app(f"send:@{PATH}/**:{INTERFACE}.*")
    login = "org.freedesktop.login1.Manager"
    for path in ("/org/freedesktop/login1", f"{PATH}/x"):
        assert not signal(app, host, path=path, interface=login, member="PrepareForSleep")
    assert not signal(app, host, path="/org/freedesktop/login1")
    assert signal(app, host, path=f"{PATH}/x")
    reported = {(each["kind"], each["interface"]) for each in stage.denials(app)}
    assert reported == {("signal", login), ("signal", INTERFACE)}


@pytest.mark.parametrize("kind", [MessageType.SIGNAL, MessageType.METHOD_RETURN, MessageType.ERROR])
def test_c17_nothing_but_calls_for_the_bus(stage: Stage, kind: MessageType) -> None:
    app, host = stage.app("send+receive+see:", f"send:{BUS}"), stage.host()
    host.add_match(f"type='signal',path='{BUS_PATH}'")
    is_signal = kind == MessageType.SIGNAL
    header = make_header(
        kind,
        app.next_serial(),
        path=BUS_PATH if is_signal else None,
        interface="org.freedesktop.systemd1.Activator" if is_signal else None,
        member="ActivationFailure" if is_signal else None,
        error_name=f"{ERROR}Failed" if kind == MessageType.ERROR else None,
        reply_serial=None if is_signal else 1,
        destination=BUS,
        signature="sss",
    )
    app.send_raw(make_message(header, ("org.example.Echo", f"{ERROR}Failed", "forged")))
    settle(app)
    assert arrivals(host) == []
    assert arrivals(app) == []
    assert len(stage.denials(app)) == is_signal
