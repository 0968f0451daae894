"""Processes of the tests: started, waited for until they are ready, and ended by their own id."""

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

PYTHON: Final = sys.executable
PROJECT: Final = Path(__file__).resolve().parents[2]
START_TIMEOUT: Final = 20.0  # seconds, from exec to the line that says it is ready
STOP_TIMEOUT: Final = 10.0  # seconds, from SIGTERM to SIGKILL


class Process:
    """A child whose standard output is read line by line."""

    def __init__(self, popen: subprocess.Popen[bytes], log: Path | None) -> None:
        self._popen = popen
        self._log = log
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        return self._popen.poll()

    @property
    def log(self) -> str:
        """What it said on standard error, if that went to a file."""
        return self._log.read_text(errors="replace") if self._log else ""

    def read_line(self, timeout: float = START_TIMEOUT) -> str:
        """Return the next line of its output, without the newline. Raises TimeoutError, EOFError."""
        assert self._popen.stdout is not None
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._popen.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"no line from {self._popen.args!r}: {self.log}")
                data = os.read(self._popen.stdout.fileno(), 4096)
                if not data:
                    raise EOFError(f"{self._popen.args!r} ended: {self.log}")
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def wait_line(self, prefix: str, timeout: float = START_TIMEOUT) -> str:
        """Read lines until one begins with `prefix`, and return it."""
        deadline = time.monotonic() + timeout
        while True:
            line = self.read_line(max(0.0, deadline - time.monotonic()))
            if line.startswith(prefix):
                return line

    def send_line(self, text: str) -> None:
        """Write a line to its standard input."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(text.encode() + b"\n")
        self._popen.stdin.flush()

    def send_signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self, timeout: float = STOP_TIMEOUT) -> int:
        """Wait for its end, and return the exit code."""
        return self._popen.wait(timeout)

    def stop(self) -> int:
        """End it, gently first, and return the exit code. Fine to call again."""
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)
            try:
                self._popen.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._popen.kill()
        code = self._popen.wait(STOP_TIMEOUT)
        for stream in (self._popen.stdin, self._popen.stdout):
            if stream is not None:
                stream.close()
        return code


@contextmanager
def running(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[Process]:
    """Run a program for as long as the block, its standard error into the file `log`."""
    with (log or Path(os.devnull)).open("ab") as stderr:
        popen = subprocess.Popen(
            argv,
            env=make_env(env),
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            pass_fds=pass_fds,
        )
    process = Process(popen, log)
    try:
        yield process
    finally:
        process.stop()


def make_env(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment that knows of no bus and no runtime directory but what `more` says."""
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("DBUS_", "XDG_", "BUSWARDEN_"))
    }
    return env | {"LC_ALL": "C.UTF-8"} | dict(more or {})


def is_running(pid: int) -> bool:
    """Return whether the process exists and is more than a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_gone(pid: int, timeout: float = STOP_TIMEOUT) -> bool:
    """Wait until the process is gone; return False if it is still there after `timeout`."""
    return wait_until(lambda: not is_running(pid), timeout)


def wait_until(condition: Callable[[], bool], timeout: float = STOP_TIMEOUT) -> bool:
    """Poll until the condition holds; return whether it did."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
