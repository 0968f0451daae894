"""The gate before a dbus-daemon that has Containers1: the bus itself says who is behind a connection."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from broker.wire.marshal import make_call
from integration.apps import ANSWER_TIMEOUT
from integration.buses import (
    CONTAINERS1_DAEMON,
    Bus,
    open_bus,
    open_containers1_daemon,
    why_no_containers1,
)
from integration.rawclient import BUS, BUS_PATH, CallError, RawClient, connect_socket
from integration.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    NAME,
    TYPE,
    Sandbox,
    Warden,
    open_warden,
    wait_for,
)
from integration.values import Variant

COMPONENT = "org.buswarden.Component"
ERROR = "org.freedesktop.DBus.Error."
INSTANCES = "/org/freedesktop/DBus/Containers1/c"

if not CONTAINERS1_DAEMON.exists():
    pytest.skip(why_no_containers1(), allow_module_level=True)


class Service:
    """A service that knows nothing of us: it asks its bus who calls."""

    def __init__(self, bus: Bus) -> None:
        self.client = RawClient.connect(bus.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def ask(self, member: str, signature: str, value: str) -> tuple[object, ...]:
        return self.client.ask(BUS, BUS_PATH, CONTAINERS, member, signature, (value,))

    def app_of(self, name: str) -> tuple[str, str, object]:
        """Return type, app and component of a connection. Raises CallError."""
        _path, _creator, kind, app, metadata = self.ask("GetConnectionInstance", "s", name)
        assert isinstance(metadata, dict)
        return str(kind), str(app), metadata.get(COMPONENT)

    def credentials_of(self, name: str) -> str | None:
        """Return the instance path that the credentials have."""
        (credentials,) = self.client.driver("GetConnectionCredentials", "s", name)
        path = credentials.get(f"{CONTAINERS}.Instance")
        return None if path is None else str(path)

    def count(self, most: int = 60) -> int:
        """Count the instances of the bus: it has no list, but its numbers are in a row."""
        found = 0
        for number in range(most):
            with contextlib.suppress(CallError):
                self.ask("GetInstanceInfo", "o", f"{INSTANCES}{number}")
                found += 1
        return found


@pytest.fixture
def labelling(folder: Path) -> Iterator[Bus]:
    with open_containers1_daemon(folder) as bus:
        yield bus


@pytest.fixture
def labelled(labelling: Bus, folder: Path) -> Iterator[Warden]:
    with open_warden(labelling, folder / "run", "--engine", "containers1") as warden:
        yield warden


@pytest.fixture
def service(labelling: Bus) -> Iterator[Service]:
    with Service(labelling) as service:
        yield service


def instance_of(warden: Warden, sandbox: Sandbox) -> str:
    """Return the bus's own path of a sandbox."""
    return str(warden.show(sandbox)["instances"]["session"])


def test_a_service_reads_the_app_from_the_bus_alone(labelled: Warden, service: Service) -> None:
    parts = [None, "one", "two", None, "three"]
    for number, part in enumerate(parts):
        named: dict[str, Any] = {} if part is None else {"Component": Variant("s", part)}
        app = f"org.example.App{number}"
        sandbox = labelled.add_server(app=app, metadata={"k": Variant("u", number)}, **named)
        instance = instance_of(labelled, sandbox)
        for _ in range(4):
            name = labelled.connect(sandbox).unique_name
            assert service.app_of(name) == (TYPE, app, part)
            assert service.credentials_of(name) == instance
            _, kind, app_there, metadata = service.ask("GetInstanceInfo", "o", instance)
            assert (kind, app_there) == (TYPE, app)
            # Ours says the same, but for whose connection made it, and what has no place there.
            path, _, kind, app_here, ours = labelled.containers("GetConnectionInstance", "s", name)
            assert (path, kind, app_here) == (sandbox.path, TYPE, app)
            more = {} if part is None else {COMPONENT: part}
            assert metadata == ours | more
    assert service.count() == len(parts)
    for client in (service.client, labelled.host, labelled.connect_host()):
        with pytest.raises(CallError, match="NotContainer"):
            service.app_of(client.unique_name)
        assert service.credentials_of(client.unique_name) is None


