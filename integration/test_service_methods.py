"""The Containers1 service, asked rightly: every method, named argument and signal of its interface."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from integration.harness.clients import busctl_call, dbus_send, gdbus_call
from integration.harness.rawclient import BUS, CallError, RawClient
from integration.harness.service import ECHO, PATH, running_service
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    DENY,
    INTERFACE_IS_MEMBER,
    NAME,
    NAME_SUBTREE,
    OWN,
    PATH_SUBTREE,
    SEE,
    SEND,
    TYPE,
    Sandbox,
    Usos,
    Warden,
)
from integration.harness.values import Variant
from policy.text import format_rule
from policy.wall import WALL

ACCESS_DENIED = "org.freedesktop.DBus.Error.AccessDenied"
SERVICE_UNKNOWN = "org.freedesktop.DBus.Error.ServiceUnknown"
NOT_CONTAINER = "org.freedesktop.DBus.Error.NotContainer"


def echo(client: RawClient, text: str = "hello") -> str | None:
    """Call the service; return the error's name, if it is one."""
    reply = client.call(ECHO, PATH, ECHO, "Echo", "s", (text,))
    assert reply.error or reply.values == (text,)
    return reply.error


def test_add_server_gives_a_path_a_socket_and_its_address(shared: Warden) -> None:
    sandbox = shared.add_server()
    assert sandbox.path.startswith("/org/freedesktop/DBus/Containers1/c")
    assert sandbox.socket.is_socket()
    assert sandbox.socket.name.startswith("dbus-")
    assert sandbox.socket.parent == shared.folder / "containers"
    where, _, guid = sandbox.address.partition(",guid=")
    assert where == f"unix:path={sandbox.socket}"
    assert len(bytes.fromhex(guid)) == 16
    assert shared.connect(sandbox).unique_name


def test_socket_is_for_its_user_alone(shared: Warden) -> None:
    sandbox = shared.add_server()
    assert sandbox.socket.stat().st_mode & 0o077 == 0
    assert sandbox.socket.parent.stat().st_mode & 0o077 == 0


def test_ids_count_up_and_are_never_given_again(shared: Warden) -> None:
    first, second = shared.add_server(), shared.add_server()
    shared.stop_instance(second)
    third = shared.add_server()
    numbers = [int(sandbox.id.removeprefix("c")) for sandbox in (first, second, third)]
    assert numbers == list(range(numbers[0], numbers[0] + 3))


def test_add_container_server_is_the_same(shared: Warden) -> None:
    values: tuple[Any, ...] = (
        TYPE,
        "org.example.Old",
        {},
        {"Rules": Variant("a(bs)", [(False, f"see:{ECHO}")])},
    )
    path, raw, address = shared.containers("AddContainerServer", "ssa{sv}a{sv}", *values)
    sandbox = Sandbox(path=path, socket=Path(raw[:-1].decode()), address=address)
    assert shared.connect(sandbox).unique_name
    shared.containers("RemoveContainerServer", "o", path)
    with pytest.raises(CallError, match="NotContainer"):
        shared.containers("GetInstanceInfo", "o", path)


def test_metadata_comes_back_as_it_was_given(shared: Warden) -> None:
    nested = Variant("a{sv}", {"inner": Variant("(us)", (7, "x")), "list": Variant("as", ["a"])})
    metadata = {
        "text": Variant("s", "Grüße"),
        "nested": nested,
        "bytes": Variant("ay", b"\0\1"),
        "big": Variant("t", 2**64 - 1),
        "double": Variant("d", 0.5),
        "variant": Variant("v", Variant("x", -1)),
        "": Variant("b", True),
    }
    sandbox = shared.add_server(metadata=metadata)
    expected = {
        "text": "Grüße",
        "nested": {"inner": (7, "x"), "list": ["a"]},
        "bytes": b"\0\1",
        "big": 2**64 - 1,
        "double": 0.5,
        "variant": -1,
        "": True,
    }
    assert shared.containers("GetInstanceInfo", "o", sandbox.path)[3] == expected
    assert shared.show(sandbox)["metadata"] == expected


@pytest.mark.parametrize("app", ["", "a b/c#d", "ünï", "x" * 4096, "[bold]\n"])
def test_an_app_may_have_any_name(shared: Warden, app: str) -> None:
    sandbox = shared.add_server(app)
    assert shared.containers("GetInstanceInfo", "o", sandbox.path)[2] == app
    assert shared.show(sandbox)["app"] == app


