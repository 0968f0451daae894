"""`buswarden run`: where it may not run, and where it brings its own bus."""

import os
import signal
from pathlib import Path

import pytest

from broker.cli.main import main
from integration.harness.buses import Bus
from integration.harness.clients import run
from integration.harness.processes import PYTHON, is_running, running, wait_gone
from integration.harness.rawclient import RawClient
from integration.harness.supervised import NAME, Warden, open_warden, wait_for

RUN = (PYTHON, "-m", "broker.cli", "run")


def env(runtime: Path) -> dict[str, str]:
    runtime.mkdir(mode=0o700, exist_ok=True)
    return {"XDG_RUNTIME_DIR": str(runtime), "HOME": str(runtime)}


def test_second_supervisor_in_the_same_folder_is_refused(shared: Warden) -> None:
    client = shared.connect(shared.add_server())
    outcome = run(*RUN, "--bus", f"session={shared.bus.address}", env=env(shared.runtime))
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.startswith("buswarden: another supervisor is running in ")
    assert outcome.err.count("\n") == 1
    assert client.driver("GetId")
    assert shared.add_server().socket.is_socket()
    assert (shared.folder / "bus-address").read_text() == f"{shared.bus.address}\n"


def test_second_supervisor_on_the_same_bus_is_refused(shared: Warden, folder: Path) -> None:
    client = shared.connect(shared.add_server())
    argv = (*RUN, "--bus", f"session={shared.bus.address}")
    outcome = run(*argv, env=env(folder / "other"))
    assert outcome.code == 1
    assert NAME in outcome.err
    assert outcome.err.count("\n") == 1
    assert client.driver("GetId")
    assert not [path for path in folder.rglob("*") if path.is_socket()]


@pytest.mark.parametrize("what", ["nothing", "file", "silent"])
def test_a_bus_that_is_not_there_is_one_line(folder: Path, what: str) -> None:
    path = folder / "no-bus"
    if what == "file":
        path.write_text("")
    address = f"unix:path={path}"
    if what == "silent":
        address = "unix:abstract=buswarden-nobody-listens-here"
    outcome = run(*RUN, "--bus", f"session={address}", env=env(folder / "run"))
    assert outcome.code == 1
    assert outcome.err.startswith("buswarden: bus session: ")
    assert outcome.err.count("\n") == 1
    assert not [path for path in (folder / "run").rglob("*") if path.is_socket()]


def test_a_bus_that_is_gone_for_good_ends_it_in_order(bus: Bus, folder: Path) -> None:
    config = folder / "config.toml"
    config.write_text("bus_gone_seconds = 1\n")
    with open_warden(bus, folder / "run", "--config", str(config), orderly=False) as warden:
        client = warden.connect(warden.add_server())
        os.kill(bus.pid, signal.SIGKILL)
        assert warden.process.wait() == 1
        assert client.is_closed(5)
        assert "bus session" in warden.log
        assert "Traceback" not in warden.log


def test_a_bus_of_its_own_does_not_come_back(folder: Path) -> None:
    log = folder / "log"
    with running(RUN, env=env(folder / "run"), log=log) as process:
        bus_pid = int(process.read_line().rpartition("process ")[2].rstrip(")"))
        process.wait_line("ready ")
        os.kill(bus_pid, signal.SIGKILL)
        assert process.wait() == 1
    assert process.log.splitlines()[-1].startswith("buswarden: no bus is left")
    assert not [path for path in (folder / "run").rglob("gate.sock") if path.is_socket()]