def test_both_paths_are_shown(labelled: Warden, service: Service) -> None:
    labelled.stop_instance(labelled.add_server())
    for _ in range(2):
        service.client.ask(
            BUS, BUS_PATH, CONTAINERS, "AddServer", "ssa{sv}a{sv}", (TYPE, "mine", {}, {})
        )
    sandbox = labelled.add_server()
    instance = instance_of(labelled, sandbox)
    assert instance == f"{INSTANCES}3"
    assert sandbox.path == f"{INSTANCES}1"
    done = labelled.cli("show", sandbox.id)
    assert f"engine (session): containers1, instance {instance} there" in " ".join(done.out.split())
    assert "containers1" in labelled.cli("status").out


def test_stopping_reaches_the_bus(labelled: Warden, service: Service) -> None:
    one, other = labelled.add_server(), labelled.add_server()
    client = labelled.connect(one)
    labelled.stop_instance(one)
    assert service.count() == 1
    assert client.is_closed()
    client = labelled.connect(other)
    labelled.stop_listening(other)
    assert service.app_of(client.unique_name)[0] == TYPE
    client.close()
    wait_for(lambda: service.count() == 0)


def test_who_is_on_the_way_when_it_stops_listening_gets_there(
    labelled: Warden, service: Service
) -> None:
    sandbox = labelled.add_server()
    with connect_socket(sandbox.address) as sock:
        sock.settimeout(ANSWER_TIMEOUT)
        sock.sendall(b"\0AUTH EXTERNAL\r\n")
        assert sock.recv(100).startswith(b"DATA")
        labelled.stop_listening(sandbox)
        hello = make_call(1, destination=BUS, path=BUS_PATH, interface=BUS, member="Hello")
        sock.sendall(b"DATA\r\nBEGIN\r\n" + hello)
        said = b""
        while b":1." not in said:
            said += (part := sock.recv(1000))
            assert part, said
        assert service.count() == 1
    wait_for(lambda: service.count() == 0)


def test_connections_on_another_bus_outlive_a_server_that_nobody_uses(
    labelling: Bus, service: Service, folder: Path
) -> None:
    (folder / "other").mkdir()
    with open_bus("dbus-daemon", folder / "other") as other:
        more = ["--bus", f"other={other.address}"]
        with open_warden(labelling, folder / "run", *more) as warden:
            warden.host.add_match("interface='org.buswarden.Broker1',member='SandboxEnded'")
            sandbox = warden.add_server(Buses=Variant("as", ["session", "other"]))
            with contextlib.closing(
                RawClient.connect(warden.show(sandbox)["addresses"]["other"])
            ) as client:
                warden.stop_listening(sandbox)
                wait_for(lambda: service.count() == 0)
                assert client.driver("GetId")
                assert [one["id"] for one in warden.list_sandboxes()] == [sandbox.id]
            ended = warden.host.wait_signal("SandboxEnded").values
            assert ended == (sandbox.path, "last-connection")


def test_pipes_end_it_on_the_bus_while_no_supervisor_is_there(
    labelling: Bus, service: Service, folder: Path
) -> None:
    read_end, write_end = os.pipe()
    with open_warden(labelling, folder / "run", orderly=False) as warden:
        warden.add_server(fds={"CloseNotify": read_end})
        os.close(read_end)
        warden.kill()
        assert service.count() == 1
        os.close(write_end)
        wait_for(lambda: service.count() == 0)
        with open_warden(labelling, folder / "run") as second:
            assert second.list_sandboxes() == []


def test_an_instance_that_somebody_stops_ends_its_sandbox(
    labelled: Warden, service: Service
) -> None:
    labelled.host.add_match("interface='org.buswarden.Broker1',member='SandboxEnded'")
    sandbox = labelled.add_server()
    client = labelled.connect(sandbox)
    service.ask("StopInstance", "o", instance_of(labelled, sandbox))
    assert labelled.host.wait_signal("SandboxEnded").values == (sandbox.path, "instance-removed")
    assert labelled.list_sandboxes() == []
    assert client.is_closed()
    assert not sandbox.socket.exists()