def test_allow_gives_rules_in_the_form_of_the_wire(shared: Warden) -> None:
    sandbox = shared.add_server(allow=[(SEND, ECHO, "/", "")])
    with running_service(shared.bus.address):
        client = shared.connect(sandbox)
        # Without PATH_SUBTREE the path is `/` alone.
        assert client.call(ECHO, "/", ECHO, "Echo", "s", ("x",)).error is None
        assert echo(client) == ACCESS_DENIED


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ((SEND, ECHO, PATH, f"{ECHO}"), None),
        ((SEND | NAME_SUBTREE | PATH_SUBTREE, "org.example", "/", ""), None),
        ((SEND | PATH_SUBTREE, ECHO, "/org/example", ""), None),
        ((SEND | PATH_SUBTREE | INTERFACE_IS_MEMBER, ECHO, "/", f"{ECHO}.Echo"), None),
        ((SEND | PATH_SUBTREE | INTERFACE_IS_MEMBER, ECHO, "/", f"{ECHO}.Sum"), ACCESS_DENIED),
        ((SEE | PATH_SUBTREE, ECHO, "/", ""), ACCESS_DENIED),
        ((SEND | PATH_SUBTREE, "org.example.Other", "/", ""), SERVICE_UNKNOWN),
        ((SEND | PATH_SUBTREE, "", "/", ""), None),
        ((OWN | PATH_SUBTREE, ECHO, "/", ""), ACCESS_DENIED),
    ],
)
def test_each_change_of_access_is_in_force_at_once(
    shared: Warden, entry: Usos, error: str | None
) -> None:
    sandbox = shared.add_server()
    with running_service(shared.bus.address):
        client = shared.connect(sandbox)
        assert echo(client) == SERVICE_UNKNOWN
        shared.set_access(sandbox, entry)
        assert echo(client) == error
        shared.set_access(sandbox)
        assert echo(client) == SERVICE_UNKNOWN


def test_set_container_access_takes_id_or_path_and_replaces(shared: Warden) -> None:
    sandbox = shared.add_server(rules=["see:org.example.Before"])
    allow = [(SEND | PATH_SUBTREE, ECHO, "/", ""), (SEND | DENY, "", "/secret", "")]
    shared.containers("SetContainerAccess", "sa(usos)", sandbox.path, allow)
    access = shared.show(sandbox)["access"]
    assert access == [(False, f"send:{ECHO}"), (True, "send:@/secret")]
    shared.containers("SetContainerAccess", "sa(usos)", sandbox.id, [])
    assert shared.show(sandbox)["access"] == []


def test_a_list_with_one_bad_rule_is_refused_whole(shared: Warden) -> None:
    sandbox = shared.add_server(rules=[f"send:{ECHO}"])
    with pytest.raises(CallError) as caught:
        shared.set_access(sandbox, (SEE, "org.example.Good", "/", ""), (SEE, "org..bad", "/", ""))
    assert caught.value.name == "org.freedesktop.DBus.Error.InvalidArgs"
    assert shared.show(sandbox)["access"] == [(False, f"send:{ECHO}")]


def test_stop_instance_ends_everything(shared: Warden) -> None:
    sandbox, other = shared.add_server(), shared.add_server()
    client, bystander = shared.connect(sandbox), shared.connect(other)
    shared.stop_instance(sandbox)
    assert client.is_closed(1)
    assert not sandbox.socket.exists()
    with pytest.raises(OSError, match=r".*"):
        sandbox.connect()
    assert bystander.driver("GetId")


def test_stop_listening_leaves_connections(shared: Warden) -> None:
    sandbox = shared.add_server(rules=[f"send:{ECHO}"])
    client = shared.connect(sandbox)
    shared.stop_listening(sandbox)
    shared.stop_listening(sandbox)  # once more does no harm
    assert not sandbox.socket.exists()
    assert not shared.show(sandbox)["listening"]
    with pytest.raises(OSError, match=r".*"):
        sandbox.connect()
    with running_service(shared.bus.address):
        assert echo(client) is None
    assert shared.who(client.unique_name) == sandbox.path


def test_instance_removed_is_a_broadcast_from_the_service(shared: Warden) -> None:
    listener = shared.connect_host()
    # A bus may have instances of its own, and tell of them in the same words.
    listener.add_match(f"sender='{NAME}',interface='{CONTAINERS}',member='InstanceRemoved'")
    sandbox = shared.add_server()
    shared.stop_instance(sandbox)
    signal = listener.wait_signal("InstanceRemoved")
    assert signal.header.path == CONTAINERS_PATH
    assert signal.header.interface == CONTAINERS
    assert signal.header.destination is None
    assert signal.header.sender == listener.name_owner(NAME)
    assert signal.values == (sandbox.path,)


def test_socket_is_taken_from_the_caller(shared: Warden, folder: Path) -> None:
    path = folder / "mine"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        sandbox = shared.add_server(fds={"Socket": listening.fileno()})
    assert sandbox.socket == path
    assert shared.who(shared.connect(sandbox).unique_name) == sandbox.path
    shared.stop_instance(sandbox)
    assert path.exists()  # not ours to unlink
    with pytest.raises(ConnectionRefusedError):
        sandbox.connect()


