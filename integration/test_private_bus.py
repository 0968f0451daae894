"""`buswarden run` where there is no bus: it brings its own, and takes over one that was left."""

import os
import re
import signal
from pathlib import Path

from integration.harness.clients import run
from integration.harness.processes import PYTHON, Process, is_running, running, wait_gone

RUN = [PYTHON, "-m", "broker.cli", "run"]


def env(folder: Path) -> dict[str, str]:
    return {"XDG_RUNTIME_DIR": str(folder), "HOME": str(folder)}


def started(broker: Process) -> tuple[int, str]:
    """Return the pid of the private bus, and what was said of it."""
    said = broker.wait_line("no session bus found")
    broker.wait_line("ready")
    found = re.search(r"\(process (\d+)\)", said)
    assert found is not None, said
    return int(found[1]), said


def test_a_private_bus_ends_with_the_broker(folder: Path) -> None:
    with running(RUN, env=env(folder), log=folder / "log") as broker:
        pid, _said = started(broker)
        assert run(PYTHON, "-m", "broker.cli", "list", env=env(folder)).ok
        broker.send_signal(signal.SIGINT)
        assert broker.wait() == 0
    assert wait_gone(pid)
    assert not [path for path in folder.rglob("*") if path.is_socket()]


def test_a_second_broker_is_refused_and_disturbs_nothing(folder: Path) -> None:
    with running(RUN, env=env(folder), log=folder / "log") as broker:
        pid, _said = started(broker)
        second = run(*RUN, env=env(folder))
        assert second.code == 1
        assert second.err.startswith("buswarden: ")
        assert second.err.count("\n") == 1
        assert is_running(pid)
        assert run(PYTHON, "-m", "broker.cli", "list", env=env(folder)).ok


def test_a_private_bus_that_was_left_is_taken_over(folder: Path) -> None:
    with running(RUN, env=env(folder), log=folder / "log") as broker:
        pid, _said = started(broker)
        broker.send_signal(signal.SIGKILL)
        broker.wait()
    try:
        assert is_running(pid)
        with running(RUN, env=env(folder), log=folder / "log") as broker:
            again, said = started(broker)
            assert (again, "an earlier broker's" in said) == (pid, True)
            broker.send_signal(signal.SIGTERM)
            assert broker.wait() == 0
        assert wait_gone(pid)
    finally:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def test_the_bus_of_the_runtime_directory_is_found(folder: Path) -> None:
    address = f"--address=unix:path={folder}/bus"
    argv = ["dbus-daemon", "--session", "--nofork", "--nopidfile", "--print-address=1", address]
    with running(argv) as bus:
        bus.wait_line("unix:")
        with running(RUN, env=env(folder), log=folder / "log") as broker:
            assert broker.read_line() == f"ready unix:path={folder}/bus"
