"""`buswarden explain`: why an app may do something or not, and what would allow it."""

from functools import partial
from typing import Final

import click

from broker.cli.client import ServiceClient, ask
from broker.cli.options import JSON, Settings
from broker.cli.output import print_json, print_line

NOTHING: Final = "-"


@click.command("explain")
@click.argument("what", metavar="ID|SNAP.APP")
@click.option("--send", "direction", flag_value="send", help="The app would send it.")
@click.option("--receive", "direction", flag_value="receive", help="It would be sent to the app.")
@click.argument("bus", metavar="BUS")
@click.argument("name", metavar="NAME")
@click.argument("path", metavar="PATH")
@click.argument("interface", metavar="INTERFACE")
@click.argument("member", metavar="MEMBER")
@click.option(
    "--peer",
    metavar="PEER",
    default="host",
    help="Who the other end is: host, or app:TYPE/ID[#COMPONENT]. Default: host.",
)
@JSON
@click.pass_obj
def explain_command(  # noqa: PLR0913 - one parameter an option
    settings: Settings,
    *,
    what: str,
    direction: str | None,
    bus: str,
    name: str,
    path: str,
    interface: str,
    member: str,
    peer: str,
    as_json: bool,
) -> None:
    """Say whether ID, or the app of a snap, may send or receive a message, by which rule, and where from.

    If it may not: the connections, or the single rule, that would allow it, least privilege first. `-` for
    NAME, PATH, INTERFACE or MEMBER is a message without it; one sent to no NAME is a broadcast.
    """
    if direction is None:
        raise click.UsageError("one of --send and --receive is needed")
    message = {
        "direction": direction,
        "bus": bus,
        "name": name,
        "path": path,
        "interface": interface,
        "member": member,
        "peer": peer,
    }
    said = {key: text for key, text in message.items() if text != NOTHING}
    why = ask(settings, partial(ServiceClient.explain, what=what, message=said))
    if as_json:
        print_json(why)
        return
    print_line(f"{'allowed' if why['allowed'] else 'denied'}: {why['reason']}")
    if why["rule"]:
        print_line(f"  by the rule: {why['rule']}")
    if why["origin"]:
        print_line(f"  which is from: {why['origin']}")
    if why["suggestions"]:
        print_line("any one of these would allow it, the least first:")
        for suggestion in why["suggestions"]:
            print_line(f"  {suggestion}")
