"""`buswarden status`: show the state of the broker."""

from collections.abc import Mapping

import click

from broker.cli.client import ServiceClient, ask
from broker.cli.options import JSON, Settings
from broker.cli.output import print_json, print_pairs, print_table


@click.command("status")
@JSON
@click.pass_obj
def status_command(settings: Settings, *, as_json: bool) -> None:
    """Show the state of the broker: processes, buses, limits and use."""
    status = ask(settings, ServiceClient.status)
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
            "last crash": str(status.get("last_crash") or "none"),
            "sandboxes": str(status.get("sandboxes", "")),
            "connections": str(status.get("connections", "")),
            "ended": _counts(status.get("ended", {})),
            "processes watched": str(status.get("watched", {}).get("processes", "")),
            "cgroups watched": str(status.get("watched", {}).get("cgroups", "")),
            "state in": str(status.get("runtime_dir", "")),
        }
    )
    engines = status.get("engines", {})
    print_table(
        ("BUS", "ENGINE", "ADDRESS"),
        [(bus, engines.get(bus, ""), at) for bus, at in sorted(status.get("buses", {}).items())],
    )
    used = status.get("use", {})
    limits = sorted(status.get("limits", {}).items())
    rows = [(name, str(value), str(used.get(name, ""))) for name, value in limits]
    print_table(("LIMIT", "VALUE", "ALL USE"), rows)


def _counts(ended: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(ended.items()))
