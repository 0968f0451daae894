"""`buswarden exec`: a command that reaches its own bus socket and nothing else of the bus, and ends with its sandbox."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.harness.buses import Bus
from integration.harness.clients import Outcome
from integration.harness.processes import PYTHON, Process, is_running, running, wait_gone
from integration.harness.service import ECHO, PATH, running_service
from integration.harness.supervised import Warden, open_warden, wait_for

INSIDE = f"/run/user/{os.getuid()}/bus"


@pytest.fixture(autouse=True, scope="module")
def kernel_makes_sandboxes() -> None:
    argv = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "true"]
    if subprocess.run([*argv[:4], "--unshare-pid", *argv[4:]], check=False).returncode:
        pytest.skip("the kernel does not let bubblewrap make a sandbox here")


def shell(warden: Warden, script: str, *options: str) -> Outcome:
    return warden.cli("exec", *options, "--", "sh", "-c", script)


@pytest.fixture
def sleeper(shared: Warden) -> Iterator[Process]:
    """`exec` with a command that says its address and sleeps."""
    argv = [PYTHON, "-m", "broker.cli", "exec", "--app", "Sleeper", "--"]
    command = ["sh", "-c", "echo up $DBUS_SESSION_BUS_ADDRESS; exec sleep 600"]
    with running([*argv, *command], env={"XDG_RUNTIME_DIR": str(shared.runtime)}) as process:
        process.wait_line("up")
        yield process


def test_command_has_its_bus_its_exit_code_and_its_output(shared: Warden) -> None:
    outcome = shell(shared, "cat; echo out; echo err >&2; exit 7")
    assert (outcome.code, outcome.out) == (7, "out\n")
    assert "err\n" in outcome.err
    assert shared.list_sandboxes() == []


def test_it_is_under_its_rules(shared: Warden) -> None:
    call = f"busctl --user call {ECHO} {PATH} {ECHO} Echo s hello"
    with running_service(shared.bus.address):
        assert "hello" not in shell(shared, call).out
        allowed = shell(shared, call, "--allow", f"send:{ECHO}")
        assert allowed.out == 's "hello"\n', allowed.err
        send = f"dbus-send --session --print-reply --dest={ECHO} {PATH} {ECHO}.Echo string:hello"
        assert "hello" in shell(shared, send, "--allow", f"send:{ECHO}").out
        denied = shell(shared, call, "--allow", f"send:{ECHO}", "--deny", f"send:{ECHO}@{PATH}")
        assert "Access denied" in denied.err


# Says which of the addresses that it is given can be connected to, and what else it sees.
LOOK = """
import os, socket, sys
for name in sys.argv[1:]:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(name.replace("@", "\\0"))
            print("reached", name)
        except OSError:
            pass
for top in ("/run", "/tmp"):
    for folder, _, files in os.walk(top):
        print(*(f"{folder}/{name}" for name in files), sep="\\n")
