"""`autolaunch:` addresses: ask dbus-launch for the bus of the X11 display.

dbus-launch prints the address of the bus, and starts a bus if the display has none.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Final

from broker.posix.files import read_small
from broker.wire.errors import ConfigError

MACHINE_IDS: Final = ("/var/lib/dbus/machine-id", "/etc/machine-id")
# The start of a bus takes a fraction of a second. A display that does not answer must not block the
# proxy for ever.
LAUNCH_SECONDS: Final = 20.0
_MACHINE_ID: Final = re.compile(rb"([0-9A-Fa-f]{32})\n?")
_MAX_MACHINE_ID: Final = 64  # bytes
_INSTEAD: Final = "or give the address of the bus in place of autolaunch:"


def launch(
    environ: Mapping[str, str],
    *,
    machine_ids: Sequence[str] = MACHINE_IDS,
    seconds: float = LAUNCH_SECONDS,
) -> str:
    """Return the address of the display's bus. Raises ConfigError."""
    # The import is slow, and only an autolaunch: address needs the module.
    import subprocess  # noqa: PLC0415

    if not environ.get("DISPLAY"):
        raise ConfigError(f"autolaunch: there is no DISPLAY: set DISPLAY, {_INSTEAD}")
    machine_id = find_machine_id(machine_ids)
    argv = ["dbus-launch", f"--autolaunch={machine_id}", "--binary-syntax", "--close-stderr"]
    try:
        done = subprocess.run(
            argv,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        text = f"autolaunch: no answer from dbus-launch after {seconds:g} seconds"
        raise ConfigError(f"{text}: check DISPLAY, {_INSTEAD}") from exc
    except FileNotFoundError as exc:
        raise ConfigError(
            f"autolaunch: there is no program dbus-launch: install dbus-launch, {_INSTEAD}"
        ) from exc
    except OSError as exc:
        raise ConfigError(f"autolaunch: dbus-launch cannot be run: {exc.strerror}") from exc
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        text = f"autolaunch: dbus-launch ended with code {done.returncode}"
        raise ConfigError(f"{text}: {said[0][:200]!r}" if said else text)
    return parse_answer(done.stdout)


def parse_answer(output: bytes) -> str:
    """Return the address in dbus-launch's binary syntax. Raises ConfigError."""
    # Behind the address are the process of the bus and a window, which the proxy does not need.
    address, nul, _ = output.partition(b"\0")
    if not nul or not address or not address.isascii():
        raise ConfigError(f"autolaunch: dbus-launch gave no address: {output[:80]!r}")
    return address.decode()


def find_machine_id(paths: Sequence[str] = MACHINE_IDS) -> str:
    """Return the machine's id. Raises ConfigError."""
    for path in paths:
        try:
            found = _MACHINE_ID.fullmatch(read_small(os.fsencode(path), _MAX_MACHINE_ID))
        except OSError:
            continue
        if found:
            return found[1].decode().lower()
    raise ConfigError(f"autolaunch: no machine id in {' or '.join(paths)}: run dbus-uuidgen")
