"""What the service says of itself: introspection, properties, Peer; and RequestHeader."""

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from broker.wire.header import MessageType
from integration.harness.clients import gdbus_call, run
from integration.harness.rawclient import BUS, BUS_PATH, CallError, RawClient
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    MANAGE,
    MANAGE_PATH,
    NAME,
    Warden,
)
from integration.harness.values import Variant

ERROR = "org.freedesktop.DBus.Error."
PROPERTIES = "org.freedesktop.DBus.Properties"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
PEER = "org.freedesktop.DBus.Peer"
# dbus-daemon's, and then what we have beside them.
METHODS = {
    "AddServer": ("ssa{sv}a{sv}", "oays"),
    "StopInstance": ("o", ""),
    "StopListening": ("o", ""),
    "GetConnectionInstance": ("s", "oa{sv}ssa{sv}"),
    "GetInstanceInfo": ("o", "a{sv}ssa{sv}"),
    "RequestHeader": ("", ""),
    "AddContainerServer": ("ssa{sv}a{sv}", "oays"),
    "RemoveContainerServer": ("o", ""),
    "SetContainerAccess": ("sa(usos)", ""),
}
ARGUMENTS = {
    *("Allow", "Buses", "Cgroup", "CloseNotify", "Component", "KeepAfterCreator", "Plugs"),
    *("PortalsAsHost", "Process", "ProcessFd", "ReadyNotify", "ReceiveFromHost", "Rules"),
    *("Socket", "TimeLimit"),
}


def introspect(shared: Warden, path: str) -> ET.Element:
    (text,) = shared.host.ask(NAME, path, INTROSPECTABLE, "Introspect")
    return ET.fromstring(text)


def signatures(interface: ET.Element) -> dict[str, tuple[str, str]]:
    """Return method -> (in, out)."""
    found = {}
    for method in interface.iter("method"):
        args = [(arg.get("direction"), arg.get("type") or "") for arg in method.iter("arg")]
        into = "".join(kind for direction, kind in args if direction == "in")
        out = "".join(kind for direction, kind in args if direction == "out")
        found[method.get("name") or ""] = (into, out)
    return found


def test_introspection_has_every_member_with_its_signature(shared: Warden) -> None:
    root = introspect(shared, CONTAINERS_PATH)
    interfaces = {one.get("name"): one for one in root.iter("interface")}
    assert {CONTAINERS, PROPERTIES, INTROSPECTABLE, PEER} <= interfaces.keys()
    containers = interfaces[CONTAINERS]
    assert signatures(containers) == METHODS
    (signal,) = containers.iter("signal")
    assert signal.get("name") == "InstanceRemoved"
    assert [arg.get("type") for arg in signal.iter("arg")] == ["o"]
    (prop,) = containers.iter("property")
    expected = {"name": "SupportedArguments", "type": "as", "access": "read"}
    assert prop.attrib == expected


def test_management_is_described_too(shared: Warden) -> None:
    root = introspect(shared, MANAGE_PATH)
    (interface,) = [one for one in root.iter("interface") if one.get("name") == MANAGE]
    assert signatures(interface) == {
        "List": ("", "aa{sv}"),
        "Show": ("s", "a{sv}"),
        "ChangeAccess": ("sa(bs)b", "a(bs)"),
        "Status": ("", "a{sv}"),
        "Subscribe": ("", ""),
        "Unsubscribe": ("", ""),
        "Upgrade": ("", "uu"),
    }
    signals = {signal.get("name") for signal in interface.iter("signal")}
    assert signals == {"Denied", "SandboxEnded"}


def test_tree_leads_to_both_objects(shared: Warden) -> None:
    outcome = run("busctl", f"--address={shared.bus.address}", "tree", "--list", NAME)
    assert outcome.ok, outcome.err
    assert {CONTAINERS_PATH, MANAGE_PATH} <= set(outcome.out.split())


def test_libraries_can_introspect(shared: Warden) -> None:
    target = ("--dest", NAME, "--object-path", CONTAINERS_PATH)
    outcome = run("gdbus", "introspect", "--address", shared.bus.address, *target)
    assert "SetContainerAccess" in outcome.out
    place = (NAME, CONTAINERS_PATH, CONTAINERS)
    outcome = run("busctl", f"--address={shared.bus.address}", "introspect", *place)
    assert "SupportedArguments" in outcome.out, outcome.err


def test_supported_arguments_are_those_that_add_server_takes(shared: Warden) -> None:
    call = (NAME, CONTAINERS_PATH, PROPERTIES)
    (value,) = shared.host.ask(*call, "Get", "ss", (CONTAINERS, "SupportedArguments"))
    assert set(value) == ARGUMENTS
    (values,) = shared.host.ask(*call, "GetAll", "s", (CONTAINERS,))
    assert values == {"SupportedArguments": value}
    method = f"{PROPERTIES}.Get"
    target = (shared.bus.address, NAME, CONTAINERS_PATH, method)
    assert "KeepAfterCreator" in gdbus_call(*target, CONTAINERS, "SupportedArguments").out


