"""The `buswarden` command: its groups, and what becomes of errors.

Exit codes: 0 it is done, 1 it was refused or went wrong, 2 it was asked for in the wrong way. Each command
is a module of its own that is imported when it is used, so that none pays for another's libraries.
"""

import gc
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Final

EXIT_OK: Final = 0
EXIT_REFUSED: Final = 1
EXIT_USAGE: Final = 2
# What a shell says of a command that Ctrl-C ended.
EXIT_INTERRUPTED: Final = 130

# Command -> (module, line in the overview). The function has the name of the command, with _command, and _ for -.
COMMANDS: Final = {
    "run": ("broker.cli.run", "Run the broker on one or more buses."),
    "exec": ("broker.cli.exec", "Run a command with a bus socket of its own."),
    "add": ("broker.cli.sandboxes", "Add a sandbox and print its bus socket."),
    "list": ("broker.cli.sandboxes", "List the sandboxes."),
    "show": ("broker.cli.sandboxes", "Show one sandbox."),
    "access": ("broker.cli.sandboxes", "Show or change what a sandbox may do."),
    "stop": ("broker.cli.sandboxes", "End a sandbox."),
    "who": ("broker.cli.sandboxes", "Say which sandbox is behind a connection."),
    "snaps": ("broker.cli.connections", "List the snaps, or load others."),
    "connect": ("broker.cli.connections", "Connect a plug to a slot."),
    "disconnect": ("broker.cli.connections", "Undo a connection."),
    "connections": ("broker.cli.connections", "List the connections."),
    "explain": ("broker.cli.explain", "Say why something is allowed or denied."),
    "policy": ("broker.cli.policy", "Check, show, compare, import and compile policy."),
    "status": ("broker.cli.status", "Show how the broker is."),
    "upgrade": ("broker.cli.upgrade", "Replace the gate by a new one; no connection is closed."),
    "install-units": ("broker.cli.units", "Write the units for systemd."),
    "proxy": ("broker.cli.proxy", "Be an xdg-dbus-proxy, without a broker."),
}

# By this name the program is the proxy alone: whoever runs that one can be given ours.
PROXY_NAME: Final = "xdg-dbus-proxy"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    # A launcher of apps waits for the proxy: it pays for no other command, nor for click.
    if argv is None:
        argv = sys.argv[1:]
        if PurePath(sys.argv[0]).name == PROXY_NAME:
            return _run_proxy(argv, PROXY_NAME)
    if argv[:1] == ["proxy"]:
        return _run_proxy(argv[1:], "buswarden proxy")
    from broker.cli.commands import run_command  # noqa: PLC0415

    return run_command(argv)


def _run_proxy(argv: Sequence[str], program: str) -> int:
    # What is made while modules are imported is no garbage; the proxy turns it on again.
    gc.disable()
    try:
        from broker.proxy.service import run_proxy  # noqa: PLC0415

        return run_proxy(argv, program=program)
    finally:
        gc.enable()
