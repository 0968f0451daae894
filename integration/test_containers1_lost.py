"""The gate before a dbus-daemon that has Containers1: what becomes of its labels when a process dies or is another."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from integration.harness.buses import (
    CONTAINERS1_DAEMON,
    Bus,
    open_bus,
    open_containers1_daemon,
    why_no_containers1,
)
from integration.harness.containers1_stage import Service, instance_of, labelled, labelling, service
from integration.harness.rawclient import RawClient
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    NAME,
    TYPE,
    Warden,
    open_warden,
    wait_for,
)
from integration.harness.values import Variant

__all__ = ["labelled", "labelling", "service"]

if not CONTAINERS1_DAEMON.exists():
    pytest.skip(why_no_containers1(), allow_module_level=True)


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