ODD_CALLS: list[tuple[str, str | None, str, str, tuple[Any, ...], str | None]] = [
    (CONTAINERS_PATH, PROPERTIES, "Get", "ss", (CONTAINERS, "X"), "UnknownProperty"),
    (CONTAINERS_PATH, PROPERTIES, "Get", "ss", ("a.b", "X"), "UnknownInterface"),
    (CONTAINERS_PATH, PROPERTIES, "GetAll", "s", ("a.b",), "UnknownInterface"),
    (
        *(CONTAINERS_PATH, PROPERTIES, "Set", "ssv"),
        (CONTAINERS, "SupportedArguments", Variant("as", [])),
        "PropertyReadOnly",
    ),
    (CONTAINERS_PATH, CONTAINERS, "Nonsense", "", (), "UnknownMethod"),
    (CONTAINERS_PATH, "org.example.X", "AddServer", "", (), "UnknownInterface"),
    (CONTAINERS_PATH, CONTAINERS, "StopInstance", "s", ("/x",), "InvalidArgs"),
    (CONTAINERS_PATH, CONTAINERS, "AddServer", "", (), "InvalidArgs"),
    (CONTAINERS_PATH, CONTAINERS, "RequestHeader", "s", ("",), "InvalidArgs"),
    (CONTAINERS_PATH, None, "GetInstanceInfo", "o", ("/x",), "NotContainer"),
    ("/", CONTAINERS, "AddServer", "", (), "UnknownObject"),
    ("/nowhere", INTROSPECTABLE, "Introspect", "", (), "UnknownObject"),
    ("/nowhere", PEER, "Ping", "", (), None),
    (CONTAINERS_PATH, PEER, "Ping", "", (), None),
    ("/", INTROSPECTABLE, "Introspect", "", (), None),
    ("/org", INTROSPECTABLE, "Introspect", "", (), None),
]


@pytest.mark.parametrize("odd", ODD_CALLS)
def test_each_odd_call_has_its_error(
    shared: Warden, odd: tuple[str, str | None, str, str, tuple[Any, ...], str | None]
) -> None:
    path, interface, member, signature, values, error = odd
    reply = shared.host.call(NAME, path, interface, member, signature, values)
    assert reply.error == (ERROR + error if error else None)


def test_status_knows_its_bus_and_limits(shared: Warden) -> None:
    (status,) = shared.manage("Status")
    assert status["buses"] == {"session": shared.bus.address}
    assert (status["scope"], status["pid"]) == ("user", shared.process.pid)
    assert status["engine"] == status["engines"]["session"] in {"gate", "containers1"}
    assert status["runtime_dir"] == str(shared.folder)
    limits = status["limits"]
    assert (limits["max_containers"], limits["max_containers_per_user"]) == (10_000, 10_000)
    assert limits["max_connections_per_container"] == 16
    assert limits["max_container_metadata_bytes"] == 65_536


def test_signals_to_the_service_change_nothing(shared: Warden) -> None:
    shared.host.emit(CONTAINERS_PATH, CONTAINERS, "AddServer", destination=NAME)
    shared.host.emit(BUS_PATH, BUS, "NameOwnerChanged", "sss", (NAME, ":1.0", ""), destination=NAME)
    assert shared.list_sandboxes() == []


# -- RequestHeader: messages from sandboxes that say so themselves ----------------------------------------


def field_ten(data: bytes) -> bool:
    """Say whether a header holds field 10 of type `o`."""
    return b"\x0a\x01o\0" in data


def read_raw(client: RawClient) -> bytes:
    """Read until a call has come, and return the bytes."""
    client.sock.settimeout(10)
    return client.sock.recv(65536)


def test_requested_header_tells_the_instance(shared: Warden) -> None:
    sandbox = shared.add_server(rules=["send:"])
    client, host = shared.connect(sandbox), shared.connect_host()
    if not shared.bus.forwards_unknown_fields:
        with pytest.raises(CallError) as caught:
            host.ask(NAME, CONTAINERS_PATH, CONTAINERS, "RequestHeader")
        assert caught.value.name == f"{ERROR}NotSupported"
        assert "strips" in caught.value.text
        return
    client.start_call(host.unique_name, "/before", "org.example.I", "M")
    assert not field_ten(read_raw(host))
    host.ask(NAME, CONTAINERS_PATH, CONTAINERS, "RequestHeader")
    client.start_call(host.unique_name, "/after", "org.example.I", "M")
    data = read_raw(host)
    assert field_ten(data)
    assert sandbox.path.encode() + b"\0" in data
    # Others did not ask, and the host has no instance to tell.
    third = shared.connect_host()
    client.start_call(third.unique_name, "/other", "org.example.I", "M")
    assert not field_ten(read_raw(third))
    third.start_call(host.unique_name, "/host", "org.example.I", "M")
    assert not field_ten(read_raw(host))


def test_signal_and_reply_carry_the_header_too(shared: Warden) -> None:
    if not shared.bus.forwards_unknown_fields:
        return  # refused: see above
    sandbox = shared.add_server(rules=["send:"])
    client, host = shared.connect(sandbox), shared.connect_host()
    host.ask(NAME, CONTAINERS_PATH, CONTAINERS, "RequestHeader")
    client.emit("/signal", "org.example.I", "S", destination=host.unique_name)
    assert field_ten(read_raw(host))
    host.start_call(client.unique_name, "/call", "org.example.I", "M")
    call = client.wait_call("M")
    assert call.header.type == MessageType.METHOD_CALL
    client.reply(call)
    assert field_ten(read_raw(host))
