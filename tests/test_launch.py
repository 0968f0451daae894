"""What launch finds out, and what becomes of a command's end. Bubblewrap itself is in integration/."""

import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from broker.sandbox import launch
from broker.sandbox.plan import Plan
from broker.wire.errors import ConfigError


def test_listening_sockets_are_found_and_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    real = tmp_path / "real/s"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as abstract:
        listening.bind(str(tmp_path / "link/s"))
        listening.listen()
        name = f"test-dbus-{os.getpid()}"
        abstract.bind(f"\0{name}")
        abstract.listen()
        host = launch.find_host(bus_addresses=(), runtime_dirs=(str(tmp_path / "link"), "/nowhere"))
    assert str(real) in host.sockets
    assert name in host.abstract_sockets
    assert host.runtime_dirs == (str(tmp_path / "real"),)


def test_a_known_bus_counts_though_it_listens_in_another_namespace(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))  # does not listen: so it is in no list
        address = f"unix:path={tmp_path}/s;unix:path={tmp_path}/gone"
        host = launch.find_host(bus_addresses=(address,), runtime_dirs=())
    assert str(tmp_path / "s") in host.sockets
    assert str(tmp_path / "gone") not in host.sockets


def test_a_working_directory_that_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path / "d")
    (tmp_path / "d").rmdir()
    assert launch.find_host(bus_addresses=(), runtime_dirs=()).cwd == "/"


def test_no_bubblewrap_is_an_error_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="bubblewrap"):
        launch.find_bubblewrap()


def fake_bubblewrap(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a `bwrap` into PATH that does what the script says: options are $2 sync fd, $4 status fd."""
    path = folder / "bwrap"
    path.write_text(f"#!{sys.executable}\nimport os, signal, sys\n{script}\n")
    path.chmod(0o700)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "status"),
    [
        pytest.param("sys.exit(7)", 7, id="exit"),
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", 137, id="signal"),
    ],
)
def test_the_exit_status_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, status: int
) -> None:
    fake_bubblewrap(tmp_path, monkeypatch, ending)
    before = signal.getsignal(signal.SIGTERM)
    read_end, write_end = os.pipe()
    plan = Plan(argv=(), environ={}, cwd="/")
    assert launch.run_sandbox(plan, close_notify=write_end) == status
    assert os.read(read_end, 1) == b""  # nobody holds the pipe any more
    os.close(read_end)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "started"),
    [
        pytest.param("", False, id="nothing"),
        pytest.param('{"child-pid": 7}', False, id="set-up"),
        pytest.param("nonsense", False, id="nonsense"),
        pytest.param('{"child-pid": 7}\\n{"exit-code": 1}', True, id="exit-code"),
    ],
)
def test_failing_is_told_from_a_command_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, started: bool
) -> None:
    fake_bubblewrap(tmp_path, monkeypatch, f"os.write(int(sys.argv[4]), b'{said}\\n')\nsys.exit(1)")
    read_end, write_end = os.pipe()
    plan = Plan(argv=(), environ={}, cwd="/")
    if started:
        assert launch.run_sandbox(plan, close_notify=write_end) == 1
    else:
        with pytest.raises(launch.NotStartedError):
            launch.run_sandbox(plan, close_notify=write_end)
    os.close(read_end)


@pytest.mark.slow
def test_a_signal_reaches_the_command_and_not_bubblewrap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fake is bubblewrap and the first process in one; its child is the command, which signals the
    # test's process, our launcher, until it hears of it. SIGWINCH, as that one never ends anything.
    script = """
import time
parent = os.getppid()
if os.fork() == 0:
    signal.signal(signal.SIGWINCH, lambda *_: os._exit(33))
    for _ in range(500):
        os.kill(parent, signal.SIGWINCH)
        time.sleep(0.01)
os.write(int(sys.argv[4]), b'{"child-pid": %d}\\n' % os.getpid())
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    fake_bubblewrap(tmp_path, monkeypatch, script)
    read_end, write_end = os.pipe()
    plan = Plan(argv=(), environ={}, cwd="/")
    assert launch.run_sandbox(plan, close_notify=write_end) == 33
    os.close(read_end)
