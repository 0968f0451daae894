"""Threats C18 to C25: replies, forged and real, and connections that end while one is awaited."""

import os
import socket

import pytest

from broker.wire.header import Flag, MessageType
from integration.harness.messages import make_header, make_message
from integration.harness.rawclient import BUS, BUS_PATH, RawClient
from integration.harness.scripts import auth
from integration.harness.stage import ERROR, INTERFACE, PATH, Stage, arrivals, settle
from integration.harness.supervised import wait_for
from integration.harness.threats import Scene, assert_rests

WISHED = "org.example.Error.Wished"


@pytest.fixture
def stage(scene: Scene) -> Stage:
    """More apps and hosts, on the same gate."""
    return Stage(scene.warden)


class WithoutFds(RawClient):
    """A client that does not negotiate descriptors."""

    def _authenticate(self, uid: int) -> None:
        assert uid == os.getuid()
        self.send_raw(auth())
        assert self.sock.recv(4096).startswith(b"OK ")
        self.send_raw(b"BEGIN\r\n")


def call_with_serial(client: RawClient, destination: str, serial: int) -> None:
    header = make_header(
        MessageType.METHOD_CALL,
        serial,
        path=PATH,
        interface=INTERFACE,
        member="Do",
        destination=destination,
    )
    client.send_raw(make_message(header))


def forge(
    sender: RawClient, destination: str | None, serial: int, *, error: str | None = None
) -> None:
    """Send a reply that nobody has asked this sender for."""
    header = make_header(
        MessageType.ERROR if error else MessageType.METHOD_RETURN,
        sender.next_serial(),
        error_name=error,
        reply_serial=serial,
        destination=destination,
        signature="s",
    )
    sender.send_raw(make_message(header, ("forged",)))
    settle(sender)


def with_fd(kind: MessageType, serial: int, destination: str | None, reply_to: int = 0) -> bytes:
    is_reply = kind == MessageType.METHOD_RETURN
    header = make_header(
        kind,
        serial,
        path=None if is_reply else PATH,
        interface=None if is_reply else INTERFACE,
        member=None if is_reply else "Fd",
        reply_serial=reply_to or None,
        destination=destination,
        unix_fds=1,
    )
    return make_message(header)


# -- replies of an app -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, WISHED])
def test_c18_only_who_was_asked_answers_and_once(stage: Stage, error: str | None) -> None:
    name = stage.name()
    asker, other = stage.host(name), stage.host()
    app, accomplice = stage.app("send+receive:"), stage.app("send+receive:")
    serial = asker.start_call(app.unique_name, PATH, INTERFACE, "Do")
    got = app.wait_call("Do")
    for destination, number in (
        (other.unique_name, serial),  # another's
        (asker.unique_name, serial + 1),  # another call
        (name, serial),  # not as the caller is called
        (BUS, serial),
        (None, serial),
    ):
        forge(app, destination, number, error=error)
    forge(accomplice, asker.unique_name, serial, error=error)
    for _ in range(3):
        app.reply(got, "s", ("real",), error=error)
    settle(app)
    assert [(each.header.reply_serial, each.values) for each in arrivals(asker)] == [
        (serial, ("real",))
    ]
    assert arrivals(other) == []
    assert {each["kind"] for each in stage.denials(app)} == {"reply"}


def test_c19_two_callers_with_one_serial(stage: Stage) -> None:
    app, hosts = stage.app(), [stage.host(), stage.host()]
    for serial in (500, 0xFFFFFFFF):
        for host in hosts:
            call_with_serial(host, app.unique_name, serial)
        for got in [app.wait_call("Do") for _ in hosts]:
            app.reply(got, "s", (got.header.sender,))
        for host in hosts:
            assert host.wait_reply(serial).values == (host.unique_name,)


def test_c19_two_apps_with_one_serial(stage: Stage) -> None:
    name = stage.name()
    host, apps = stage.host(name), [stage.app(f"send:{name}"), stage.app(f"send:{name}")]
    for serial in (500, 0xFFFFFFFF):
        for app in apps:
            call_with_serial(app, name, serial)
        for got in [host.wait_call("Do") for _ in apps]:
            host.reply(got, "s", (got.header.sender,))
        for app in apps:
            assert app.wait_reply(serial).values == (app.unique_name,)