def test_without_any_bus_it_starts_one_of_its_own(folder: Path) -> None:
    log = folder / "log"
    with running(RUN, env=env(folder / "run"), log=log) as process:
        line = process.read_line()
        assert line.startswith("no session bus found: using a private bus, unix:path=")
        address = process.wait_line("ready ").split()[1]
        assert address in line
        bus_pid = int(line.rpartition("process ")[2].rstrip(")"))
        with RawClient.connect(address) as host:
            assert NAME in host.list_names()
        cli = (PYTHON, "-m", "broker.cli")
        outcome = run(*cli, "add", "--type", "a.b", "--app", "x", env=env(folder / "run"))
        assert outcome.ok, outcome.err
        with RawClient.connect(f"unix:path={outcome.out.split()[1]}") as client:
            found = run(*cli, "who", client.unique_name, env=env(folder / "run"))
            assert found.out == f"{outcome.out.split()[0]} a.b/x\n"
        assert is_running(bus_pid)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0, log.read_text()
    assert wait_gone(bus_pid)
    assert not [path for path in folder.rglob("*") if path.is_socket()]


def test_private_bus_is_taken_over_after_a_kill(folder: Path) -> None:
    with running(RUN, env=env(folder / "run"), log=folder / "log") as first:
        bus_pid = int(first.read_line().rpartition("process ")[2].rstrip(")"))
        address = first.wait_line("ready ").split()[1]
        with RawClient.connect(address) as host:
            first.send_signal(signal.SIGKILL)
            first.wait()
            with running(RUN, env=env(folder / "run"), log=folder / "log") as second:
                line = second.read_line()
                assert "an earlier broker's private bus" in line
                assert f"process {bus_pid})" in line
                second.wait_line("ready")
                assert host.driver("GetId")
                second.send_signal(signal.SIGTERM)
                assert second.wait() == 0
    assert wait_gone(bus_pid)


def test_runtime_bus_socket_is_found_without_an_option(bus: Bus, folder: Path) -> None:
    # $XDG_RUNTIME_DIR/bus, as in any login session.
    with open_warden(bus, folder, add_bus=False, orderly=False) as warden:
        (status,) = warden.manage("Status")
        assert status["buses"] == {"session": f"unix:path={folder}/bus"}
        assert warden.process.stop() == 0


def test_two_buses_by_one_supervisor(bus: Bus, folder: Path) -> None:
    other = folder / "other"
    argv = ["dbus-daemon", "--session", "--nofork", "--print-address=1"]
    with (
        running([*argv, f"--address=unix:path={other}"], log=folder / "other.log") as second,
        RawClient.connect(second.wait_line("unix:")) as there,
        open_warden(bus, folder / "run", "--bus", f"accessibility=unix:path={other}") as warden,
    ):
        outcome = warden.cli(
            *("add", "--type", "a.b", "--app", "x", "--bus", "session", "--bus", "accessibility"),
        )
        sandbox = outcome.out.split()[0]
        (shown,) = warden.manage("Show", "s", sandbox)
        assert shown["sockets"].keys() == {"session", "accessibility"}
        clients = {bus: RawClient.connect(a) for bus, a in shown["addresses"].items()}
        name = clients["accessibility"].unique_name
        with clients["session"], clients["accessibility"]:
            assert there.driver("NameHasOwner", "s", name) == (True,)
            found = warden.cli("who", name, "--bus", "accessibility")
            assert found.out == f"{sandbox} a.b/x\n", found.err
            wait_for(lambda: len(warden.manage("Show", "s", sandbox)[0]["connections"]) == 2)
            assert warden.cli("stop", sandbox).ok
            assert all(client.is_closed(2) for client in clients.values())
        assert warden.cli("who", name, "--bus", "nowhere").code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[limits]\nmax_container = 1\n", "max_container"),
        ("[limits]\nmax_containers = -1\n", "max_containers"),
        ("nonsense = 1\n", "nonsense"),
        ("scope = 'planet'\n", "planet"),
        ("[buses]\nsession = 'tcp:host=x'\n", "tcp"),
        ("[buses]\n'Sess ion' = 'unix:path=/x'\n", "Sess ion"),
        ("not toml", "config.toml"),
        ("runtime_dir = 'relative'\n", "relative"),
    ],
)
def test_bad_configuration_is_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    words: str,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    config = folder / "config.toml"
    config.write_text(text)
    assert main(["run", "--config", str(config)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert words in err