def test_limits_of_the_bus_are_told_and_nothing_is_left(folder: Path) -> None:
    with open_containers1_daemon(folder, max_containers=2, max_container_metadata_bytes=100) as bus:
        with open_warden(bus, folder / "run") as warden, Service(bus) as service:
            kept = warden.add_server()
            with pytest.raises(CallError, match="max_container_metadata_bytes=100") as caught:
                warden.add_server(metadata={"k": Variant("s", "x" * 100)})
            assert caught.value.name == f"{ERROR}LimitsExceeded"
            warden.add_server()
            with pytest.raises(CallError, match="max_containers=2") as caught:
                warden.add_server()
            assert caught.value.name == f"{ERROR}LimitsExceeded"
            assert service.count() == len(warden.list_sandboxes()) == 2
            assert len(list((warden.folder / "containers").iterdir())) == 2
            warden.stop_instance(kept)
            warden.add_server()


def test_a_supervisor_that_is_killed_leaves_the_instances(
    labelling: Bus, service: Service, folder: Path
) -> None:
    with open_warden(labelling, folder / "run", orderly=False) as first:
        keep: dict[str, Any] = {"KeepAfterCreator": Variant("b", True)}
        sandboxes = [first.add_server(app=f"org.example.A{n}", **keep) for n in range(5)]
        clients = [first.connect(sandbox) for sandbox in sandboxes]
        before = [instance_of(first, sandbox) for sandbox in sandboxes]
        first.kill()
        assert service.count() == 5
        with open_warden(labelling, folder / "run") as second:
            assert [instance_of(second, sandbox) for sandbox in sandboxes] == before
            assert service.count() == 5
            for number, client in enumerate(clients):
                assert service.app_of(client.unique_name)[1] == f"org.example.A{number}"
            clients.append(second.connect(sandboxes[0]))
            assert service.credentials_of(clients[-1].unique_name) == before[0]
            second.stop_instance(sandboxes[0])
            assert service.count() == 4
        wait_for(lambda: service.count() == 0)


def test_an_upgrade_of_the_gate_keeps_the_instances(labelled: Warden, service: Service) -> None:
    sandbox = labelled.add_server()
    client = labelled.connect(sandbox)
    before = instance_of(labelled, sandbox)
    _, labelled.gate_pid = labelled.manage("Upgrade")
    assert client.driver("GetId")
    assert service.credentials_of(client.unique_name) == before
    assert service.credentials_of(labelled.connect(sandbox).unique_name) == before
    labelled.stop_instance(labelled.add_server())
    service.ask("StopInstance", "o", before)
    wait_for(lambda: not labelled.list_sandboxes())


def test_a_gate_that_dies_has_its_instances_made_again(labelled: Warden, service: Service) -> None:
    keep = Variant("b", True)
    sandbox = labelled.add_server(KeepAfterCreator=keep, Component=Variant("s", "part"))
    assert labelled.connect(sandbox).unique_name
    os.kill(labelled.gate_pid, signal.SIGKILL)
    # It may connect at once: it waits for the new gate, and that one for the bus.
    name = labelled.connect(sandbox).unique_name
    assert service.app_of(name) == (TYPE, "org.example.App", "part")
    assert service.credentials_of(name) == instance_of(labelled, sandbox)
    (status,) = labelled.manage("Status")
    labelled.gate_pid = status["gate_pid"]
    assert service.count() == 1


