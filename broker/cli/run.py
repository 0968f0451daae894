"""`buswarden run`: run the broker in the foreground, until SIGTERM or SIGINT."""

import logging
import os
from pathlib import Path

import click
import msgspec
import trio

from broker.cli.options import KeyValue
from broker.cli.output import print_line
from broker.cli.private_bus import private_bus
from broker.control_protocol.messages import BusSpec
from broker.daemon import serve
from broker.supervisor.config import Config, EngineName, load_config
from broker.wire.address import make_unix_address


@click.command("run")
@click.option(
    "--bus",
    "buses",
    metavar="NAME=ADDRESS",
    multiple=True,
    type=KeyValue(),
    help="A bus to serve. Sandboxes get the first bus by default. May be repeated.",
)
@click.option(
    "--scope", type=click.Choice(["user", "system"]), help="Serve one user, or all users."
)
@click.option(
    "--engine",
    type=click.Choice(["gate", "containers1"]),
    help="gate: no bus labels connections; containers1: every bus has to (Containers1). Default:"
    " buses that can label connections do so.",
)
@click.option(
    "--config",
    "config_path",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Read settings from this TOML file.",
)
@click.option("--verbose", is_flag=True, help="Log each refused message, and more.")
def run_command(
    *,
    buses: tuple[tuple[str, str], ...],
    scope: str | None,
    engine: EngineName | None,
    config_path: Path | None,
    verbose: bool,
) -> None:
    """Run the broker. Without --bus and without a session bus, a private bus is started."""
    config = load_config(config_path, scope=scope, engine=engine, buses=_unique(buses))
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(levelname)s %(name)s: %(message)s",
    )
    if config.buses:
        trio.run(serve, config)
        return
    if address := _session_bus_in(os.environ.get("XDG_RUNTIME_DIR")):
        trio.run(serve, _with_session(config, address))
        return
    with private_bus(config.runtime_dir) as bus:
        what = "an earlier broker's" if bus.adopted else "a"
        print_line(
            f"no session bus found: using {what} private bus, {bus.address} (process {bus.pid})"
        )
        # No other program starts the private bus. So a lost private bus does not come back.
        config = msgspec.structs.replace(config, bus_gone_seconds=1)
        trio.run(serve, _with_session(config, bus.address))


def _unique(buses: tuple[tuple[str, str], ...]) -> dict[str, str]:
    found = dict(buses)
    if len(found) != len(buses):
        raise click.UsageError("--bus names the same bus twice")
    return found


def _session_bus_in(runtime_dir: str | None) -> str | None:
    if runtime_dir is None:
        return None
    path = Path(runtime_dir) / "bus"
    return make_unix_address(str(path)) if path.is_socket() else None


def _with_session(config: Config, address: str) -> Config:
    return msgspec.structs.replace(config, buses=(BusSpec(name="session", address=address),))