print(*(f"{key}={value}" for key, value in os.environ.items()), *os.listdir("/proc"), sep="\\n")
"""


def test_it_reaches_its_own_socket_and_nothing_else_of_the_bus(shared: Warden) -> None:
    other = shared.add_server()
    bus = shared.bus.address.removeprefix("unix:path=").partition(",")[0]
    abstract = f"@/tmp/dbus-test-{os.getpid()}"  # as dbus-daemon names its own
    with (
        tempfile.TemporaryDirectory(dir="/var/tmp") as name,
        socket.socket(socket.AF_UNIX) as elsewhere,
        socket.socket(socket.AF_UNIX) as nowhere,
    ):
        elsewhere.bind(f"{name}/bus")
        nowhere.bind(abstract.replace("@", "\0"))
        for sock in (elsewhere, nowhere):
            sock.listen()
        control = str(shared.folder / "gate.sock")
        hidden = [bus, str(other.socket), control, f"{name}/bus", abstract]
        # The interpreter itself: a virtual environment is not there in the sandbox.
        python = str(Path(sys.executable).resolve())
        outcome = shared.cli("exec", "--", python, "-c", LOOK, *hidden, INSIDE)
    lines = outcome.out.splitlines()
    assert outcome.code == 0, outcome.err
    assert [line for line in lines if line.startswith("reached")] == [f"reached {INSIDE}"]
    assert {line for line in lines if line.startswith(("/run/", "/tmp/"))} == {INSIDE}
    assert f"DBUS_SESSION_BUS_ADDRESS=unix:path={INSIDE}" in lines
    assert not [line for line in lines if bus in line or "BUSWARDEN" in line]
    assert str(shared.process.pid) not in lines  # no process of the host in /proc


def test_it_is_in_a_sandbox_of_the_app_it_was_said_to_be(shared: Warden) -> None:
    argv = [PYTHON, "-m", "broker.cli", "exec", "--type", "org.example.T", "--app", "Mine"]
    command = ["--component", "part", "--", "sh", "-c", "echo up; read line"]
    with running([*argv, *command], env={"XDG_RUNTIME_DIR": str(shared.runtime)}) as process:
        process.wait_line("up")
        (sandbox,) = shared.list_sandboxes()
        found = (sandbox["type"], sandbox["app"], sandbox["component"])
        assert found == ("org.example.T", "Mine", "part")
    wait_for(lambda: not shared.list_sandboxes())


def _descendants(pid: int) -> Iterator[int]:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(child)
        yield from _descendants(int(child))


def _command_pid(process: Process) -> int:
    """Return the pid, outside, of `sleep`."""
    found: list[int] = []

    def look() -> bool:
        found.extend(
            pid
            for pid in _descendants(process.pid)
            if Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
        )
        return bool(found)

    wait_for(look)
    return found[0]


def test_killed_from_outside_it_leaves_nothing(shared: Warden, sleeper: Process) -> None:
    command = _command_pid(sleeper)
    sleeper.send_signal(signal.SIGKILL)
    assert wait_gone(command)
    wait_for(lambda: not shared.list_sandboxes())


def test_killed_inside_it_leaves_nothing(shared: Warden, sleeper: Process) -> None:
    os.kill(_command_pid(sleeper), signal.SIGKILL)
    assert sleeper.wait() == 128 + signal.SIGKILL
    wait_for(lambda: not shared.list_sandboxes())


def test_bubblewrap_killed_leaves_nothing(shared: Warden, sleeper: Process) -> None:
    command = _command_pid(sleeper)
    (bubblewrap,) = Path(f"/proc/{sleeper.pid}/task/{sleeper.pid}/children").read_text().split()
    os.kill(int(bubblewrap), signal.SIGKILL)
    assert sleeper.wait() == 128 + signal.SIGKILL
    assert wait_gone(command)
    wait_for(lambda: not shared.list_sandboxes())


def test_signal_goes_to_the_command(shared: Warden, sleeper: Process) -> None:
    sleeper.send_signal(signal.SIGTERM)
    assert sleeper.wait() == 128 + signal.SIGTERM
    wait_for(lambda: not shared.list_sandboxes())


def test_stopped_sandbox_takes_the_bus_away_from_the_command(
    shared: Warden, sleeper: Process
) -> None:
    (sandbox,) = shared.list_sandboxes()
    assert shared.cli("stop", sandbox["id"]).ok
    assert is_running(_command_pid(sleeper))  # it is not ours to kill; it has no bus


def test_exec_without_a_broker_is_one_line(shared: Warden, folder: Path) -> None:
    argv = ["--address", f"unix:path={folder}/nothing", "exec", "--", "true"]
    outcome = shared.cli(*argv)
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1


def test_supervisor_killed_meanwhile_costs_the_command_nothing(bus: Bus, folder: Path) -> None:
    with open_warden(bus, folder / "run", orderly=False) as warden:
        argv = [PYTHON, "-m", "broker.cli", "exec", "--allow", f"send:{ECHO}", "--", "sh", "-c"]
        call = f"busctl --user call {ECHO} {PATH} {ECHO} Echo s hello"
        script = f"echo up; read line; {call}"
        env = {"XDG_RUNTIME_DIR": str(warden.runtime)}
        with (
            running_service(bus.address),
            running([*argv, script], env=env, log=folder / "exec.log") as process,
        ):
            process.wait_line("up")
            warden.kill()
            process.send_line("go")
            assert process.wait_line("s ") == 's "hello"'
            assert process.wait() == 0
        sockets = list((warden.folder / "containers").iterdir())
        wait_for(lambda: not any(path.exists() for path in sockets))
