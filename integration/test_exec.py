"""`buswarden exec` with real bubblewrap: what the command reaches, and that neither end outlives the other."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from integration.harness.processes import PROJECT, PYTHON, Process, is_running, wait_until
from integration.harness.rawclient import RawClient
from integration.harness.service import ECHO, running_service
from integration.harness.supervised import Warden, wait_for

# A checkout and its Python are not there in the sandbox otherwise.
SHARES: Final = [
    word
    for directory in (PROJECT, Path(sys.prefix), Path(sys.base_prefix))
    for word in ("--share", str(directory))
]
SLEEP: Final = "echo up; setsid sleep 1000 & exec sleep 1000"


@contextmanager
def started(warden: Warden, *argv: str) -> Iterator[Process]:
    """Run `buswarden exec -- ARGV` for as long as the block."""
    popen = subprocess.Popen(
        [PYTHON, "-m", "broker.cli", "exec", "--", *argv],
        env=warden_env(warden),
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    process = Process(popen, None)
    try:
        yield process
    finally:
        process.stop()


def warden_env(warden: Warden) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(warden.runtime), "HOME": "/"}


def descendants(pid: int) -> list[int]:
    """Every process below it, parents first: bubblewrap, its first process, the command, and so on."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [one for child in children for one in (int(child), *descendants(int(child)))]


def test_the_exit_code_is_passed_on_and_the_sandbox_ends(warden: Warden) -> None:
    assert warden.cli("exec", "--", "sh", "-c", "exit 41").code == 41
    wait_for(lambda: not warden.list_sandboxes())


def test_a_rule_lets_a_call_out(warden: Warden) -> None:
    call = ["busctl", "--user", "call", ECHO, "/x", ECHO, "Echo", "s", "hello"]
    with running_service(warden.bus.address):
        refused = warden.cli("exec", "--", *call)
        allowed = warden.cli("exec", "--allow", f"send:{ECHO}", "--", *call)
    assert refused.code == 1
    assert (allowed.code, allowed.out) == (0, 's "hello"\n')


def test_nothing_of_the_real_bus_is_there(warden: Warden) -> None:
    script = (
        "busctl --user list && test ! -e /run/dbus && ls -A /tmp && env | grep -vE '^(HOME|PWD)='"
    )
    outcome = warden.cli("exec", "--", "sh", "-c", script)
    assert outcome.ok, outcome.err
    assert "org.buswarden.Broker1" not in outcome.out
    assert str(warden.runtime.parent) not in outcome.out


@pytest.mark.parametrize("victim", ["exec", "bubblewrap", "init", "command"])
def test_all_ends_whoever_is_killed(warden: Warden, victim: str) -> None:
    with started(warden, "sh", "-c", SLEEP) as process:
        assert process.read_line() == "up"
        wait_for(lambda: len(descendants(process.pid)) == 4)
        below = descendants(process.pid)
        position = ("bubblewrap", "init", "command", "exec").index(victim)
        os.kill([*below[:3], process.pid][position], signal.SIGKILL)
        code = process.wait()
    assert code == (-signal.SIGKILL if victim == "exec" else 128 + signal.SIGKILL)
    assert wait_until(lambda: not any(is_running(pid) for pid in below))
    wait_for(lambda: not warden.list_sandboxes())


def test_a_signal_is_passed_on(warden: Warden) -> None:
    script = "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done"
    with started(warden, "sh", "-c", script) as process:
        assert process.read_line() == "up"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 9


def test_stopping_the_sandbox_cuts_the_command_off_the_bus(warden: Warden) -> None:
    argv = [PYTHON, "-m", "integration.demo.tour", "--app"]
    popen = subprocess.Popen(
        [PYTHON, "-m", "broker.cli", "exec", *SHARES, "--", *argv],
        env=warden_env(warden),
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    process = Process(popen, None)
    try:
        name = process.read_line()
        (sandbox,) = warden.list_sandboxes()
        assert list(map(tuple, sandbox["connections"])) == [("session", name)]
        assert warden.cli("stop", sandbox["id"]).ok
        with RawClient.connect(warden.bus.address) as host:
            wait_for(lambda: name not in host.list_names())
    finally:
        process.stop()


def test_a_command_that_is_not_there_makes_no_sandbox(warden: Warden) -> None:
    outcome = warden.cli("exec", "--", "/nonexistent")
    assert (outcome.code, outcome.err) == (2, "buswarden: no such command: /nonexistent\n")
    next_one = warden.add_server()
    assert next_one.id == "c0"
