"""The clients that we did not write: gdbus (GLib), busctl (sd-bus), dbus-send (libdbus)."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from integration.harness.processes import PROJECT, make_env


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a client program ended."""

    code: int
    out: str
    err: str

    @property
    def ok(self) -> bool:
        return self.code == 0


def run(*argv: str, timeout: float = 15.0, env: dict[str, str] | None = None) -> Outcome:
    """Run a program to its end. Raises subprocess.TimeoutExpired, having killed it."""
    done = subprocess.run(
        argv,
        env=make_env(env),
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(code=done.returncode, out=done.stdout, err=done.stderr)


def gdbus_call(
    address: str, destination: str, path: str, method: str, *args: str, timeout: float = 15.0
) -> Outcome:
    """Call `interface.Member` with gdbus; arguments in GVariant text."""
    argv = ["gdbus", "call", "--address", address, "--dest", destination, "--object-path", path]
    return run(*argv, "--method", method, "--", *args, timeout=timeout)


def busctl_call(
    address: str, destination: str, path: str, method: str, *args: str, timeout: float = 15.0
) -> Outcome:
    """Call `interface.Member` with busctl; arguments as busctl has them: signature, values."""
    interface, _, member = method.rpartition(".")
    argv = ["busctl", f"--address={address}", "call", "--", destination, path, interface, member]
    return run(*argv, *args, timeout=timeout)


def dbus_send(
    address: str, destination: str, path: str, method: str, *args: str, timeout: float = 15.0
) -> Outcome:
    """Call `interface.Member` with dbus-send; arguments as `string:x`."""
    argv = ["dbus-send", f"--bus={address}", "--print-reply", f"--dest={destination}"]
    return run(*argv, path, method, *args, timeout=timeout)


def gdbus_text(address: str, destination: str, path: str, method: str, text: str) -> Outcome:
    return gdbus_call(address, destination, path, method, repr(text))


def busctl_text(address: str, destination: str, path: str, method: str, text: str) -> Outcome:
    return busctl_call(address, destination, path, method, "s", text)


def dbus_send_text(address: str, destination: str, path: str, method: str, text: str) -> Outcome:
    return dbus_send(address, destination, path, method, f"string:{text}")


# A call with one string argument by each of the three libraries: for parametrised tests.
TEXT_CALLS: Final[dict[str, Callable[[str, str, str, str, str], Outcome]]] = {
    "gdbus": gdbus_text,
    "busctl": busctl_text,
    "dbus-send": dbus_send_text,
}
