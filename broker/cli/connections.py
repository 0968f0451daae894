"""The commands about snaps and connections: connect, disconnect, connections, snaps."""

import tomllib
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from broker.cli.client import ConnectionChange, ServiceClient, ask
from broker.cli.options import JSON, Settings
from broker.cli.output import print_json, print_line, print_table
from broker.wire.errors import ConfigError

FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
MAX_FILE: Final = 32 * 1024 * 1024  # bytes


def _connection_command(name: str, change: ConnectionChange, text: str) -> click.Command:
    """Return the command `connect` or `disconnect`."""

    @click.command(name, help=text)
    @click.argument("plug", metavar="SNAP:PLUG")
    @click.argument("slot", metavar="SNAP:SLOT")
    @click.pass_obj
    def command(settings: Settings, *, plug: str, slot: str) -> None:
        for line in ask(
            settings, partial(ServiceClient.change_connection, change=change, plug=plug, slot=slot)
        ):
            print_line(line)

    return command


connect_command: Final = _connection_command(
    "connect",
    "Connect",
    "Connect a plug to a slot, and print the apps whose rules changed.\n\n"
    "The new rules are in force when the command returns.",
)
disconnect_command: Final = _connection_command(
    "disconnect",
    "Disconnect",
    "Disconnect a plug from a slot, and print the apps whose rules changed.\n\n"
    "The old rules are out of force when the command returns.",
)


@click.command("connections")
@JSON
@click.pass_obj
def connections_command(settings: Settings, *, as_json: bool) -> None:
    """List the connections."""
    rows = ask(settings, ServiceClient.connections)
    if as_json:
        keys = ("plug", "slot", "interface")
        print_json([dict(zip(keys, row, strict=True)) for row in rows])
    else:
        print_table(("PLUG", "SLOT", "INTERFACE"), rows)


@click.group("snaps", invoke_without_command=True)
@JSON
@click.pass_context
def snaps_command(ctx: click.Context, *, as_json: bool) -> None:
    """List the snaps, or `load` other snaps from a file."""
    if ctx.invoked_subcommand is not None:
        return
    world = ask(ctx.obj, ServiceClient.snaps)
    if as_json:
        print_json(world)
        return
    print_table(
        ("SNAP", "APPS", "PLUGS", "SLOTS"),
        [
            (
                snap["name"],
                " ".join(snap.get("apps", ())),
                " ".join(sorted(snap.get("plugs", {}))),
                " ".join(sorted(snap.get("slots", {}))) if not snap.get("system") else "(system)",
            )
            for snap in world["snaps"]
        ],
    )


@snaps_command.command("load")
@click.argument("file", type=FILE)
@click.pass_obj
def load_command(settings: Settings, *, file: Path) -> None:
    """Replace all snaps by those of FILE (TOML or JSON).

    A connection is kept if plug and slot still exist and have the same interface.
    """
    text = msgspec.json.encode(read_data(file)).decode()
    ask(settings, partial(ServiceClient.load_snaps, snaps=text))


def read_data(file: Path) -> Any:
    """Return the content of a TOML or JSON file. Raises ConfigError."""
    text = read_text(file)
    try:
        if file.suffix == ".toml":
            return tomllib.loads(text)
        return msgspec.json.decode(text)
    except (tomllib.TOMLDecodeError, msgspec.MsgspecError) as exc:
        raise ConfigError(f"{file}: {exc}") from exc
    except RecursionError as exc:
        raise ConfigError(f"{file}: nested too deeply") from exc


def read_text(file: Path) -> str:
    """Return the text of a file. Raises ConfigError."""
    try:
        with file.open("rb") as opened:  # perhaps a pipe, as of <(command) in a shell
            data = opened.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise ConfigError(f"{file}: more than {MAX_FILE} bytes")
        return data.decode()
    except OSError as exc:
        raise ConfigError(f"{file}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{file}: not UTF-8 at byte {exc.start}") from exc
