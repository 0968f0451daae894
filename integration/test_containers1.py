"""The gate before a dbus-daemon that has Containers1: the bus itself says who is behind a connection."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

from broker.wire.marshal import make_call
from integration.harness.apps import ANSWER_TIMEOUT
from integration.harness.buses import (
    CONTAINERS1_DAEMON,
    Bus,
    open_bus,
    open_containers1_daemon,
    why_no_containers1,
)
from integration.harness.containers1_stage import (
    COMPONENT,
    ERROR,
    INSTANCES,
    Service,
    instance_of,
    labelled,
    labelling,
    service,
)
from integration.harness.rawclient import BUS, BUS_PATH, CallError, RawClient, connect_socket
from integration.harness.supervised import CONTAINERS, TYPE, Warden, open_warden, wait_for
from integration.harness.values import Variant

__all__ = ["labelled", "labelling", "service"]

if not CONTAINERS1_DAEMON.exists():
    pytest.skip(why_no_containers1(), allow_module_level=True)


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
    assert f"engine (session): containers1, instance {instance}" in " ".join(done.out.split())
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


def test_the_gate_engine_can_be_asked_for(labelling: Bus, service: Service, folder: Path) -> None:
    with open_warden(labelling, folder / "run", "--engine", "gate") as warden:
        sandbox = warden.add_server()
        assert service.credentials_of(warden.connect(sandbox).unique_name) is None
        assert service.count() == 0
        assert warden.show(sandbox)["engines"] == {"session": "gate"}


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
