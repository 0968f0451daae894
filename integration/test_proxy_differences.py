"""What `buswarden proxy` does otherwise than xdg-dbus-proxy, on purpose: the table of docs/proxy.md, row by row."""

import os

import pytest

from broker.wire.header import MessageType
from integration.harness.clients import TEXT_CALLS, busctl_text
from integration.harness.messages import make_header, make_message
from integration.harness.processes import wait_until
from integration.harness.proxies import OURS, STARTED, Scene, World
from integration.harness.rawclient import BUS, BUS_PATH, RawClient, connect_socket
from integration.harness.scripts import auth, echo, hello_message
from integration.harness.service import ECHO, PATH
from integration.harness.stage import DENIED, NO_OWNER, OWNER_CHANGED, call, settle, told

FAILED = "org.freedesktop.DBus.Error.Failed"


@pytest.fixture
def scene(world: World) -> Scene:
    return Scene(kind=OURS, world=world)


# -- clients ------------------------------------------------------------------------------------------


def test_a_pipelined_handshake_is_taken(scene: Scene) -> None:
    with scene.proxy("--filter", f"--talk={ECHO}") as proxy:
        sock = connect_socket(proxy.address)
        sock.settimeout(10)
        sock.sendall(auth() + b"NEGOTIATE_UNIX_FD\r\nBEGIN\r\n" + hello_message())
        data = b""
        while b"NameAcquired" not in data:
            data += sock.recv(4096)
        sock.close()
        assert busctl_text(proxy.address, ECHO, PATH, f"{ECHO}.Echo", "hi").out == 's "hi"\n'


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("program", list(TEXT_CALLS))
def test_real_clients_filtered_and_not(scene: Scene, program: str, filtered: bool) -> None:
    options = ["--filter", f"--talk={ECHO}"] if filtered else []
    with scene.proxy(*options) as proxy:
        done = TEXT_CALLS[program](proxy.address, ECHO, PATH, f"{ECHO}.Echo", "hi")
        assert (done.ok, "hi" in done.out) == (True, True), done.err


@pytest.mark.parametrize("filtered", [True, False])
def test_serials_may_be_any(scene: Scene, filtered: bool) -> None:
    with scene.proxy(*(["--filter", f"--talk={ECHO}"] if filtered else [])) as proxy:
        app = proxy.connect()
        for serial in (0xFFFFFFFF, 5, 4, 0xFFFF0000, 0xFFF00000, 4):
            header = make_header(
                MessageType.METHOD_CALL, serial, path=PATH, interface=ECHO, member="Echo",
                destination=ECHO, signature="s",
            )  # fmt: skip
            app.send_raw(make_message(header, ("x",)))
            assert app.wait_reply(serial).values == ("x",)


def test_a_second_hello_is_refused_here(scene: Scene) -> None:
    with scene.client(*(f"--see=org.example.N{number}" for number in range(20))) as app:
        for _ in range(2000):
            assert app.call(BUS, BUS_PATH, BUS, "Hello").error == FAILED
        assert app.driver("GetId")


@pytest.mark.parametrize("filtered", [True, False])
def test_broken_messages_end_their_connection_alone(scene: Scene, filtered: bool) -> None:
    with scene.proxy(*(["--filter", f"--talk={ECHO}"] if filtered else [])) as proxy:
        other = proxy.connect()
        before = proxy.fds
        for broken in (
            b"X" * 64,
            b"l\1\0\2" + bytes(60),
            hello_message()[:15] + b"\xff" + bytes(99),
        ):
            app = proxy.connect()
            app.send_raw(broken)
            assert app.is_closed()
            echo(other)
        read_end, write_end = os.pipe()
        app = proxy.connect()
        app.send_raw(hello_message(9), [read_end])
        assert app.is_closed()
        os.close(read_end)
        os.close(write_end)
        # No descriptor is kept, neither of the connections nor the one that no message named.
        assert wait_until(lambda: proxy.fds == before)


