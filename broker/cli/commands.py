"""The group of all commands. The module of a command is imported when the command is named."""

import importlib
from collections.abc import Sequence

import click

from broker.cli.main import COMMANDS, EXIT_INTERRUPTED, EXIT_OK, EXIT_REFUSED, EXIT_USAGE
from broker.cli.options import Settings
from broker.cli.output import print_error
from broker.wire.errors import BrokerError, ConfigError


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
