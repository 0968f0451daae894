"""The words between a service and systemd (sd_notify(3), sd_listen_fds(3)). The standard library, and nothing of ours.

Without systemd there is nobody to tell, and all of it does nothing. What systemd gave in the environment is taken
out of it, so that no process of ours takes it for its own.
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
# Seconds that we wait for a manager that does not read. Then it is not told: it is asked by nobody either.
SEND_TIMEOUT: Final = 0.25
# What systemd takes for the name of a descriptor; a colon stands between two names.
_NAME: Final = re.compile(r"[!-9;-~]{1,255}")


class Notifier:
    """Tells the service manager how we are."""

    def __init__(
        self, address: str = "", watchdog: float = 0.0, patience: float = SEND_TIMEOUT
    ) -> None:
        """Tell whoever listens at that address; nobody, if it is empty."""
        self._patience: Final = patience
        self._address: Final = "\0" + address[1:] if address.startswith("@") else address
        # Seconds within which we have to say that we are alive; 0: nobody minds.
        self.watchdog: Final = watchdog
        self._sock: socket.socket | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether there is somebody to tell."""
        return bool(self._address)

    def ready(self, status: str = "") -> None:
        """We can be asked now."""
        self._send("READY=1", *([f"STATUS={_line(status)}"] if status else []))

    def status(self, text: str) -> None:
        """Say in a line what we are at."""
        self._send(f"STATUS={_line(text)}")

    def reloading(self) -> None:
        """We are not done with a reload until `ready` is said again."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}")

    def stopping(self) -> None:
        """We are ending."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """We are well."""
        self._send("WATCHDOG=1")

    def main_process(self, pid: int) -> None:
        """From now on this is the process that counts."""
        self._send(f"MAINPID={pid}")

    def store(self, name: str, fd: int) -> None:
        """Have a descriptor kept for whoever is started after us, also if its other end is closed meanwhile."""
        assert _NAME.fullmatch(name), name
        self._send("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])

    def remove(self, name: str) -> None:
        """Have what is kept under that name closed."""
        assert _NAME.fullmatch(name), name
        self._send("FDSTOREREMOVE=1", f"FDNAME={name}")

    def environment(self) -> dict[str, str]:
        """Return what has a process that is to be the main one after us tell the same manager."""
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
        with contextlib.suppress(OSError):  # nobody is there, or nobody reads
            passed = array.array("i", fds)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)] if passed else []
            self._sock.sendmsg(["\n".join(lines).encode()], rights, 0, self._address)


def take_notifier(
    environ: MutableMapping[str, str] = os.environ, *, patience: float = SEND_TIMEOUT
) -> Notifier:
    """Return the one that the environment speaks of."""
    address = environ.pop("NOTIFY_SOCKET", "")
    pid, microseconds = environ.pop("WATCHDOG_PID", ""), environ.pop("WATCHDOG_USEC", "")
    if not address.startswith(("/", "@")):
        return Notifier()
    is_for_us = microseconds.isdigit() and pid in ("", str(os.getpid()))
    return Notifier(address, int(microseconds) / 1e6 if is_for_us else 0.0, patience)


def take_descriptors(environ: MutableMapping[str, str] = os.environ) -> list[tuple[str, int]]:
    """Return, with its name, each descriptor that systemd passed. They are ours from here on."""
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