def test_socket_may_be_bound_and_not_listen_yet(shared: Warden) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"\0buswarden-test-{os.getpid()}-{shared.bus.kind}")
        sandbox = shared.add_server(fds={"Socket": listening.fileno()})
    assert shared.who(shared.connect(sandbox).unique_name) == sandbox.path


def test_receive_from_host_false_needs_a_rule(shared: Warden) -> None:
    # A call from the host comes in by default, and only by rule where that is switched off.
    opened = shared.connect(shared.add_server())
    closed_box = shared.add_server(ReceiveFromHost=Variant("b", False))
    closed = shared.connect(closed_box)
    serial = shared.host.start_call(opened.unique_name, "/x", "org.example.X", "Come")
    opened.reply(opened.wait_call("Come"))
    assert shared.host.wait_reply(serial).error is None
    refused = shared.host.call(closed.unique_name, "/x", "org.example.X", "Come")
    assert refused.error is not None
    assert not shared.show(closed_box)["receive_from_host"]
    shared.change_access(closed_box, rules=["receive::org.example.X.Come"])
    serial = shared.host.start_call(closed.unique_name, "/x", "org.example.X", "Come")
    closed.reply(closed.wait_call("Come"))
    assert shared.host.wait_reply(serial).error is None


def test_buses_plugs_component_and_the_rest_are_shown(shared: Warden) -> None:
    sandbox = shared.add_server(
        Buses=Variant("as", ["session"]),
        Plugs=Variant("as", ["network", "home", "network"]),
        Component=Variant("s", "part"),
        KeepAfterCreator=Variant("b", True),
        PortalsAsHost=Variant("b", True),
    )
    shown = shared.show(sandbox)
    assert shown["plugs"] == ["network", "home"]
    assert shown["component"] == "part"
    assert shown["keep_after_creator"]
    assert shown["portals_as_host"]
    assert shown["built_in"] == [(rule.deny, format_rule(rule)) for rule in WALL]
    assert shown["sockets"] == {"session": str(sandbox.socket)}
    assert shown["addresses"] == {"session": sandbox.address}


def test_denied_is_told_as_it_happens_and_kept(shared: Warden) -> None:
    listener = shared.connect_host()
    listener.ask(NAME, "/org/buswarden/Broker1", NAME, "Subscribe")
    sandbox = shared.add_server()
    client = shared.connect(sandbox)
    client.call("org.example.Nobody", "/a", "org.example.I", "Do")
    path, what = listener.wait_signal("Denied").values
    assert path == sandbox.path
    expected = {"direction": "send", "peer": "org.example.Nobody", "path": "/a", "member": "Do"}
    assert expected.items() <= what.items()
    shown = shared.show(sandbox)
    assert shown["denied"] == 1
    assert shown["denials"] == [what]


@pytest.mark.parametrize("library", ["gdbus", "busctl"])
def test_other_libraries_add_and_stop(shared: Warden, library: str) -> None:
    target = (shared.bus.address, NAME, CONTAINERS_PATH, f"{CONTAINERS}.AddServer")
    if library == "gdbus":
        keep = "{'KeepAfterCreator': <true>}"
        outcome = gdbus_call(*target, "org.example.T", "App", "{'k': <'v'>}", keep)
    else:
        values = ("org.example.T", "App", "0", "1", "KeepAfterCreator", "b", "true")
        outcome = busctl_call(*target, "ssa{sv}a{sv}", *values)
    assert outcome.ok, outcome.err
    (added,) = shared.list_sandboxes()
    assert added["path"] in outcome.out
    assert added["addresses"]["session"] in outcome.out
    assert (added["type"], added["app"], added["listening"]) == ("org.example.T", "App", True)
    # dbus-send cannot write a dict of variants, so it ends what the others began.
    stop = (*target[:3], f"{CONTAINERS}.StopInstance", f"objpath:{added['path']}")
    assert dbus_send(*stop).ok
    assert shared.list_sandboxes() == []
    assert NOT_CONTAINER in dbus_send(*stop).err


def test_two_callers_at_once_do_not_mix(shared: Warden) -> None:
    creators = [shared.connect_host() for _ in range(4)]
    values: tuple[Any, ...] = (TYPE, "app", {}, {})
    serials = [
        [
            creator.start_call(
                NAME, CONTAINERS_PATH, CONTAINERS, "AddServer", "ssa{sv}a{sv}", values
            )
            for _ in range(4)
        ]
        for creator in creators
    ]
    paths = set()
    for creator, mine in zip(creators, serials, strict=True):
        for serial in mine:
            path = creator.wait_reply(serial).values[0]
            assert shared.manage("Show", "s", path)[0]["creator"] == creator.unique_name
            paths.add(path)
    assert len(paths) == 16


def test_the_bus_driver_itself_is_untouched(shared: Warden) -> None:
    assert NAME in shared.host.list_names()
    assert shared.host.ask(BUS, "/", "org.freedesktop.DBus.Peer", "Ping") == ()
