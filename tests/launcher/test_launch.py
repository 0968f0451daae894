"""Exit codes of commands, and messages of bubblewrap, which runs in integration/."""

import os
import signal
from pathlib import Path

import pytest

from broker.launcher import host, launch
from broker.launcher.plan import Plan
from broker.wire.errors import ConfigError

PLAN = Plan(before=(), after=(), environ={})


def test_no_bubblewrap_is_an_error_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="bubblewrap"):
        host.find_bubblewrap()


def fake_stage(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Replace the stage, and the bubblewrap that it becomes, by a script: `status` is a descriptor there."""
    path = folder / "stage.py"
    order = "import json, os, signal, sys\nstatus = json.load(open(int(sys.argv[1])))['status']"
    path.write_text(f"{order}\n{script}\n")
    monkeypatch.setattr(launch, "STAGE", str(path))
    (folder / "bwrap").write_text("#!/bin/sh\n")
    (folder / "bwrap").chmod(0o700)
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
    fake_stage(tmp_path, monkeypatch, ending)
    before = signal.getsignal(signal.SIGTERM)
    descriptors = os.listdir("/proc/self/fd")  # noqa: PTH208
    assert launch.run_sandbox(PLAN) == status
    assert os.listdir("/proc/self/fd") == descriptors  # noqa: PTH208
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "words", "error"),
    [
        pytest.param("", "", "ended without an error message", id="nothing"),
        pytest.param('{"child-pid": 7}', "bwrap: Bad", "^Bad$", id="set-up"),
        pytest.param("nonsense", "a\\nb", "^b$", id="nonsense"),
        pytest.param('{"child-pid": 7}\\n{"exit-code": 1}', "", None, id="exit-code"),
        pytest.param('{"child-pid": 7}\\n{"exit-code": 1}', "bwrap: No", "^No$", id="no-shell"),
        pytest.param(
            *("", "bwrap: Creating new namespace failed", "failed .allow user namespaces"),
            id="advice",
        ),
    ],
)
def test_failing_is_told_from_a_command_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, words: str, error: str | None
) -> None:
    script = f"os.write(status, b'{said}\\n')\nos.write(2, b'{words}')\nsys.exit(1)"
    fake_stage(tmp_path, monkeypatch, script)
    if error is None:
        assert launch.run_sandbox(PLAN) == 1
    else:
        with pytest.raises(launch.NotStartedError, match=error):
            launch.run_sandbox(PLAN)


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
os.write(status, b'{"child-pid": %d}\\n' % os.getpid())
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    fake_stage(tmp_path, monkeypatch, script)
    assert launch.run_sandbox(PLAN) == 33


@pytest.mark.slow
def test_a_command_that_is_gone_leaves_signals_to_bubblewrap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The command is a zombie that its parent does not reap: somebody holds the first process up.
    script = """
import time
launcher, child = os.getppid(), os.fork()
if child == 0:
    os._exit(0)
os.write(status, b'{"child-pid": %d}\\n' % os.getpid())
os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
for _ in range(500):
    os.kill(launcher, signal.SIGTERM)
    time.sleep(0.01)
"""
    fake_stage(tmp_path, monkeypatch, script)
    # It may come before the handler is there, and after it is gone.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert launch.run_sandbox(PLAN) == 128 + signal.SIGKILL
    finally:
        signal.signal(signal.SIGTERM, before)
