"""`buswarden status`."""

import click

from broker.cli.client import Client, ask
from broker.cli.options import JSON, Settings
from broker.cli.output import print_json, print_pairs, print_table


@click.command("status")
@JSON
@click.pass_obj
def status_command(settings: Settings, *, as_json: bool) -> None:
    """Show how the broker is: its processes, its buses, how much it has of what it may have."""
    status = ask(settings, Client.status)
    if as_json:
        print_json(status)
        return
    print_pairs(
        {
            "version": str(status.get("version", "")),
            "scope": str(status.get("scope", "")),
            "engine": str(status.get("engine", "")),
            "supervisor": f"process {status.get('pid', '?')}",
            "gate": f"process {status.get('gate_pid', '?')}",
            "sandboxes": str(status.get("sandboxes", "")),
            "connections": str(status.get("connections", "")),
            "state in": str(status.get("runtime_dir", "")),
        }
    )
    print_table(("BUS", "ADDRESS"), sorted(status.get("buses", {}).items()))
    used = status.get("use", {})
    limits = sorted(status.get("limits", {}).items())
    rows = [(name, str(value), str(used.get(name, ""))) for name, value in limits]
    print_table(("LIMIT", "VALUE", "ALL USE"), rows)
