"""Start a command under bubblewrap by a plan, pass signals on to it, and return its exit status.

Promises that the close-notification pipe given here is held open by the sandbox's own first process and
nobody else, so that the sandbox of the bus ends exactly when the one of the kernel does; and that neither
outlives the other, nor us, however any of them ends. Blocks: call it outside an event loop.
"""

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final

from broker.sandbox.plan import Host, Plan, find_buses
from broker.wire.errors import ConfigError

FORWARDED: Final = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)
_UNIX_SOCKETS: Final = Path("/proc/net/unix")
_MAX_INFO: Final = 65536  # bytes: it takes some 200
_ACCEPTS: Final = 0x10000  # __SO_ACCEPTCON in the flags column


class NotStartedError(Exception):
    """Bubblewrap could not set the sandbox up, and has said why: the command has not run."""


def find_bubblewrap() -> str:
    """Return its path. Raises ConfigError."""
    path = shutil.which("bwrap")
    if path is None:
        raise ConfigError("bubblewrap is not installed (no `bwrap` in PATH)")
    return path


def find_host(*, bus_addresses: Iterable[str], runtime_dirs: Iterable[str]) -> Host:
    """Look at what is there to be hidden."""
    paths, abstract = _listening()
    paths += find_buses(bus_addresses, os.environ).paths
    return Host(
        uid=os.getuid(),
        cwd=_cwd(),
        environ=dict(os.environ),
        sockets=tuple(sorted({real for path in paths if (real := _real_socket(path))})),
        abstract_sockets=tuple(abstract),
        runtime_dirs=tuple(str(Path(d).resolve()) for d in runtime_dirs if Path(d).is_dir()),
        resolv_conf=_resolv_conf(),
    )


def run_sandbox(plan: Plan, *, close_notify: int) -> int:
    """Run it to its end and return its exit status as a shell would give it.

    `close_notify` is the write end of the pipe; it is closed here once the sandbox holds it. Raises
    NotStartedError.
    """
    info_read, info_write = os.pipe()
    argv = [find_bubblewrap(), "--sync-fd", str(close_notify), "--json-status-fd", str(info_write)]
    try:
        # Started by this very thread, as PR_SET_PDEATHSIG (--die-with-parent) fires when the thread
        # that forked is gone: a thread of a pool would end the sandbox when it idles out. A process
        # group of its own keeps Ctrl-C from killing bubblewrap before the command has seen it.
        process = subprocess.Popen(
            [*argv, *plan.argv],
            env=plan.environ,
            pass_fds=(close_notify, info_write),
            process_group=0,
        )
    except OSError:
        os.close(info_read)
        raise
    finally:
        os.close(close_notify)
        os.close(info_write)
    try:
        with _signals_forwarded(process, info_read):
            status = process.wait()
        # It says how the command ended if there was one, and fails with 1 if not.
        if status == 1 and not _has_exit_code(info_read):
            raise NotStartedError
    finally:
        # Not earlier: it would be the end of bubblewrap to write to nobody.
        os.close(info_read)
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _signals_forwarded(process: subprocess.Popen[bytes], info_fd: int) -> Iterator[None]:
    def forward(number: int, _frame: FrameType | None) -> None:
        command = _command_of(init)
        with contextlib.suppress(ProcessLookupError):
            if command is not None:
                os.kill(command, number)
            elif number != signal.SIGWINCH:
                process.kill()  # nothing runs in it yet

    init: int | None = None
    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        init = _read_init(info_fd)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read_init(info_fd: int) -> int | None:
    """Return the pid, outside, of the sandbox's first process; None if bubblewrap failed."""
    text = b""
    # A document a line. Not to the end of the file, which would trust every process inside to close its copy.
    while (data := os.read(info_fd, 1)) and len(text) < _MAX_INFO:
        text += data
        if data == b"\n":
            return _find_number(text, "child-pid")
    return None


def _has_exit_code(info_fd: int) -> bool:
    os.set_blocking(info_fd, False)
    try:
        text = os.read(info_fd, _MAX_INFO)
    except BlockingIOError:
        return False
    return any(_find_number(line, "exit-code") is not None for line in text.splitlines())


def _find_number(line: bytes, key: str) -> int | None:
    try:
        return int(json.loads(line)[key])
    except (ValueError, KeyError, TypeError):
        return None


def _command_of(init: int | None) -> int | None:
    """Return the first child: the command. Orphans that init adopts come behind it."""
    if init is None:
        return None
    try:
        children = Path(f"/proc/{init}/task/{init}/children").read_text(encoding="ascii").split()
    except OSError:
        return None
    return int(children[0]) if children else None


def _cwd() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return "/"  # removed under us


def _listening() -> tuple[list[str], list[str]]:
    """Return paths and abstract names of the sockets that listen in this network namespace."""
    paths: list[str] = []
    abstract: list[str] = []
    # Bytes: a name is the binder's choice, and may even hold line ends. A line that does not parse is
    # at worst part of such a name.
    for line in _UNIX_SOCKETS.read_bytes().splitlines()[1:]:
        fields = line.split(None, 7)
        if len(fields) < 8 or not _is_listening(fields[3]):
            continue
        name = os.fsdecode(fields[7])
        if name.startswith("@"):
            abstract.append(name[1:])
        elif name.startswith("/"):
            paths.append(name)
    return paths, abstract


def _is_listening(flags: bytes) -> bool:
    try:
        return bool(int(flags, 16) & _ACCEPTS)
    except ValueError:
        return False


def _real_socket(path: str) -> str | None:
    try:
        real = Path(path).resolve(strict=True)
        is_socket = stat.S_ISSOCK(real.stat().st_mode)
    except (OSError, ValueError, RuntimeError):
        return None  # bound in another mount namespace, or removed since
    return str(real) if is_socket else None


def _resolv_conf() -> str | None:
    try:
        return str(Path("/etc/resolv.conf").resolve(strict=True))
    except (OSError, RuntimeError):
        return None