# -- replies to an app ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, WISHED])
@pytest.mark.parametrize("serial", [500, 0xFFFFFFF0])
def test_c20_replies_come_from_who_was_called(stage: Stage, serial: int, error: str | None) -> None:
    name = stage.name()
    first, second, forger = stage.host(name), stage.host(), stage.host()
    app = stage.app("send+receive:")
    for late in (False, True):
        call_with_serial(app, name, serial)
        got = first.wait_call("Do")
        if late:  # whoever has owned the name since may answer
            assert first.release_name(name) == 1
            assert second.request_name(name) == 1
        for number in (serial, got.header.serial, 1, 0xFFFFFFFF, 0xFFF00000):
            forge(forger, app.unique_name, number, error=error)
        assert arrivals(app) == []
        first.reply(got, "s", ("real",), error=error)
        assert app.wait_reply(serial).values == ("real",)
        first.reply(got, "s", ("again",), error=error)
        settle(first)
        assert arrivals(app) == []


def test_c21_replies_to_calls_that_want_none_vanish(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    for member in ("GetId", "ListNames", "NoSuchMethod"):  # dbus-daemon answers some
        app.start_call(BUS, BUS_PATH, BUS, member, flags=Flag.NO_REPLY_EXPECTED)
    app.start_call(name, PATH, INTERFACE, "Do", flags=Flag.NO_REPLY_EXPECTED)
    host.reply(host.wait_call("Do"), "s", ("unwanted",))
    settle(host, app)
    assert [each for each in app.queue if each.header.reply_serial] == []


def test_c22_descriptors_for_who_takes_none(stage: Stage) -> None:
    name = stage.name()
    host = stage.host(name)
    sandbox = stage.warden.add_server(rules=[f"send+receive:{name}"])
    read_end, write_end = os.pipe()
    with WithoutFds.connect(sandbox.address) as app:
        app.add_match(f"type='signal',sender='{name}'")
        call = with_fd(MessageType.METHOD_CALL, 900, app.unique_name)
        host.send_raw(call, [write_end])
        assert host.wait_reply(900).error == f"{ERROR}NotSupported"
        signal = with_fd(MessageType.SIGNAL, 901, app.unique_name)
        host.send_raw(signal, [write_end])
        host.send_raw(with_fd(MessageType.SIGNAL, 903, None), [write_end])
        serial = app.start_call(name, PATH, INTERFACE, "Do")
        got = host.wait_call("Do").header.serial
        answer = with_fd(MessageType.METHOD_RETURN, 902, app.unique_name, got)
        host.send_raw(answer, [write_end])
        assert app.wait_reply(serial).error == f"{ERROR}NotSupported"
        assert arrivals(app) == []
        os.close(write_end)
        assert os.read(read_end, 1) == b""  # nobody has a copy
    os.close(read_end)


# -- connections that end ------------------------------------------------------------------------------------


def test_c23_app_that_leaves_with_calls_open(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    own = [host.start_call(app.unique_name, PATH, INTERFACE, "Do") for _ in range(5)]
    for _ in own:
        app.wait_call("Do")
    for _ in range(5):
        app.start_call(name, PATH, INTERFACE, "Do")
    gone = app.unique_name
    calls = [host.wait_call("Do") for _ in range(5)]
    app.close()
    for serial in own:
        assert host.wait_reply(serial).error == f"{ERROR}NoReply"
    for each in calls:
        host.reply(each, "s", ("too late",))
    settle(host)
    assert gone not in host.list_names()


def test_c24_callee_that_leaves(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    serials = [app.start_call(name, PATH, INTERFACE, "Do") for _ in range(5)]
    call_with_serial(app, name, 0xFFFFFFFF)
    for _ in range(6):
        host.wait_call("Do")
    host.close()
    for serial in (*serials, 0xFFFFFFFF):
        reply = app.wait_reply(serial)
        assert (reply.error, reply.header.sender) == (f"{ERROR}NoReply", BUS)


def test_c25_half_closed_is_closed(scene: Scene, stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    asked = host.start_call(app.unique_name, PATH, INTERFACE, "Do")
    app.start_call(name, PATH, INTERFACE, "Do")
    got = host.wait_call("Do")
    app.sock.shutdown(socket.SHUT_WR)
    scene.assert_closed(app)
    assert host.wait_reply(asked).error == f"{ERROR}NoReply"
    host.reply(got, "s", ("too late",))
    wait_for(lambda: app.unique_name not in host.list_names())
    assert_rests(scene.warden.gate_pid)
