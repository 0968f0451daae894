"""X2, X3, X5: what a command under `exec` can do to its cgroup, to its first process, with keys and to the kernel."""

import ctypes
import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.launcher.cgroup import own_cgroup
from integration.harness.exec_probe import probe, report_of
from integration.harness.processes import (
    PYTHON,
    Process,
    is_running,
    running,
    wait_gone,
    wait_until,
)
from integration.harness.supervised import Warden, wait_for

_LIBC = ctypes.CDLL(None, use_errno=True)
ADD_KEY, KEYCTL = 248, 250  # x86_64, as in the probe
SESSION_KEYRING = -3

pytestmark = pytest.mark.skipif(
    os.uname().machine != "x86_64", reason="the machine numbers its system calls in another way"
)


@contextmanager
def started(warden: Warden, *argv: str) -> Iterator[Process]:
    """Run `buswarden exec ARGV` for as long as the block."""
    with running(
        [PYTHON, "-m", "broker.cli", "exec", *argv],
        env={"XDG_RUNTIME_DIR": str(warden.runtime)},
    ) as process:
        yield process


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(process: Process) -> int:
    """Return the pid of the command, once there is one."""
    found: list[int] = []

    def look() -> bool:
        below = [process.pid]
        for _ in range(3):
            below = [child for parent in below for child in children(parent)]
        found[:] = below
        return bool(found)

    wait_for(look)
    return found[0]


def cgroup_of(pid: int) -> str:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next((line for line in lines if line.startswith("0::")), "")


def test_attack_x2_no_cgroup_of_the_host_can_be_written(shared: Warden) -> None:
    report = report_of(shared.cli("exec", "--", *probe("cgroups")))["cgroups"]
    assert not report["nested"], "it made a user namespace"
    assert report["seen"] == []
    assert [line for line in report["own"] if line.startswith("0::")] in ([], ["0::/"])


def test_attack_x2_the_command_is_in_a_cgroup_of_its_own(shared: Warden) -> None:
    with own_cgroup() as group:
        if group.why_not:
            pytest.skip(f"the kernel or who started us gives no cgroup: {group.why_not}")
    with started(shared, "--", "sh", "-c", "echo up; exec sleep 600") as process:
        process.wait_line("up")
        name = cgroup_of(command_of(process))
        assert name.endswith(f"/buswarden-exec-{process.pid}")
        assert cgroup_of(process.pid) != name
    own = Path(group.path).parent
    assert not (own / f"buswarden-exec-{process.pid}").exists()


def test_attack_x2_without_one_it_says_so(shared: Warden) -> None:
    """In a mount namespace without cgroup2, none can be made."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4] for line in mounts if " - cgroup2 " in line]
    script = "; ".join(f"mount -t tmpfs none {point}" for point in points) or "true"
    read_only = "; ".join(f"mount -o remount,ro,bind {point}" for point in points) or "true"
    argv = ["unshare", "--mount", "sh", "-ec", f'{script}; {read_only}; exec "$@"', "sh"]
    done = subprocess.run(
        [*argv, PYTHON, "-m", "broker.cli", "exec", "--", "sh", "-c", "exit 3"],
        env=os.environ | {"XDG_RUNTIME_DIR": str(shared.runtime)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "no separate cgroup for sh: " in done.stderr


def test_attack_x3_the_first_process_is_out_of_reach(shared: Warden) -> None:
    tried = report_of(shared.cli("exec", "--", *probe("init")))["init"]
    assert set(tried.values()) <= {errno.EPERM, errno.EACCES, errno.ENOENT}, tried
    assert {tried["pidfd_open"], tried["ptrace_attach"], tried["pidfd_getfd"]} == {errno.EPERM}
    assert tried["ptrace_high_bits"] == errno.EPERM


def test_attack_x3_no_process_inside_has_the_pipe(shared: Warden) -> None:
    """Only `exec` holds the descriptor that keeps the sandbox."""
    with started(shared, "--", "sh", "-c", "echo up; exec sleep 600") as process:
        process.wait_line("up")
        command = command_of(process)
        ours = pipes(process.pid)
        (bubblewrap,) = children(process.pid)
        (init,) = children(bubblewrap)
        theirs = pipes(bubblewrap) | pipes(init) | pipes(command)
        (sandbox,) = shared.list_sandboxes()
        facts = shared.manage("Show", "s", sandbox["id"])[0]
        assert facts["close_notify"]
        held = pipes(shared.gate_pid)
        assert ours & held, "exec holds the pipe that the gate watches"
        assert not theirs & held
        os.kill(process.pid, signal.SIGKILL)
        assert wait_gone(command)
    wait_for(lambda: not shared.list_sandboxes())


def pipes(pid: int) -> set[str]:
    folder = Path(f"/proc/{pid}/fd")
    found = (str(fd.readlink()) for fd in folder.iterdir())
    return {name for name in found if name.startswith("pipe:")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_attack_x3_a_first_process_that_is_held_up_makes_nobody_deaf(
    shared: Warden, number: int
) -> None:
    """A debugger outside has stopped pid 1, and the command has ended: `exec` ends by a signal all the same."""
    with started(shared, "--", "sh", "-c", "echo up; read line; exit 0") as process:
        process.wait_line("up")
        command = command_of(process)
        (bubblewrap,) = children(process.pid)
        (init,) = children(bubblewrap)
        os.kill(init, signal.SIGSTOP)
        process.send_line("go")
        assert wait_until(lambda: not is_running(command))
        time.sleep(0.1)  # it is stuck, as it should be for this test
        assert process.returncode is None
        process.send_signal(number)
        assert process.wait() == 128 + signal.SIGKILL
        assert wait_gone(init)
    wait_for(lambda: not shared.list_sandboxes())


def in_child(function: Callable[[], None]) -> int:
    """Run it in a forked process, whose session keyring is nobody else's, and return its exit code."""
    pid = os.fork()
    if not pid:
        code = 99
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_attack_x5_no_key_of_ours_is_seen(shared: Warden) -> None:
    reading, writing = os.pipe()

    def run_with_key() -> None:
        assert _LIBC.syscall(KEYCTL, 1, None) > 0
        key = _LIBC.syscall(ADD_KEY, b"user", b"bw-secret", b"s3cret", 6, SESSION_KEYRING)
        assert key > 0, os.strerror(ctypes.get_errno())
        # Even a key that all processes of the user may read.
        _LIBC.syscall(KEYCTL, 5, key, 0x3F3F0000)
        os.write(writing, json.dumps(report_of(exec_keys(shared, key))["keys"]).encode())

    try:
        assert in_child(run_with_key) == 0
        tried: dict[str, Any] = json.loads(os.read(reading, 4096))
    finally:
        os.close(reading)
        os.close(writing)
    assert tried == {"get": errno.EPERM, "search": errno.EPERM, "read": errno.EPERM} | {
        "add": errno.EPERM
    }


def exec_keys(shared: Warden, key: int) -> Any:
    return shared.cli("exec", "--", *probe("keys", key=key))


def test_root_inside_changes_no_setting_of_the_kernel(shared: Warden) -> None:
    """Files below /proc/sys belong to root, who needs no capability to write them."""
    assert report_of(shared.cli("exec", "--", *probe("settings")))["settings"] == []