@pytest.mark.parametrize("filtered", [True, False])
def test_a_forged_sender_does_not_reach_the_bus(scene: Scene, filtered: bool) -> None:
    # REPLY_SERIAL on a call (which was CVE-2026-94422) and a made-up field go the same way.
    options = ["--filter", f"--talk={ECHO}", "--own=org.example.Mine"] if filtered else []
    forged = b"\x07\x01s\0\x04\0\0\0:9.9\0\0\0\0\x05\x01u\0\x07\0\0\0\x0a\x01s\0\x01\0\0\0x\0"
    with scene.proxy(*options) as proxy:
        app = proxy.connect()
        host = scene.world.host
        assert call(host, app, app.unique_name) == "passed"
        header = make_header(
            MessageType.METHOD_CALL,
            77,
            path=PATH,
            interface=ECHO,
            member="Sender",
            destination=ECHO,
        )
        data = make_message(header)
        fields = int.from_bytes(data[12:16], "little")
        made = bytearray(data[: 16 + fields] + bytes(-fields % 8) + forged)
        made[12:16] = (len(made) - 16).to_bytes(4, "little")
        app.send_raw(bytes(made + bytes(-len(made) % 8)))
        assert app.wait_reply(77).values == (app.unique_name,)


def test_rights_end_with_the_name(scene: Scene) -> None:
    with RawClient.connect(scene.world.bus.address) as service:
        service.request_name("org.example.Passing")
        with scene.client("--talk=org.example.Passing") as app:
            assert call(app, service, service.unique_name) == "passed"
            service.release_name("org.example.Passing")
            settle(service, app)
            assert call(app, service, service.unique_name) != "passed"


def test_a_broadcast_rule_does_not_start_the_service(scene: Scene) -> None:
    with scene.client(f"--broadcast={STARTED}=*") as app:
        error = app.call(BUS, BUS_PATH, BUS, "StartServiceByName", "su", (STARTED, 0)).error
        assert error == DENIED


def test_errors_are_worded_as_the_bus_words_them(scene: Scene) -> None:
    host = scene.world.host
    with scene.client() as app:
        for member in ("GetNameOwner", "GetConnectionUnixProcessID", "GetConnectionCredentials"):
            hidden = app.call(BUS, BUS_PATH, BUS, member, "s", (ECHO,))
            absent = host.call(BUS, BUS_PATH, BUS, member, "s", ("org.example.Absent",))
            assert hidden.error == absent.error == NO_OWNER
            assert hidden.header.sender == BUS
            assert hidden.values[0] == absent.values[0].replace("org.example.Absent", ECHO)
        for flags in (0, 2):
            hidden = app.call(ECHO, PATH, ECHO, "Echo", flags=flags)
            absent = host.call("org.example.Absent", PATH, ECHO, "Echo", flags=flags)
            assert hidden.error == absent.error


def test_owner_changes_come_to_who_asked_for_them(scene: Scene) -> None:
    with scene.client("--see=org.example.Came") as app:
        with RawClient.connect(scene.world.bus.address) as service:
            service.request_name("org.example.Came")
            settle(service)
            assert told(app) == []
            app.add_match(OWNER_CHANGED)
            service.release_name("org.example.Came")
            assert told(app) == [("org.example.Came", service.unique_name, "")]


def test_matches_of_the_proxy_are_not_the_apps(scene: Scene) -> None:
    rule = f"type='signal',sender='{BUS}',interface='{BUS}',member='NameOwnerChanged',arg0='{ECHO}'"
    with scene.client(f"--talk={ECHO}") as app:
        error = app.call(BUS, BUS_PATH, BUS, "RemoveMatch", "s", (rule,)).error
        assert error == "org.freedesktop.DBus.Error.MatchRuleNotFound"


def test_eavesdrop_as_a_value_is_no_eavesdropping(scene: Scene) -> None:
    with scene.client() as app:
        app.add_match("type='signal',arg0='eavesdrop=true'")
        app.add_match("type='signal',eavesdrop='false'")
        error = app.call(BUS, BUS_PATH, BUS, "AddMatch", "s", ("eavesdrop\t =\n'true'",)).error
        assert error == DENIED


def test_ping_of_the_bus_is_answered(scene: Scene) -> None:
    with scene.client() as app:
        assert app.ask(BUS, BUS_PATH, "org.freedesktop.DBus.Peer", "Ping") == ()
        assert app.ask(BUS, BUS_PATH, None, "GetId")
