"""A changed configuration file is in force after a restart of the supervisor, as docs/configuration.md says."""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from integration.harness.buses import DAEMON, Bus, open_bus
from integration.harness.processes import is_running, wait_gone
from integration.harness.rawclient import CallError
from integration.harness.supervised import Sandbox, Warden, open_warden, wait_for
from integration.harness.values import Variant

ERROR = "org.freedesktop.DBus.Error."
KEEP = Variant("b", True)


def write(folder: Path, text: str) -> str:
    path = folder / "buswarden.toml"
    path.write_text(text)
    return f"--config={path}"


def status(warden: Warden) -> dict[str, Any]:
    (found,) = warden.manage("Status")
    return dict(found)


def takes_two(sandbox: Sandbox) -> bool:
    """Say whether the sandbox takes a second connection; the first one is open."""
    try:
        with contextlib.closing(sandbox.connect()):
            return True
    except (EOFError, ConnectionError):
        return False


def test_file_is_read_at_the_start_alone(bus: Bus, folder: Path) -> None:
    config = write(folder, "[limits]\nmax_containers = 1\n")
    with open_warden(bus, folder / "run", config) as warden:
        warden.add_server()
        write(folder, "[limits]\nmax_containers = 2\n")
        warden.process.send_signal(signal.SIGHUP)
        wait_for(lambda: status(warden)["gate_pid"] != warden.gate_pid)
        assert status(warden)["limits"]["max_containers"] == 1
        with pytest.raises(CallError, match="max_containers=1 would be exceeded"):
            warden.add_server()


def test_limits_of_the_gate_are_for_new_sandboxes(bus: Bus, folder: Path) -> None:
    config = write(folder, "[limits]\nmax_connections_per_container = 1\nmax_containers = 2\n")
    with open_warden(bus, folder / "run", config, orderly=False) as first:
        old = first.add_server("old", KeepAfterCreator=KEEP)
        first.add_server("other", KeepAfterCreator=KEEP)
        first.connect(old)
        assert not takes_two(old)
        first.kill()
        config = write(folder, "[limits]\nmax_connections_per_container = 2\nmax_containers = 3\n")
        with open_warden(bus, folder / "run", config) as second:
            assert second.gate_pid == first.gate_pid
            assert status(second)["limits"]["max_connections_per_container"] == 2
            assert not takes_two(old)
            new = second.add_server("new")
            second.connect(new)
            assert takes_two(new)
            # Over an upgrade it has the old ones; a gate in place of one that died gives it the new ones.
            _, gate = second.manage("Upgrade")
            assert not takes_two(old)
            os.kill(gate, signal.SIGKILL)
            assert wait_gone(gate)
            wait_for(lambda: is_running(status(second)["gate_pid"]))
            second.gate_pid = status(second)["gate_pid"]
            second.connect(old)
            assert takes_two(old)


def test_sandboxes_over_a_lowered_limit_stay(bus: Bus, folder: Path) -> None:
    with open_warden(bus, folder / "run", orderly=False) as first:
        kept = [first.add_server(app, KeepAfterCreator=KEEP) for app in ("a", "b")]
        first.kill()
        config = write(folder, "[limits]\nmax_containers = 1\n")
        with open_warden(bus, folder / "run", config) as second:
            assert [one["id"] for one in second.list_sandboxes()] == [one.id for one in kept]
            for one in kept:
                assert second.connect(one).unique_name
            with pytest.raises(CallError, match="max_containers=1 would be exceeded"):
                second.add_server()


def test_bus_that_is_taken_out_is_kept_by_its_sandboxes(bus: Bus, folder: Path) -> None:
    other_folder = folder / "other"
    other_folder.mkdir()
    with open_bus(DAEMON, other_folder) as other:
        more = f"--bus=other={other.address}"
        with open_warden(bus, folder / "run", more, orderly=False) as first:
            buses = Variant("as", ["other"])
            kept = first.add_server("kept", Buses=buses, KeepAfterCreator=KEEP)
            client = first.connect(kept)
            first.kill()
            with open_warden(bus, folder / "run") as second:
                assert second.gate_pid == first.gate_pid
                assert set(status(second)["buses"]) == {"session"}
                assert second.show(kept)["sockets"] == {"other": str(kept.socket)}
                assert client.driver("GetId")
                assert second.connect(kept).driver("GetId")
                with pytest.raises(CallError, match="no bus 'other', only: session"):
                    second.add_server("new", Buses=buses)


def test_bus_that_is_new_is_for_new_sandboxes(bus: Bus, folder: Path) -> None:
    other_folder = folder / "other"
    other_folder.mkdir()
    with (
        open_bus(DAEMON, other_folder) as other,
        open_warden(bus, folder / "run", orderly=False) as first,
    ):
        kept = first.add_server("kept", KeepAfterCreator=KEEP)
        first.kill()
        with open_warden(bus, folder / "run", f"--bus=other={other.address}") as second:
            assert set(second.show(kept)["sockets"]) == {"session"}
            buses = Variant("as", ["other", "session"])
            new = second.add_server("new", Buses=buses)
            assert set(second.show(new)["sockets"]) == {"other", "session"}
            assert second.connect(new).driver("GetId")
