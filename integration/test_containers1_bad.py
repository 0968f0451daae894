"""Buses that say that they label connections, and do not do it as they should."""

from pathlib import Path

import pytest

from integration.harness.buses import open_bus
from integration.harness.clients import run
from integration.harness.labelling_bus import open_labelling_bus, read_calls
from integration.harness.processes import PYTHON
from integration.harness.rawclient import CallError
from integration.harness.supervised import SEND, open_warden, wait_for
from integration.harness.values import Variant

LIMITS_EXCEEDED = "org.freedesktop.DBus.Error.LimitsExceeded"
REASONS = {
    "refuse": "not you",
    "nonsense": "it answered with 's' where 'oays' was due",
    "nonsense-arguments": "SupportedArguments is not a list of names",
    "silent": "bus session did not answer AddServer in 5 s",
    "unreachable": "the socket that the bus made cannot be reached",
}


@pytest.mark.parametrize("mode", REASONS)
def test_if_nobody_chose_the_engine_the_gate_alone_serves(mode: str, folder: Path) -> None:
    with open_labelling_bus(folder, mode) as (bus, _), open_warden(bus, folder / "run") as warden:
        sandbox = warden.add_server()
        assert REASONS[mode] in warden.log
        assert "the gate alone serves it" in warden.log
        assert warden.show(sandbox)["engines"] == {"session": "gate"}
        assert warden.connect(sandbox).unique_name.startswith(":")
        warden.add_server()  # which waits for nothing any more
        assert len(warden.list_sandboxes()) == 2


@pytest.mark.parametrize("mode", [mode for mode in REASONS if mode != "nonsense-arguments"])
def test_if_somebody_chose_it_the_caller_hears_why(mode: str, folder: Path) -> None:
    opening = open_labelling_bus(folder, mode)
    with opening as (bus, _), open_warden(bus, folder / "run", "--engine", "containers1") as warden:
        with pytest.raises(CallError, match="bus session: ") as caught:
            warden.add_server()
        assert REASONS[mode] in caught.value.text
        assert warden.list_sandboxes() == []
        assert list((warden.folder / "containers").iterdir()) == []


@pytest.mark.parametrize("mode", ["none", "nonsense-arguments"])
def test_an_engine_that_cannot_be_had_is_one_line(mode: str, folder: Path) -> None:
    with open_labelling_bus(folder, mode) as (bus, _):
        env = {"XDG_RUNTIME_DIR": str(folder), "HOME": str(folder)}
        argv = ["run", "--bus", f"session={bus.address}", "--engine", "containers1"]
        done = run(PYTHON, "-m", "broker.cli", *argv, env=env, timeout=20)
    assert done.code == 1
    (line,) = [line for line in done.err.splitlines() if line.startswith("buswarden:")]
    assert "bus session" in line
    assert "Containers1" in line or "cannot label" in line


def test_a_bus_that_dies_before_the_first_connection(folder: Path) -> None:
    with open_labelling_bus(folder, "dies") as (bus, process):
        with open_warden(bus, folder / "run", orderly=False) as warden:
            with pytest.raises((CallError, EOFError, ConnectionError)):
                warden.add_server()
            process.wait()
            wait_for(lambda: "own-connection-lost" in warden.log)
            assert "Traceback" not in warden.log


def test_metadata_that_is_too_much_for_the_bus_alone(folder: Path) -> None:
    with open_labelling_bus(folder, "good") as (bus, _), open_warden(bus, folder / "run") as warden:
        with pytest.raises(CallError, match=r"too much \(max=3\)") as caught:
            warden.add_server(metadata={f"k{n}": Variant("s", "") for n in range(4)})
        assert caught.value.name == LIMITS_EXCEEDED
        assert warden.list_sandboxes() == []
        assert warden.show(warden.add_server())["engines"] == {"session": "containers1"}


def test_a_bus_with_the_names_of_the_proposal(folder: Path) -> None:
    with open_labelling_bus(folder, "old") as (bus, process):
        with open_warden(bus, folder / "run", "--engine", "containers1") as warden:
            sandbox = warden.add_server(app="org.example.Old")
            (instance,) = warden.show(sandbox)["instances"].values()
            client = warden.connect(sandbox)
            warden.stop_instance(sandbox)
            assert client.is_closed()
            first, last = read_calls(process, "RemoveContainerServer")
    assert first == ("AddContainerServer", ["org.example.Sandbox", "org.example.Old", {}, {}])
    assert last == ("RemoveContainerServer", [instance])


def test_a_bus_that_takes_rules(folder: Path) -> None:
    with open_labelling_bus(folder, "rules") as (bus, process):
        with open_warden(bus, folder / "run") as warden:
            sandbox = warden.add_server(rules=["send:org.a"], ReceiveFromHost=Variant("b", False))
            ((_, (*_, named)),) = read_calls(process, "AddServer")
            (entry, *built_in) = named["Allow"]
            assert entry == [SEND | 0x20, "org.a", "/", ""]
            assert all(flags & 0x80 for flags, *_ in built_in)
            warden.set_access(sandbox)
            ((_, (instance, entries)),) = read_calls(process, "SetContainerAccess")
            assert entries == built_in
            assert instance == warden.show(sandbox)["instances"]["session"]


def test_two_buses_of_which_one_labels(folder: Path) -> None:
    (folder / "other").mkdir()
    with (
        open_labelling_bus(folder, "good") as (bus, _),
        open_bus("dbus-daemon", folder / "other") as other,
    ):
        more = ["--bus", f"other={other.address}"]
        with open_warden(bus, folder / "run", *more) as warden:
            sandbox = warden.add_server(Buses=Variant("as", ["session", "other"]))
            shown = warden.show(sandbox)
            assert shown["engines"] == {"session": "containers1", "other": "gate"}
            assert set(shown["instances"]) == {"session"}
            (status,) = warden.manage("Status")
            assert status["engines"] == {"session": "containers1", "other": "gate"}
            done = warden.cli("status")
            assert [line.split()[:2] for line in done.out.splitlines() if "unix:" in line] == [
                ["other", "gate"],
                ["session", "containers1"],
            ]
