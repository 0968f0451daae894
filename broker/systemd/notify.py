"""Messages between a service and systemd (sd_notify(3), sd_listen_fds(3)). Standard library alone.

Without systemd no message is sent. Variables that systemd set in the environment are removed from
the environment, so that no child process takes the variables for its own.
"""

import array
import contextlib
import os
import re
import socket
import time
from collections.abc import Iterable, MutableMapping
from typing import Final

_FIRST: Final = 3  # SD_LISTEN_FDS_START
# The time for which a send waits for a manager that does not read. Then the message is dropped,
# because such a manager answers no questions about the service either.
SEND_TIMEOUT: Final = 0.25
# The descriptor names that systemd accepts. A colon separates two names.
_NAME: Final = re.compile(r"[!-9;-~]{1,255}")


class Notifier:
    """The sender of messages to the service manager."""

    def __init__(
        self, address: str = "", watchdog: float = 0.0, patience: float = SEND_TIMEOUT
    ) -> None:
        """Send to the socket at `address`. An empty address means no manager."""
        self._patience: Final = patience
        self._address: Final = "\0" + address[1:] if address.startswith("@") else address
        # Seconds within which the next `alive` is due; 0: the manager has no watchdog.
        self.watchdog: Final = watchdog
        self._sock: socket.socket | None = None

    @property
    def is_wanted(self) -> bool:
        """Return whether a service manager listens."""
        return bool(self._address)

    def ready(self, status: str = "") -> None:
        """Report that the service accepts requests."""
        self._send("READY=1", *([f"STATUS={_line(status)}"] if status else []))

    def status(self, text: str) -> None:
        """Report the current activity, in a line."""
        self._send(f"STATUS={_line(text)}")

    def reloading(self) -> None:
        """Report that a reload began. The next `ready` reports the end of the reload."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}")

    def stopping(self) -> None:
        """Report that the service is ending."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Report to the watchdog that the service works."""
        self._send("WATCHDOG=1")

    def main_process(self, pid: int) -> None:
        """Name the main process of the service from now on."""
        self._send(f"MAINPID={pid}")

    def store(self, name: str, fd: int) -> None:
        """Store a descriptor for the next process of the service, even after its peer closed."""
        assert _NAME.fullmatch(name), name
        self._send("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])

    def remove(self, name: str) -> None:
        """Remove the descriptors stored under a name."""
        assert _NAME.fullmatch(name), name
        self._send("FDSTOREREMOVE=1", f"FDNAME={name}")

    def environment(self) -> dict[str, str]:
        """Return the variables with which the next main process can reach the same manager."""
        if not self._address:
            return {}
        found = {"NOTIFY_SOCKET": self._address.replace("\0", "@", 1)}
        if self.watchdog:
            found["WATCHDOG_USEC"] = str(round(self.watchdog * 1e6))
        return found

    def close(self) -> None:
        """Close the socket."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _send(self, *lines: str, fds: Iterable[int] = ()) -> None:
        if not self._address:
            return
        if self._sock is None:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._sock.settimeout(self._patience)
        with contextlib.suppress(OSError):  # no listener, or a listener that does not read
            passed = array.array("i", fds)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)] if passed else []
            self._sock.sendmsg(["\n".join(lines).encode()], rights, 0, self._address)


def take_notifier(
    environ: MutableMapping[str, str] = os.environ, *, patience: float = SEND_TIMEOUT
) -> Notifier:
    """Return the notifier that the environment describes, and remove its variables."""
    address = environ.pop("NOTIFY_SOCKET", "")
    pid, microseconds = environ.pop("WATCHDOG_PID", ""), environ.pop("WATCHDOG_USEC", "")
    if not address.startswith(("/", "@")):
        return Notifier()
    is_for_us = microseconds.isdigit() and pid in ("", str(os.getpid()))
    return Notifier(address, int(microseconds) / 1e6 if is_for_us else 0.0, patience)


def take_descriptors(environ: MutableMapping[str, str] = os.environ) -> list[tuple[str, int]]:
    """Return each descriptor that systemd passed, with its name. The caller owns them."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    fds = range(_FIRST, _FIRST + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    names += [""] * (len(fds) - len(names))
    return list(zip(names, fds, strict=False))


def _line(text: str) -> str:
    return " ".join(text.split())
