"""The gate process: `python -m broker.gate --control PATH [--ready-fd N]`."""

import argparse
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from broker.gate.loop import READABLE, Loop
from broker.gate.server import Gate

EXIT_OK: Final = 0
EXIT_REFUSED: Final = 1
# Bytes. Blocks up to this size are used again; the largest message that is usual is 1 MiB.
LARGEST_KEPT: Final = 4 * 1024 * 1024
# Of <malloc.h>.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
LOGGER: Final = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to end. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="buswarden-gate", allow_abbrev=False)
    parser.add_argument("--control", required=True, metavar="PATH", help="listen here")
    parser.add_argument(
        "--ready-fd", type=int, metavar="FD", help="write a byte here when listening"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=os.environ.get("BUSWARDEN_LOG", "INFO").upper(),
        format="%(levelname)s gate %(message)s",
    )
    _raise_descriptor_limit()
    _keep_freed_memory()
    try:
        listening = _listen(args.control)
    except OSError as exc:
        sys.stderr.write(f"buswarden: cannot listen on {args.control}: {exc.strerror}\n")
        return EXIT_REFUSED
    with listening:
        _serve(listening, args.ready_fd)
    Path(args.control).unlink(missing_ok=True)
    return EXIT_OK


def _serve(listening: socket.socket, ready_fd: int | None) -> None:
    loop = Loop()
    gate = Gate(loop)
    gate.serve(listening)
    wake, wake_end = socket.socketpair()
    wake.setblocking(False)
    wake_end.setblocking(False)
    loop.add(wake.fileno(), READABLE, lambda _events: loop.stop())
    signal.set_wakeup_fd(wake_end.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    if ready_fd is not None:
        os.write(ready_fd, b"x")
        os.close(ready_fd)
    # What exists now stays for good; without this every full collection would walk over all of it.
    gc.collect()
    gc.freeze()
    try:
        loop.run()
    finally:
        gate.close()
        signal.set_wakeup_fd(-1)
        wake.close()
        wake_end.close()
        loop.close()


def _listen(path: str) -> socket.socket:
    """Bind a socket that only its owner can reach, in place of one that nobody serves any more."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        if _is_stale(path):
            Path(path).unlink()
        sock.bind(path)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(before)
    sock.listen(8)
    return sock


def _is_stale(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _raise_descriptor_limit() -> None:
    """Two descriptors a connection and one a socket: the usual soft limit of 1024 is soon reached."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _keep_freed_memory() -> None:
    """Have malloc use freed blocks of messages again: glibc maps and clears new pages for large ones."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * LARGEST_KEPT)


if __name__ == "__main__":
    sys.exit(main())
