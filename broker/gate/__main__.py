"""The gate process: `python -m broker.gate --control PATH [--ready-fd N] [--take-over N]`."""

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from broker.gate.dumps import HandoverError, HandoverHeader
from broker.gate.handover.channel import Channel, Failed
from broker.gate.handover.take_over import LONGEST_WAIT, offer, take_over
from broker.gate.io.loop import READABLE, Loop
from broker.gate.recorder import trace_into
from broker.gate.server import Gate
from broker.gate.systemd_service import SystemdService
from broker.posix.descriptors import raise_descriptor_limit
from broker.posix.files import UnsafeFileError, open_folder
from broker.posix.sockets import bind_with_umask

EXIT_OK: Final = 0
EXIT_REFUSED: Final = 1
# Bytes. malloc reuses blocks up to this size. The largest usual message has 1 MiB.
LARGEST_KEPT: Final = 4 * 1024 * 1024
# Constants of <malloc.h>.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
LOGGER: Final = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM, SIGINT or `Shutdown`. Return the exit code."""
    parser = argparse.ArgumentParser(prog="buswarden-gate", allow_abbrev=False)
    parser.add_argument("--control", required=True, metavar="PATH", help="listen at this path")
    parser.add_argument(
        "--ready-fd", type=int, metavar="FD", help="write a byte to this descriptor when listening"
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write the last message headers to this file"
    )
    parser.add_argument(
        "--take-over", type=int, metavar="FD", help="take over from the gate behind this socket"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=os.environ.get("BUSWARDEN_LOG", "INFO").upper(),
        format="%(levelname)s gate %(message)s",
    )
    raise_descriptor_limit()
    _keep_freed_memory()
    faulthandler.enable()  # prints a traceback if the process dies of a defect in C code
    loop = Loop()
    service = SystemdService()
    gate = Gate(loop, service, Path(args.control).parent)
    if args.take_over is not None:
        header = _take_over(gate, args.take_over, args.ready_fd)
    else:
        header = None
        try:
            gate.serve(service.control() or _listen(args.control))
        except OSError as exc:
            sys.stderr.write(f"buswarden: cannot listen on {args.control}: {_reason(exc)}\n")
            return EXIT_REFUSED

    def begin() -> None:
        if args.trace is not None:  # only now, because the old gate wrote there until now
            if service.is_there and header is None:
                _set_aside(args.trace)
            _trace(args.trace)
        if header is not None:
            gate.resume(header.serial)
        else:
            _say_ready(args.ready_fd)
            gc.collect()
        service.serves(loop)
        # The objects that exist now stay. A frozen object is not visited by full collections.
        gc.freeze()
        gc.enable()

    _serve(loop, gate, begin)
    if not service.is_there:
        Path(args.control).unlink(missing_ok=True)
    elif args.trace is not None:
        args.trace.unlink(missing_ok=True)  # A trace that stays would look like that of a crash.
    return EXIT_OK


def _take_over(gate: Gate, fd: int, ready_fd: int | None) -> HandoverHeader:
    """Take over from the gate at the other end of the socket.

    After any failure this process exits without touching anything.
    """
    channel = Channel(fd, LONGEST_WAIT)
    try:
        try:
            offer(channel, os.getpid())
            gc.collect()
            gc.disable()  # The state that is loaded next is no garbage.
        finally:
            _say_ready(ready_fd)  # also after a failure, which the channel reports
        header = take_over(channel, gate)
        channel.close()
    except HandoverError as exc:
        LOGGER.warning("take-over: %s", exc)
        with contextlib.suppress(HandoverError):
            channel.say(Failed(str(exc)))
        os._exit(EXIT_REFUSED)
    except Exception:
        LOGGER.exception("take-over")
        os._exit(EXIT_REFUSED)
    return header


def _say_ready(fd: int | None) -> None:
    if fd is not None:
        # If the supervisor has died, the next supervisor finds this gate by the control socket.
        with contextlib.suppress(BrokenPipeError):
            os.write(fd, b"x")
        os.close(fd)


def _serve(loop: Loop, gate: Gate, begin: Callable[[], None]) -> None:
    wake, wake_end = socket.socketpair()
    wake.setblocking(False)
    wake_end.setblocking(False)

    def woken(_events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            if set(wake.recv(4096)) & {signal.SIGTERM, signal.SIGINT}:
                loop.stop()

    loop.add(wake.fileno(), READABLE, woken)
    signal.set_wakeup_fd(wake_end.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    begin()
    try:
        loop.run()
        # An exception is a defect, and skips this call. As after any crash, the sockets then stay
        # for the next gate.
        gate.close()
    finally:
        signal.set_wakeup_fd(-1)
        wake.close()
        wake_end.close()
        loop.close()


def _trace(path: Path) -> None:
    """Record headers in the file `path`. After a failure the gate serves without a trace."""
    try:
        trace_into(path)
    except OSError as exc:
        LOGGER.warning("no trace in %s: %s", path, exc.strerror)


def _set_aside(path: Path) -> None:
    """Keep the trace of a gate that died, for the crash report of the supervisor."""
    with contextlib.suppress(OSError):
        path.rename(path.with_name(f"{path.name}.old"))


def _listen(path: str) -> socket.socket:
    """Listen at `path`, for the own user alone. A socket without a server is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with open_folder(Path(path).parent):
            if _is_stale(path):
                Path(path).unlink()
            bind_with_umask(sock, path, 0o177)
    except OSError:
        sock.close()
        raise
    sock.listen(8)
    return sock


def _reason(exc: OSError) -> str:
    where = f"{exc.filename}: " if isinstance(exc, UnsafeFileError) else ""
    return f"{where}{exc.strerror}"


def _is_stale(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _keep_freed_memory() -> None:
    """Make malloc reuse freed blocks of messages.

    By default glibc maps new pages for large blocks, which the kernel has to clear.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * LARGEST_KEPT)


if __name__ == "__main__":
    sys.exit(main())
