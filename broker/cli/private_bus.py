"""A private dbus-daemon, for a session that has no bus.

An orderly end of the broker ends the private bus. If the broker is killed, the bus and the gate
live on, and apps keep their connections. The next broker takes over both.
"""

import contextlib
import fcntl
import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker.posix.files import check_entries, open_file, open_folder
from broker.posix.sockets import peer_credentials
from broker.supervisor.bus_connections import StartError
from broker.wire.address import make_unix_address

SOCKET_NAME: Final = "private-bus"
START_TIMEOUT: Final = 10_000  # milliseconds, until dbus-daemon has printed the address
END_TIMEOUT: Final = 5_000  # milliseconds, from SIGTERM to SIGKILL


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateBus:
    """A running private bus."""

    address: str
    pid: int
    adopted: bool


@contextmanager
def private_bus(runtime_dir: Path) -> Iterator[PrivateBus]:
    """Start a private bus, or adopt that of an earlier broker. Raises StartError.

    The bus ends with the block.
    """
    path = runtime_dir / SOCKET_NAME
    with _held(runtime_dir / f"{SOCKET_NAME}.lock"):
        yield from _keep(path)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    # The broker takes the lock on the runtime folder only later. Without the lock here, a second
    # broker would adopt the bus of the first broker, be refused, and end the bus on the way out.
    try:
        with open_folder(path.parent, make=0o700, ours=True):
            lock = open_file(path, os.O_RDWR | os.O_CREAT)
        check_entries(path.parent)
    except OSError as exc:
        raise StartError(f"{exc.filename or path}: {exc.strerror}") from exc
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"a broker with a private bus is running in {path.parent}") from None
        yield
    finally:
        os.close(lock)


def _keep(path: Path) -> Iterator[PrivateBus]:
    pid = _find_pid(path)
    adopted = pid is not None
    if pid is None:
        pid = _start(path)
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        raise StartError(f"the private dbus-daemon at {path} ended") from None
    try:
        yield PrivateBus(address=make_unix_address(str(path)), pid=pid, adopted=adopted)
    finally:
        _end(handle)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        path.unlink(missing_ok=True)


def _find_pid(path: Path) -> int | None:
    """Return the pid of the listening process at `path`, if the uid is that of the broker."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return None
        peer = peer_credentials(sock)
    return peer.pid if peer.uid == os.getuid() else None


def _start(path: Path) -> int:
    path.unlink(missing_ok=True)
    address = make_unix_address(str(path))
    read_end, write_end = os.pipe()
    argv = ["dbus-daemon", "--session", "--nofork", "--nopidfile", "--nosyslog"]
    try:
        process = subprocess.Popen(
            [*argv, f"--address={address}", f"--print-address={write_end}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(write_end,),
            # Ctrl-C is for the broker, which ends the bus last.
            start_new_session=True,
        )
    except OSError as exc:
        os.close(read_end)
        raise StartError(f"no bus, and cannot start dbus-daemon: {exc.strerror}") from exc
    finally:
        os.close(write_end)
    poll = select.poll()
    poll.register(read_end, select.POLLIN)
    try:
        started = bool(poll.poll(START_TIMEOUT) and os.read(read_end, 1))
    finally:
        os.close(read_end)
    if not started:
        process.kill()
        process.wait()
        raise StartError(f"dbus-daemon did not start on {path}")
    # From here on a started and an adopted bus are the same: a pid. A returncode keeps Popen from
    # waiting for the process.
    process.returncode = 0
    return process.pid


def _end(handle: int) -> None:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(handle, number)
            if poll.poll(END_TIMEOUT):
                return
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)