def test_a_bus_that_starts_anew_labels_again(folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        bus = first.enter_context(open_containers1_daemon(folder))
        warden = stack.enter_context(open_warden(bus, folder / "run", orderly=False))
        sandbox = warden.add_server(KeepAfterCreator=Variant("b", True))
        first.close()
        (folder / "services").rmdir()
        stack.enter_context(open_containers1_daemon(folder))
        client = stack.enter_context(sandbox.connect())
        service = stack.enter_context(Service(bus))
        assert service.app_of(client.unique_name)[0] == TYPE


def test_two_buses_that_start_anew_make_one_server_each(folder: Path) -> None:
    folders = [folder / name for name in ("one", "two")]
    for one in folders:
        one.mkdir()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        host = stack.enter_context(open_bus("dbus-daemon", folder))
        buses = [first.enter_context(open_containers1_daemon(one)) for one in folders]
        more = [arg for n, bus in enumerate(buses) for arg in ("--bus", f"b{n}={bus.address}")]
        warden = stack.enter_context(open_warden(host, folder / "run", *more, orderly=False))
        keep, both = Variant("b", True), Variant("as", ["b0", "b1"])
        sandboxes = [warden.add_server(KeepAfterCreator=keep, Buses=both) for _ in range(3)]
        first.close()
        for one in folders:
            (one / "services").rmdir()
            stack.enter_context(open_containers1_daemon(one))
        wait_for(lambda: all(len(warden.show(one)["instances"]) == 2 for one in sandboxes))
        services = [stack.enter_context(Service(bus)) for bus in buses]
        time.sleep(1)  # one too many would be made now
        assert [service.count() for service in services] == [3, 3]
        for sandbox in sandboxes:
            warden.stop_instance(sandbox)
        assert [service.count() for service in services] == [0, 0]


def test_the_gate_engine_can_be_asked_for(labelling: Bus, service: Service, folder: Path) -> None:
    with open_warden(labelling, folder / "run", "--engine", "gate") as warden:
        sandbox = warden.add_server()
        assert service.credentials_of(warden.connect(sandbox).unique_name) is None
        assert service.count() == 0
        assert warden.show(sandbox)["engines"] == {"session": "gate"}


def test_labels_are_kept_by_the_gate_engine_until_the_bus_starts_anew(folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        bus = first.enter_context(open_containers1_daemon(folder))
        labelling = stack.enter_context(open_warden(bus, folder / "run", orderly=False))
        sandbox = labelling.add_server(KeepAfterCreator=Variant("b", True))
        instance = instance_of(labelling, sandbox)
        labelling.kill()
        opening = open_warden(bus, folder / "run", "--engine", "gate", orderly=False)
        plain = stack.enter_context(opening)
        assert instance_of(plain, sandbox) == instance
        assert plain.show(sandbox)["engines"] == {"session": "containers1"}
        with Service(bus) as service:
            assert service.credentials_of(plain.connect(sandbox).unique_name) == instance
        first.close()
        (folder / "services").rmdir()
        stack.enter_context(open_containers1_daemon(folder))
        client = stack.enter_context(sandbox.connect())
        assert client.unique_name.startswith(":")
        plain.host.close()
        plain.host = stack.enter_context(RawClient.connect(bus.address))
        wait_for(lambda: plain.host.driver("NameHasOwner", "s", NAME) == (True,))
        assert plain.show(sandbox)["engines"] == {"session": "gate"}


def test_by_itself_each_bus_has_the_engine_that_it_can(
    labelling: Bus, service: Service, folder: Path
) -> None:
    (folder / "other").mkdir()
    with open_bus("dbus-broker", folder / "other") as other:
        with open_warden(labelling, folder / "run", "--bus", f"other={other.address}") as warden:
            sandbox = warden.add_server(Buses=Variant("as", ["session", "other"]))
            name = warden.connect(sandbox).unique_name
            assert service.app_of(name)[0] == TYPE
            shown = warden.show(sandbox)
            assert shown["engines"] == {"session": "containers1", "other": "gate"}
            with RawClient.connect(shown["addresses"]["other"]) as client:
                assert client.driver("GetId")


def test_kills_in_the_middle_of_adding_leak_nothing(
    labelling: Bus, service: Service, folder: Path
) -> None:
    named = {"KeepAfterCreator": Variant("b", True)}
    with contextlib.ExitStack() as stack:
        for number in range(6):
            opening = open_warden(labelling, folder / "run", orderly=False)
            warden = stack.enter_context(opening)
            warden.add_server(KeepAfterCreator=named["KeepAfterCreator"])
            for _ in range(8):
                warden.host.start_call(
                    NAME,
                    CONTAINERS_PATH,
                    CONTAINERS,
                    "AddServer",
                    "ssa{sv}a{sv}",
                    (TYPE, "org.example.App", {}, named),
                )
            time.sleep(number * 0.006)  # some of them half done
            warden.kill()
        with open_warden(labelling, folder / "run") as last:
            # What was half made is undone, and what was made is known: one of ours, one of the bus's.
            wait_for(lambda: service.count() == len(last.list_sandboxes()))
            there = [one["instances"]["session"] for one in last.list_sandboxes()]
            assert len(set(there)) == len(there) == service.count() >= 6
        wait_for(lambda: service.count() == 0)
