"""Start a command under bubblewrap by a plan, forward signals, and return the exit status.

Nothing of the sandbox outlives this process. The sandbox gets no descriptors of this process but
the standard ones. The functions block, so call them outside an event loop.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final

from broker.launcher import stage
from broker.launcher.host import find_bubblewrap
from broker.launcher.plan import Plan
from broker.launcher.seccomp import keyctl_number, make_filter

FORWARDED: Final = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)
STAGE: Final = stage.__file__
_MAX_INFO: Final = 65536  # bytes; a document has about 200
_MAX_SAID: Final = 500  # characters of a message
# Errors of bubblewrap or the kernel, each with a remedy.
_ADVICE: Final = (
    ("new namespace", "allow user namespaces: user.max_user_namespaces, AppArmor, container"),
    ("mount namespace", "allow user namespaces: user.max_user_namespaces, AppArmor, container"),
    ("uid map", "allow user namespaces: user.max_user_namespaces, AppArmor, container"),
    ("disable-userns", "install bubblewrap without the setuid bit"),
    ("Unknown option", "install bubblewrap 0.8 or later"),
    ("showing ", "no overlay works on that file system: leave the folder out, or use --bind"),
)


class NotStartedError(Exception):
    """The sandbox could not be set up. The text gives the reason in one line.

    The command has not run.
    """


def run_sandbox(plan: Plan) -> int:
    """Run a sandbox to its end and return the exit status as a shell reports statuses.

    Raises NotStartedError and ConfigError.
    """
    with contextlib.ExitStack() as stack:
        info_read, info_write = _pipe(stack)
        said_read, said_write = _pipe(stack)
        stderr = os.dup(2)
        try:
            process = _start(plan, info_write, said_write, stderr)
        finally:
            for fd in (info_write, said_write, stderr):
                os.close(fd)
        with _signals_forwarded(process, info_read):
            status = process.wait()
        # Bubblewrap writes the command's exit code if the command has started. Otherwise bubblewrap
        # fails with status 1. Only bubblewrap and the stage before it have the pipe.
        said = _read_ready(said_read).decode(errors="replace").strip()
        if status == 1 and (said or not _has_exit_code(info_read)):
            raise NotStartedError(_explain(said))
    return status if status >= 0 else 128 - status


def _start(plan: Plan, info: int, said: int, stderr: int) -> "subprocess.Popen[bytes]":
    with tempfile.TemporaryFile() as order:
        order.write(_make_order(plan, info, stderr))
        order.seek(0)
        # The calling thread forks, because PR_SET_PDEATHSIG (--die-with-parent) fires when the
        # forking thread ends. A thread of a pool would end the sandbox when the thread idles out.
        # bubblewrap gets a process group of its own. Otherwise Ctrl-C would kill bubblewrap before
        # the command sees the signal.
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", STAGE, str(order.fileno())],
            env=plan.environ,
            stderr=said,
            pass_fds=(order.fileno(), info, stderr),
            process_group=0,
        )


def _make_order(plan: Plan, info: int, stderr: int) -> bytes:
    machine = os.uname().machine
    fds = ("--json-status-fd", str(stage.STATUS), "--seccomp", str(stage.FILTER))
    order = {
        "parent": os.getpid(),
        "bubblewrap": find_bubblewrap(),
        "staging": plan.staging,
        "parts": [(part.source, part.at, part.kind) for part in plan.parts],
        "before": (*fds, *plan.before),
        "after": plan.after,
        "scope": plan.scope,
        "cgroup": plan.cgroup,
        "keyctl": keyctl_number(machine),
        "filter": make_filter(machine).hex(),
        "status": info,
        "stderr": stderr,
    }
    return json.dumps(order).encode()


def _explain(said: str) -> str:
    """Return the last line of bubblewrap's errors, with a remedy if one is known."""
    lines = [line.removeprefix("bwrap: ") for line in said.splitlines() if line.strip()]
    if not lines:
        return "bubblewrap ended without an error message"
    text = lines[-1][:_MAX_SAID]
    advice = next((advice for key, advice in _ADVICE if key in text), "")
    return f"{text} ({advice})" if advice else text


@contextlib.contextmanager
def _signals_forwarded(process: "subprocess.Popen[bytes]", info_fd: int) -> Iterator[None]:
    def forward(number: int, _frame: FrameType | None) -> None:
        command = _command_of(init)
        with contextlib.suppress(ProcessLookupError):
            if command is not None:
                os.kill(command, number)
            elif number != signal.SIGWINCH:
                # The command has not started, or has ended. Then something holds up the sandbox's
                # first process.
                process.kill()

    init: int | None = None
    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        init = _read_init(info_fd)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read_init(info_fd: int) -> int | None:
    """Return the pid, outside, of the sandbox's first process, or None if bubblewrap failed."""
    text = b""
    # Each line is a document. Reading to the end of the file would rely on every process inside to
    # close its copy of the descriptor.
    while (data := os.read(info_fd, 1)) and len(text) < _MAX_INFO:
        text += data
        if data == b"\n":
            return _find_number(text, "child-pid")
    return None


def _has_exit_code(info_fd: int) -> bool:
    lines = _read_ready(info_fd).splitlines()
    return any(_find_number(line, "exit-code") is not None for line in lines)


def _read_ready(fd: int) -> bytes:
    """Return the bytes that are ready in a pipe."""
    os.set_blocking(fd, False)
    try:
        return os.read(fd, _MAX_INFO)
    except BlockingIOError:
        return b""


def _find_number(line: bytes, key: str) -> int | None:
    try:
        return int(json.loads(line)[key])
    except (ValueError, KeyError, TypeError):
        return None


def _command_of(init: int | None) -> int | None:
    """Return the pid of the command if the command lives.

    The command is the first child of `init`. Orphans that `init` adopts are listed after the first
    child.
    """
    if init is None:
        return None
    try:
        children = Path(f"/proc/{init}/task/{init}/children").read_text(encoding="ascii").split()
        if not children:
            return None
        fields = Path(f"/proc/{children[0]}/stat").read_text(errors="replace").rpartition(")")[2]
    except OSError:
        return None
    return int(children[0]) if fields.split()[0] not in "ZX" else None


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """Make a pipe whose read end is closed together with the stack."""
    read, write = os.pipe()
    # Closing the read end earlier would kill bubblewrap with SIGPIPE at the next write.
    stack.callback(os.close, read)
    return read, write
