"""Entry point of the `buswarden` command.

The proxy runs at once, and all other commands through click.
"""

import gc
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Final

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
