"""The Containers1 service, asked wrongly: each a clear error, and nothing that runs is disturbed."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.harness.rawclient import CallError
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    DENY,
    INTERFACE_IS_MEMBER,
    MANAGE,
    MANAGE_PATH,
    NAME,
    NAME_SUBTREE,
    OWN,
    PATH_SUBTREE,
    PEER_APP,
    PEER_HOST,
    PEER_SAME_APP,
    SEE,
    SEND,
    TYPE,
    Sandbox,
    Usos,
    Warden,
)
from integration.harness.values import Variant

ERROR = "org.freedesktop.DBus.Error."
ANY = SEND | PATH_SUBTREE
ECHO = "org.example.Echo"


@pytest.fixture(autouse=True)
def bystander(shared: Warden) -> Iterator[None]:
    """What runs already: a sandbox with a connection, which whatever the test does must not disturb."""
    sandbox = shared.add_server("org.example.Bystander")
    client = shared.connect(sandbox)
    yield
    assert client.driver("GetId")
    assert [one["id"] for one in shared.list_sandboxes()] == [sandbox.id]


def refused(shared: Warden, **arguments: Any) -> CallError:
    """Return the error of an AddServer that must not come about."""
    with pytest.raises(CallError) as caught:
        shared.add_server(**arguments)
    assert "\n" not in caught.value.text
    return caught.value


@pytest.mark.parametrize("type_", ["", "nodots", "a..b", "1.2", ".a.b", "a.b-c", "x." * 200 + "y"])
def test_type_must_be_an_interface_name(shared: Warden, type_: str) -> None:
    error = refused(shared, type=type_)
    assert error.name == f"{ERROR}InvalidArgs"
    assert "type" in error.text


def test_app_name_has_a_limit(shared: Warden) -> None:
    error = refused(shared, app="x" * 4097)
    assert error.name == f"{ERROR}LimitsExceeded"


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"Nonsense": Variant("s", "x")}, "Nonsense"),
        ({"allow": Variant("a(usos)", [])}, "allow"),
        ({"": Variant("s", "")}, "named argument"),
        ({"Allow": Variant("as", ["x"])}, "Allow"),
        ({"Allow": Variant("a(usos)", [(1 << 11, "", "/", "")])}, "rule 0"),
        ({"Rules": Variant("as", [])}, "Rules"),
        ({"Rules": Variant("a(bs)", [(False, "send:org..x")])}, "send:org..x"),
        ({"Component": Variant("u", 1)}, "Component"),
        ({"KeepAfterCreator": Variant("s", "yes")}, "KeepAfterCreator"),
        ({"ReceiveFromHost": Variant("u", 1)}, "ReceiveFromHost"),
        ({"PortalsAsHost": Variant("i", 1)}, "PortalsAsHost"),
        ({"Buses": Variant("as", [])}, "Buses"),
        ({"Buses": Variant("as", ["nowhere"])}, "nowhere"),
        ({"Buses": Variant("as", ["session", "session"])}, "twice"),
        ({"Plugs": Variant("as", [""])}, "Plugs"),
        ({"Plugs": Variant("s", "network")}, "Plugs"),
        ({"CloseNotify": Variant("u", 0)}, "CloseNotify"),
        ({"CloseNotify": Variant("h", 0)}, "CloseNotify"),
        ({"ReadyNotify": Variant("h", 4_000_000_000)}, "ReadyNotify"),
        ({"Socket": Variant("h", 7)}, "Socket"),
    ],
)
def test_named_argument_that_is_wrong_is_named(
    shared: Warden, named: dict[str, Variant], words: str
) -> None:
    with pytest.raises(CallError) as caught:
        shared.containers("AddServer", "ssa{sv}a{sv}", TYPE, "app", {}, named)
    assert caught.value.name == f"{ERROR}InvalidArgs"
    assert words in caught.value.text


def test_too_many_plugs_are_refused(shared: Warden) -> None:
    error = refused(shared, Plugs=Variant("as", [f"p{n}" for n in range(1025)]))
    assert error.name == f"{ERROR}LimitsExceeded"
    assert "max_plugs=1024" in error.text


def test_too_many_rules_are_refused(shared: Warden) -> None:
    rules = [(ANY, f"org.example.N{n}", "/", "") for n in range(10_001)]
    error = refused(shared, allow=rules)
    assert error.name == f"{ERROR}LimitsExceeded"
    assert "max_rules=10000" in error.text


def test_metadata_over_the_limit_is_refused(shared: Warden) -> None:
    error = refused(shared, metadata={"k": Variant("s", "x" * 65_536)})
    assert error.name == f"{ERROR}LimitsExceeded"
    assert "max_container_metadata_bytes=65536" in error.text
    shared.stop_instance(shared.add_server(metadata={"k": Variant("s", "x" * 65_000)}))


def nested(depth: int, value: Variant) -> dict[str, Variant]:
    """Return metadata, a dict and so two deep itself, with that many variants around the value."""
    for _ in range(depth - 3):
        value = Variant("v", value)
    return {"k": value}


def test_metadata_nested_too_deeply_is_refused(shared: Warden) -> None:
    # A bus would hang up on us if we sent it on, wrapped in the dicts of List and Show.
    for depth in (33, 50, 62):
        error = refused(shared, metadata=nested(depth, Variant("s", "x")))
        assert error.name == f"{ERROR}LimitsExceeded"
        assert "max_metadata_nesting=32" in error.text
    # An empty array is one deep, whatever the types of the items that it has not.
    structs = "(" * 31 + "s" + ")" * 31
    for value in (Variant("s", "x"), Variant("a" * 32 + "s", []), Variant("a" + structs, [])):
        sandbox = shared.add_server(metadata=nested(31, value))
        assert shared.show(sandbox)["metadata"] == {"k": value.value}
        assert len(shared.list_sandboxes()) == 2
        shared.stop_instance(sandbox)


def test_answer_that_no_bus_would_take_is_an_error(shared: Warden) -> None:
    metadata = {"k": Variant("ay", bytes(65_000))}
    sandboxes = [shared.add_server(metadata=metadata) for _ in range(130)]
    with pytest.raises(CallError) as caught:
        shared.list_sandboxes()
    assert caught.value.name == f"{ERROR}LimitsExceeded"
    assert shared.show(sandboxes[0])["metadata"] == {"k": bytes(65_000)}
    for sandbox in sandboxes:
        shared.stop_instance(sandbox)


def test_metadata_takes_no_descriptors(shared: Warden) -> None:
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(CallError) as caught:
            values: tuple[Any, ...] = (TYPE, "a", {"k": Variant("h", 0)}, {})
            call = (NAME, CONTAINERS_PATH, CONTAINERS, "AddServer", "ssa{sv}a{sv}", values)
            reply = shared.host.call(*call, fds=[read_end])
            raise CallError(reply.error or "", reply.values[0])
    finally:
        os.close(read_end)
        os.close(write_end)
    assert caught.value.name == f"{ERROR}InvalidArgs"


@pytest.mark.parametrize("name", ["CloseNotify", "ReadyNotify", "Socket"])
@pytest.mark.parametrize("what", ["file", "wrong end", "datagram", "unbound"])
def test_descriptor_of_the_wrong_kind_is_refused(
    shared: Warden, name: str, what: str, folder: Path
) -> None:
    read_end, write_end = os.pipe()
    with (folder / "file").open("w+") as file, socket.socket(type=socket.SOCK_DGRAM) as inet:
        wrong_end = write_end if name == "CloseNotify" else read_end
        with socket.socket(socket.AF_UNIX) as unbound:
            fd = {
                "file": file.fileno(),
                "wrong end": wrong_end,
                "datagram": inet.fileno() if name == "Socket" else file.fileno(),
                "unbound": unbound.fileno() if name == "Socket" else wrong_end,
            }[what]
            error = refused(shared, fds={name: fd})
    os.close(read_end)
    os.close(write_end)
    assert error.name == f"{ERROR}InvalidArgs"
    assert name in error.text


@pytest.mark.parametrize(
    "entry",
    [
        (0, ECHO, "/", ""),
        (NAME_SUBTREE | PATH_SUBTREE, ECHO, "/", ""),
        (1 << 11 | SEND, ECHO, "/", ""),
        (1 << 31 | SEND, ECHO, "/", ""),
        (ANY, "nodots", "/", ""),
        (ANY, "org.example.*", "/", ""),
        (ANY, "org.example." + "x" * 250, "/", ""),
        (ANY, ECHO, "/", "nodots"),
        (ANY, ECHO, "/", "org.example.I*"),
        (ANY | INTERFACE_IS_MEMBER, ECHO, "/", "Member"),
        (OWN, ECHO, "/", ""),
        (ANY | PEER_HOST | PEER_SAME_APP, "", "/", ""),
        (ANY | PEER_HOST | PEER_APP, "T/x", "/", ""),
        (ANY | PEER_APP, "", "/", ""),
        (ANY | PEER_APP, "notype", "/", ""),
    ],
)
def test_malformed_rule_is_refused_and_counted(shared: Warden, entry: Usos) -> None:
    good = (SEE | DENY | PATH_SUBTREE, "org.example.Good", "/", "")
    error = refused(shared, allow=[good, entry])
    assert error.name == f"{ERROR}InvalidArgs", error
    assert "rule 1" in error.text


@pytest.mark.parametrize("member", ["StopInstance", "StopListening", "RemoveContainerServer"])
@pytest.mark.parametrize(
    "path",
    [
        "/org/freedesktop/DBus/Containers1/c99999",
        "/org/freedesktop/DBus/Containers1",
        "/org/freedesktop/DBus/Containers1/c1/x",
        "/",
        "/c0",
    ],
)
def test_unknown_instance_is_no_container(shared: Warden, member: str, path: str) -> None:
    for method in (member, "GetInstanceInfo"):
        with pytest.raises(CallError) as caught:
            shared.containers(method, "o", path)
        assert caught.value.name == f"{ERROR}NotContainer"
        assert path in caught.value.text


def test_unknown_id_has_no_access_to_set(shared: Warden) -> None:
    for target in ("c99999", "", "nonsense", "/org/freedesktop/DBus/Containers1/c99999"):
        with pytest.raises(CallError, match="NotContainer"):
            shared.containers("SetContainerAccess", "sa(usos)", target, [])
        with pytest.raises(CallError, match="NotContainer"):
            shared.manage("ChangeAccess", "sa(bs)b", target, [], False)
        with pytest.raises(CallError, match="NotContainer"):
            shared.manage("Show", "s", target)


def test_stopped_instance_is_unknown_from_then_on(shared: Warden) -> None:
    sandbox = shared.add_server()
    shared.stop_instance(sandbox)
    with pytest.raises(CallError, match="NotContainer"):
        shared.stop_instance(sandbox)


CHANGES: list[tuple[str, str, str, str, tuple[Any, ...]]] = [
    (CONTAINERS_PATH, CONTAINERS, "AddServer", "ssa{sv}a{sv}", (TYPE, "x", {}, {})),
    (CONTAINERS_PATH, CONTAINERS, "AddContainerServer", "ssa{sv}a{sv}", (TYPE, "x", {}, {})),
    (CONTAINERS_PATH, CONTAINERS, "StopInstance", "o", ("PATH",)),
    (CONTAINERS_PATH, CONTAINERS, "StopListening", "o", ("PATH",)),
    (CONTAINERS_PATH, CONTAINERS, "RemoveContainerServer", "o", ("PATH",)),
    (CONTAINERS_PATH, CONTAINERS, "SetContainerAccess", "sa(usos)", ("ID", [])),
    (CONTAINERS_PATH, CONTAINERS, "RequestHeader", "", ()),
    (MANAGE_PATH, MANAGE, "ChangeAccess", "sa(bs)b", ("ID", [(False, "send:")], False)),
    (MANAGE_PATH, MANAGE, "List", "", ()),
    (MANAGE_PATH, MANAGE, "Show", "s", ("ID",)),
    (MANAGE_PATH, MANAGE, "Status", "", ()),
]


def test_caller_in_a_sandbox_changes_nothing(shared: Warden) -> None:
    # Though its rules let it call us: not its own sandbox, and not others.
    mine = shared.add_server(rules=["send:", f"see:{NAME}"])
    client = shared.connect(mine)
    other = shared.add_server()
    for target in (mine, other):
        before = shared.show(target)["access"]
        for path, interface, member, signature, values in CHANGES:
            filled = [_fill(value, target) for value in values]
            reply = client.call(NAME, path, interface, member, signature, filled)
            assert reply.error == f"{ERROR}AccessDenied", member
            assert "built in" in reply.values[0]
        assert shared.show(target)["access"] == before
        assert shared.show(target)["listening"]
    shared.stop_instance(mine)
    shared.stop_instance(other)


def test_caller_in_a_sandbox_without_rules_does_not_even_see_us(shared: Warden) -> None:
    sandbox = shared.add_server()
    client = shared.connect(sandbox)
    values: tuple[Any, ...] = (TYPE, "x", {}, {})
    call = (NAME, CONTAINERS_PATH, CONTAINERS, "AddServer", "ssa{sv}a{sv}", values)
    assert client.call(*call).error == f"{ERROR}ServiceUnknown"
    shared.stop_instance(sandbox)


def _fill(value: Any, target: Sandbox) -> Any:
    return (
        {"PATH": target.path, "ID": target.id}.get(value, value)
        if value in ("PATH", "ID")
        else value
    )
