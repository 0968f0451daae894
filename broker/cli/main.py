"""The `buswarden` command: its groups, and what becomes of errors.

Exit codes: 0 it is done, 1 it was refused or went wrong, 2 it was asked for in the wrong way. Each command
is a module of its own that is imported when it is used, so that none pays for another's libraries.
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
# What a shell says of a command that Ctrl-C ended.
EXIT_INTERRUPTED: Final = 130

# Command -> (module, line in the overview). The function has the name of the command, with _command.
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
}


class Commands(click.Group):
    """A group that imports a command when it is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command = getattr(module, f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=Commands)
@click.option(
    "--address",
    metavar="ADDRESS",
    help="D-Bus address of the bus that the broker is on. Also: $BUSWARDEN_BUS_ADDRESS.",
)
@click.version_option(package_name="buswarden", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context, address: str | None) -> None:
    """Give every sandboxed app a D-Bus socket of its own, and decide what it may do there."""
    ctx.obj = Settings(address=address)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    try:
        result = cli.main(argv, prog_name="buswarden", standalone_mode=False)
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
