"""The tests that xdg-dbus-proxy brings along, run on `buswarden proxy` in its place.

They come from Debian sid with the libraries that they are built for, and start a dbus-daemon of their own.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from integration.harness.processes import PROJECT, make_env
from integration.harness.proxies import OURS, PROGRAMS

FETCHED: Final = PROJECT / ".cache" / "proxy-suite"
ROOT: Final = FETCHED / "root"
CASES: Final = ("/basics", "/call", "/own", "/receive", "/reply")


@pytest.fixture(scope="module")
def suite() -> tuple[str, ...]:
    """Return the command of the test program."""
    if not (FETCHED / "complete").exists():
        pytest.skip("this machine has not got the tests of Debian sid: make proxy-suite")
    (program,) = ROOT.rglob("test-proxy")
    (libraries,) = ROOT.glob("usr/lib/*-linux-gnu*")
    (loader,) = libraries.glob("ld-linux*.so.?")
    return str(loader), "--library-path", str(libraries), str(program)


def run(argv: Sequence[str], proxy: Path) -> tuple[int, str]:
    """Run it with that proxy; return its exit code and output. What it leaves behind is ended."""
    said = proxy.with_name("output")
    with (
        said.open("wb") as output,
        subprocess.Popen(
            argv,
            env=make_env({"DBUS_PROXY": str(proxy)}),
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            code = process.wait(60)
        finally:
            # A test that fails aborts, and leaves its bus and its proxy.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return code, said.read_text(errors="replace")


@pytest.fixture
def proxy(folder: Path) -> Path:
    path = folder / "proxy"
    path.write_text(f'#!/bin/sh\nexec {" ".join(PROGRAMS[OURS])} "$@"\n')
    path.chmod(0o700)
    return path


def test_program_p2_all_cases_of_the_suite_are_known(suite: Sequence[str], proxy: Path) -> None:
    code, output = run([*suite, "-l"], proxy)
    listed = [line.removeprefix("# ") for line in output.splitlines() if line.startswith("# /")]
    assert (code, tuple(listed)) == (0, CASES)


@pytest.mark.parametrize("case", CASES)
def test_program_p2_the_suite_of_xdg_dbus_proxy_passes(
    suite: Sequence[str], proxy: Path, case: str
) -> None:
    code, output = run([*suite, "--tap", "-p", case], proxy)
    assert code == 0, output
    assert f"ok 1 {case}" in output
