"""Who is behind a connection: many connections of several sandboxes at once, asked for in every way."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from broker.cli.main import main
from integration.harness.clients import busctl_call, dbus_send, gdbus_call
from integration.harness.rawclient import BUS, BUS_PATH, CallError, RawClient
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    NAME,
    TYPE,
    Sandbox,
    Warden,
    wait_for,
)
from integration.harness.values import Variant

SANDBOXES = 5
CONNECTIONS = 4  # of each sandbox: 20 in all
NOT_CONTAINER = "org.freedesktop.DBus.Error.NotContainer"
NO_OWNER = "org.freedesktop.DBus.Error.NameHasNoOwner"


@dataclass(frozen=True, slots=True)
class Group:
    """A sandbox and its connections."""

    sandbox: Sandbox
    app: str
    component: str
    clients: list[RawClient]

    @property
    def names(self) -> list[str]:
        return [client.unique_name for client in self.clients]


@pytest.fixture
def crowd(shared: Warden) -> list[Group]:
    """Five sandboxes of four apps, whose connections come all at once."""
    groups = []
    for index in range(SANDBOXES):
        app, component = f"org.example.App{index % (SANDBOXES - 1)}", f"part{index}"
        metadata = {"index": Variant("u", index)}
        sandbox = shared.add_server(app, metadata=metadata, Component=Variant("s", component))
        groups.append(Group(sandbox, app, component, []))
    with ThreadPoolExecutor(SANDBOXES * CONNECTIONS) as pool:
        coming = [(group, pool.submit(shared.connect, group.sandbox)) for group in groups * 4]
        for group, future in coming:
            group.clients.append(future.result())
    return groups


def test_twenty_connections_are_who_they_are(shared: Warden, crowd: list[Group]) -> None:
    names = [name for group in crowd for name in group.names]
    assert len(set(names)) == SANDBOXES * CONNECTIONS
    for index, group in enumerate(crowd):
        info = shared.containers("GetInstanceInfo", "o", group.sandbox.path)
        assert info[1:] == (TYPE, group.app, {"index": index})
        for name in group.names:
            answer = shared.containers("GetConnectionInstance", "s", name)
            assert answer == (group.sandbox.path, *info)


def test_command_line_knows_all_twenty(
    shared: Warden, crowd: list[Group], capsys: pytest.CaptureFixture[str]
) -> None:
    for group in crowd:
        for name in group.names:
            # In this process: twenty interpreters take longer than all the rest.
            assert main(["--address", shared.bus.address, "who", name, "--json"]) == 0
            facts = json.loads(capsys.readouterr().out)
            found = [facts[key] for key in ("id", "path", "type", "app", "component")]
            sandbox = group.sandbox
            assert found == [sandbox.id, sandbox.path, TYPE, group.app, group.component]


def test_list_and_show_have_the_same_connections(shared: Warden, crowd: list[Group]) -> None:
    listed = {one["id"]: one for one in shared.list_sandboxes()}
    assert len(listed) == SANDBOXES
    for group in crowd:
        connections = {("session", name) for name in group.names}
        assert set(listed[group.sandbox.id]["connections"]) == connections
        assert set(shared.show(group.sandbox)["connections"]) == connections


@pytest.mark.parametrize("asker", ["gdbus", "busctl", "dbus-send"])
def test_every_library_can_ask(shared: Warden, asker: str) -> None:
    sandbox = shared.add_server("org.example.Asked")
    name = shared.connect(sandbox).unique_name
    method = f"{CONTAINERS}.GetConnectionInstance"
    target = (shared.bus.address, NAME, CONTAINERS_PATH, method)
    match asker:
        case "gdbus":
            outcome = gdbus_call(*target, f"'{name}'")
        case "busctl":
            outcome = busctl_call(*target, "s", name)
        case _:
            outcome = dbus_send(*target, f"string:{name}")
    assert outcome.ok, outcome.err
    assert sandbox.path in outcome.out
    assert "org.example.Asked" in outcome.out


def test_a_well_known_name_says_who_owns_it(shared: Warden) -> None:
    sandbox = shared.add_server(rules=["own:org.example.Mine"])
    client = shared.connect(sandbox)
    client.request_name("org.example.Mine")
    assert shared.who("org.example.Mine") == sandbox.path
    client.release_name("org.example.Mine")
    with pytest.raises(CallError) as caught:
        shared.who("org.example.Mine")
    assert caught.value.name == NO_OWNER


def test_who_is_known_before_hello_is_answered(shared: Warden) -> None:
    # The gate tells before the app can send anything: asking at once must never say "host".
    sandbox = shared.add_server()
    for _ in range(10):
        with sandbox.connect() as client:
            assert shared.who(client.unique_name) == sandbox.path


def test_the_host_is_in_no_container(shared: Warden) -> None:
    host = shared.connect_host()
    shared.connect(shared.add_server())
    for name in (host.unique_name, shared.host.unique_name, NAME, BUS):
        with pytest.raises(CallError) as caught:
            shared.who(name)
        assert caught.value.name == NOT_CONTAINER, name


@pytest.mark.parametrize("name", [":1.99999", "org.example.Nobody"])
def test_a_name_without_owner_is_told_apart_from_the_host(shared: Warden, name: str) -> None:
    with pytest.raises(CallError) as caught:
        shared.who(name)
    assert caught.value.name == NO_OWNER


@pytest.mark.parametrize("name", ["", "nodots", ":", "a..b", "org.example.x" * 30])
def test_what_is_no_bus_name_is_refused(shared: Warden, name: str) -> None:
    with pytest.raises(CallError) as caught:
        shared.who(name)
    assert caught.value.name == "org.freedesktop.DBus.Error.InvalidArgs"


def test_a_connection_that_left_is_nobody(shared: Warden) -> None:
    sandbox = shared.add_server()
    client = shared.connect(sandbox)
    client.close()
    wait_for(lambda: not shared.show(sandbox)["connections"])
    with pytest.raises(CallError) as caught:
        shared.who(client.unique_name)
    assert caught.value.name == NO_OWNER


def test_a_sandbox_may_not_ask_who_is_who(shared: Warden) -> None:
    # With the right to call us it may ask (as any service that wants to know its callers); without, not.
    sandbox, other = shared.add_server(), shared.add_server(rules=[f"send:{NAME}"])
    client, allowed = shared.connect(sandbox), shared.connect(other)
    call = (NAME, CONTAINERS_PATH, CONTAINERS, "GetConnectionInstance", "s")
    assert client.call(*call, (client.unique_name,)).error is not None
    assert allowed.ask(*call, (client.unique_name,))[0] == sandbox.path


def test_the_bus_itself_does_not_tell_a_sandbox_who_others_are(shared: Warden) -> None:
    sandbox = shared.add_server()
    client, host = shared.connect(sandbox), shared.connect_host()
    with pytest.raises(CallError) as caught:
        client.ask(BUS, BUS_PATH, BUS, "GetConnectionUnixProcessID", "s", (host.unique_name,))
    assert caught.value.name == NO_OWNER


def test_creator_is_told_with_its_credentials(shared: Warden) -> None:
    creator = shared.connect_host()
    sandbox = shared.add_server(creator=creator)
    credentials = shared.containers("GetInstanceInfo", "o", sandbox.path)[0]
    (asked,) = shared.host.driver("GetConnectionCredentials", "s", creator.unique_name)
    assert credentials["UnixUserID"] == asked["UnixUserID"]
    assert credentials["ProcessID"] == asked["ProcessID"]
    assert shared.show(sandbox)["creator"] == creator.unique_name
