"""What passes `buswarden proxy` and the real xdg-dbus-proxy beside calls to others: the same, on both buses.

Each test runs on both programs. What differs on purpose is in test_proxy_differences.py.
"""

import os

import pytest

from broker.wire.header import Flag, MessageType
from integration.harness.buses import DAEMON
from integration.harness.proxies import PROGRAMS, SECOND, Scene, World, echo_error, error_of
from integration.harness.rawclient import BUS, BUS_PATH, CallError, RawClient
from integration.harness.service import ECHO, PATH
from integration.harness.stage import (
    DENIED,
    NO_OWNER,
    OWNER_CHANGED,
    UNKNOWN,
    arrivals,
    call,
    settle,
    signal,
    told,
)

PEER = "org.freedesktop.DBus.Peer"
PROPERTIES = "org.freedesktop.DBus.Properties"


@pytest.fixture(params=list(PROGRAMS))
def scene(request: pytest.FixtureRequest, world: World) -> Scene:
    return Scene(kind=request.param, world=world)


# -- signals -------------------------------------------------------------------------------------------


def test_broadcasts_come_from_who_may_be_talked_to(scene: Scene) -> None:
    with RawClient.connect(scene.world.bus.address) as service:
        assert service.request_name("org.example.Speaker") == 1
        for option, heard in (("--talk", True), ("--own", True), ("--see", False)):
            with scene.client(f"{option}=org.example.Speaker") as app:
                app.add_match("type='signal'")
                assert signal(service, app) is heard


def test_all_broadcasts_go_out(scene: Scene) -> None:
    host = scene.world.host
    host.add_match("type='signal',path='/org/example/Thing'")
    with scene.client() as app:
        assert signal(app, host)
    host.remove_match("type='signal',path='/org/example/Thing'")


def test_signals_to_one_go_to_who_may_be_talked_to(scene: Scene) -> None:
    with RawClient.connect(scene.world.bus.address) as service:
        assert service.request_name("org.example.Hearer") == 1
        for option, heard in (("--talk", True), ("--see", False), ("--see-not", False)):
            name = "org.example.Hearer" if option != "--see-not" else "org.example.Nobody"
            with scene.client(f"{option.removesuffix('-not')}={name}") as app:
                assert signal(app, service, "org.example.Hearer") is heard


def test_signals_to_the_app_come_in(scene: Scene) -> None:
    with scene.client() as app:
        assert signal(scene.world.host, app, app.unique_name)


def test_owner_changes_of_seen_names_are_told(scene: Scene) -> None:
    with scene.client("--see=org.example.Came") as app:
        app.add_match(OWNER_CHANGED)
        with RawClient.connect(scene.world.bus.address) as service:
            service.request_name("org.example.Came")
            service.request_name("org.example.Unseen")
            settle(service)
            changes = [change for change in told(app) if change[0][0] != ":"]
        assert changes == [("org.example.Came", "", service.unique_name)]


@pytest.mark.parametrize("sloppy", [False, True])
def test_sloppy_names_tells_of_unique_names(scene: Scene, sloppy: bool) -> None:
    with scene.client(*(["--sloppy-names"] if sloppy else [])) as app:
        app.add_match(OWNER_CHANGED)
        with RawClient.connect(scene.world.bus.address) as stranger:
            name = stranger.unique_name
            assert ((name, "", name) in told(app)) is sloppy
            assert name not in app.list_names()
            assert error_of(app, "GetNameOwner", "s", name) == NO_OWNER


# -- who calls the app --------------------------------------------------------------------------------


def test_anybody_may_call_the_app_and_is_seen_then(scene: Scene) -> None:
    host = scene.world.host
    with scene.client() as app:
        assert app.driver("NameHasOwner", "s", host.unique_name) == (False,)
        assert call(host, app, app.unique_name) == "passed"
        assert app.driver("NameHasOwner", "s", host.unique_name) == (True,)
        assert host.unique_name in app.list_names()
        assert echo_error(app, host.unique_name) == DENIED


def test_an_app_may_talk_to_itself(scene: Scene) -> None:
    with scene.client() as app:
        serial = app.start_call(app.unique_name, "/self", "org.example.Self", "Do")
        app.reply(app.wait_call("Do"))
        assert app.wait_reply(serial).error is None


def test_two_clients_of_one_socket(scene: Scene) -> None:
    with scene.proxy("--filter", "--own=org.example.Mine") as proxy:
        one, two = proxy.connect(), proxy.connect()
        assert one.request_name("org.example.Mine") == 1
        assert call(two, one, "org.example.Mine") == "passed"
        assert echo_error(two, ECHO) == UNKNOWN


# -- the bus itself -----------------------------------------------------------------------------------


def test_calls_that_nobody_refuses(scene: Scene) -> None:
    with scene.client() as app:
        assert app.driver("GetId")
        assert app.ask(None, "/", PEER, "Ping") == ()
        assert app.ask(None, "/", PEER, "GetMachineId")
        assert app.ask(BUS, BUS_PATH, "org.freedesktop.DBus.Introspectable", "Introspect")
        app.add_match("type='signal',interface='x.Y'")
        app.remove_match("type='signal',interface='x.Y'")
        assert BUS in app.list_names()
        assert app.driver("NameHasOwner", "s", BUS) == (True,)
        assert app.name_owner(app.unique_name) == app.unique_name
        assert isinstance(app.driver("ListActivatableNames")[0], list)


