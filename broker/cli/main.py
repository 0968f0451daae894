"""Entry point of the `buswarden` command: the list of commands and the exit codes.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage. Each command is a module that is imported
only when the command runs, so that no command waits for the libraries of another command.
"""

import gc
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Final

EXIT_OK: Final = 0
EXIT_REFUSED: Final = 1
EXIT_USAGE: Final = 2
# The exit code that a shell reports for a command that Ctrl-C ended.
EXIT_INTERRUPTED: Final = 130

# Command -> (module, line in the overview). The function is named after the command, with _ for -
# and _command at the end.
COMMANDS: Final = {
    "run": ("broker.cli.run", "Run the broker on one or more buses."),
    "exec": ("broker.cli.exec", "Run a command in a sandbox, with a private bus socket."),
    "add": ("broker.cli.sandboxes", "Add a sandbox and print the path of the bus socket."),
    "list": ("broker.cli.sandboxes", "List the sandboxes."),
    "show": ("broker.cli.sandboxes", "Show one sandbox."),
    "access": ("broker.cli.sandboxes", "Show or change the rules of a sandbox."),
    "stop": ("broker.cli.sandboxes", "End a sandbox."),
    "who": ("broker.cli.sandboxes", "Show the sandbox behind a connection."),
    "snaps": ("broker.cli.connections", "List the snaps, or load other snaps."),
    "connect": ("broker.cli.connections", "Connect a plug to a slot."),
    "disconnect": ("broker.cli.connections", "Disconnect a plug from a slot."),
    "connections": ("broker.cli.connections", "List the connections."),
    "explain": ("broker.cli.explain", "Explain why a message is allowed or denied."),
    "policy": ("broker.cli.policy", "Check, show, compare, import and compile policy."),
    "status": ("broker.cli.status", "Show the state of the broker."),
    "upgrade": ("broker.cli.upgrade", "Replace the gate without closing a connection."),
    "install-units": ("broker.cli.units", "Write the units for systemd."),
    "proxy": ("broker.cli.proxy", "Run a replacement of xdg-dbus-proxy, without a broker."),
}

# Under this name the program is the proxy alone, and so can take the place of xdg-dbus-proxy.
PROXY_NAME: Final = "xdg-dbus-proxy"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    # A launcher of apps waits for the proxy. So the proxy starts without the other commands and
    # without click.
    if argv is None:
        argv = sys.argv[1:]
        if PurePath(sys.argv[0]).name == PROXY_NAME:
            return _run_proxy(argv, PROXY_NAME)
    if argv[:1] == ["proxy"]:
        return _run_proxy(argv[1:], "buswarden proxy")
    from broker.cli.commands import run_command  # noqa: PLC0415

    return run_command(argv)


def _run_proxy(argv: Sequence[str], program: str) -> int:
    # Imports make no garbage, so a collection meanwhile would be wasted time. The proxy turns
    # collection on again.
    gc.disable()
    try:
        from broker.proxy.service import run_proxy  # noqa: PLC0415

        return run_proxy(argv, program=program)
    finally:
        gc.enable()
