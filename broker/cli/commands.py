"""The group of all commands, and the exit codes.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage. Each command is a module that is imported
only when the command runs, so that no command waits for the libraries of another command.
"""

import importlib
from collections.abc import Sequence
from typing import Final

import click

from broker.cli.options import Settings
from broker.cli.output import print_error
from broker.wire.errors import BrokerError, ConfigError

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


class Commands(click.Group):
    """A group that imports a command's module when the command is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=Commands)
@click.option(
    "--address",
    metavar="ADDRESS",
    help="D-Bus address of the broker's bus. Also: $BUSWARDEN_BUS_ADDRESS.",
)
@click.version_option(package_name="buswarden", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context, address: str | None) -> None:
    """Give every sandboxed app a private D-Bus socket, and filter the messages there."""
    ctx.obj = Settings(address=address)


def run_command(argv: Sequence[str]) -> int:
    """Run a command and return the exit code."""
    try:
        result = cli.main(list(argv), prog_name="buswarden", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as exc:
        exc.show()
        return EXIT_USAGE
    except click.ClickException as exc:
        print_error(exc.format_message())
        return exc.exit_code if isinstance(exc, click.UsageError) else EXIT_REFUSED
    except click.Abort:
        return EXIT_INTERRUPTED
    except ConfigError as exc:
        print_error(str(exc))
        return EXIT_USAGE
    except BrokerError as exc:
        print_error(str(exc))
        return EXIT_REFUSED
    return result if isinstance(result, int) else EXIT_OK