@pytest.mark.parametrize(
    ("interface", "member", "signature", "values"),
    [
        ("org.freedesktop.DBus.Monitoring", "BecomeMonitor", "asu", ([], 0)),
        (BUS, "UpdateActivationEnvironment", "a{ss}", ({},)),
        (BUS, "ReloadConfig", "", ()),
        ("org.freedesktop.DBus.Debug.Stats", "GetStats", "", ()),
        (PROPERTIES, "GetAll", "s", (BUS,)),
    ],
)
def test_calls_to_the_bus_that_are_refused(
    scene: Scene, interface: str, member: str, signature: str, values: tuple[object, ...]
) -> None:
    with scene.client("--talk=org.example.*") as app:
        assert app.call(BUS, BUS_PATH, interface, member, signature, values).error == DENIED


@pytest.mark.parametrize("rule", ["eavesdrop='true'", "type='signal',eavesdrop=true"])
def test_eavesdropping_is_refused(scene: Scene, rule: str) -> None:
    with scene.client() as app:
        assert error_of(app, "AddMatch", "s", rule) == DENIED


def test_refused_calls_that_want_no_reply_vanish(scene: Scene) -> None:
    with scene.client() as app:
        app.start_call(ECHO, PATH, ECHO, "Echo", flags=Flag.NO_REPLY_EXPECTED)
        assert arrivals(app) == []


def test_order_is_kept(scene: Scene) -> None:
    with scene.client(f"--talk={ECHO}") as app:
        serials = [
            app.start_call((ECHO, SECOND)[number % 2], PATH, ECHO, "Echo", "s", ("x",))
            for number in range(40)
        ]
        got = [app.wait_reply(serial) for serial in serials]
        assert [each.error is None for each in got] == [number % 2 == 0 for number in range(40)]


def test_a_reply_that_nobody_asked_for_does_not_get_out(scene: Scene) -> None:
    host = scene.world.host
    with scene.client() as app:
        assert call(host, app, app.unique_name) == "passed"
        serial = host.start_call(app.unique_name, "/a", "a.b", "Once")
        once = app.wait_call("Once")
        app.reply(once, "s", ("first",))
        app.reply(once, "s", ("second",))
        assert host.wait_reply(serial).values == ("first",)
        assert arrivals(host) == []


def test_file_descriptors_go_both_ways(scene: Scene) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, bytes(range(10)))
    os.close(write_end)
    with scene.client(f"--talk={ECHO}") as app:
        reply = app.call(ECHO, PATH, ECHO, "Sum", "h", (0,), fds=[read_end])
        os.close(read_end)
        (fd,) = reply.fds
        assert os.read(fd, 99) == b"45"
        os.close(fd)


def test_a_large_message(scene: Scene) -> None:
    with scene.client(f"--talk={ECHO}") as app:
        reply = app.call(ECHO, PATH, ECHO, "Size", "ay", (bytes(8 * 2**20),), timeout=30)
        assert reply.values == (8 * 2**20,)


# -- without --filter ----------------------------------------------------------------------------------


def test_without_filter_everything_passes(scene: Scene) -> None:
    with scene.proxy(f"--see={ECHO}") as proxy:
        app = proxy.connect()
        assert echo_error(app, ECHO) == echo_error(app, SECOND) == ""
        assert set(app.list_names()) == set(scene.world.host.list_names())
        assert app.request_name("org.example.Anything") == 1
        assert call(scene.world.host, app, "org.example.Anything") == "passed"
        assert app.ask(BUS, BUS_PATH, PROPERTIES, "GetAll", "s", (BUS,))
        app.add_match("type='signal'")
        assert signal(scene.world.host, app)
        if scene.world.bus.kind == DAEMON:  # dbus-broker's controller here does not take it
            assert error_of(app, "UpdateActivationEnvironment", "a{ss}", {}) == ""


def test_without_filter_a_client_may_monitor(scene: Scene) -> None:
    with scene.proxy() as proxy:
        app = proxy.connect()
        monitoring = "org.freedesktop.DBus.Monitoring"
        assert app.call(BUS, BUS_PATH, monitoring, "BecomeMonitor", "asu", ([], 0)).error is None
        scene.world.host.call(ECHO, PATH, ECHO, "Echo", "s", ("overheard",))
        while (message := app.receive()).header.member != "Echo":
            pass
        assert message.values == ("overheard",)
        while (message := app.receive()).header.type != MessageType.METHOD_RETURN:
            pass
        assert message.values == ("overheard",)


def test_without_filter_file_descriptors_pass(scene: Scene) -> None:
    with scene.proxy() as proxy:
        app = proxy.connect()
        for text in (b"\x05\x06", b"\x07"):
            read_end, write_end = os.pipe()
            os.write(write_end, text)
            os.close(write_end)
            reply = app.call(ECHO, PATH, ECHO, "Sum", "h", (0,), fds=[read_end])
            os.close(read_end)
            (fd,) = reply.fds
            assert os.read(fd, 99) == str(sum(text)).encode()
            os.close(fd)


def test_hello_comes_first(scene: Scene) -> None:
    with scene.proxy() as proxy:
        app = proxy.connect(hello=False)
        with pytest.raises((CallError, EOFError, ConnectionError)):
            app.driver("GetId")
