"""`buswarden explain`: the reason for a verdict, and the changes that would allow a message."""

from functools import partial
from typing import Final

import click

from broker.cli.client import ServiceClient, ask
from broker.cli.options import JSON, Settings
from broker.cli.output import print_json, print_line

NOTHING: Final = "-"


@click.command("explain")
@click.argument("what", metavar="ID|SNAP.APP")
@click.option("--send", "direction", flag_value="send", help="The app sends the message.")
@click.option("--receive", "direction", flag_value="receive", help="The app receives the message.")
@click.argument("bus", metavar="BUS")
@click.argument("name", metavar="NAME")
@click.argument("path", metavar="PATH")
@click.argument("interface", metavar="INTERFACE")
@click.argument("member", metavar="MEMBER")
@click.option(
    "--peer",
    metavar="PEER",
    default="host",
    help="The other end: host, or app:TYPE/ID[#COMPONENT]. Default: host.",
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
    """Explain whether sandbox ID, or SNAP.APP, may send or receive a message.

    The answer names the deciding rule and the origin of the rule. A denied message comes with the
    connections or the single rule that would allow the message, least privilege first. `-` for
    NAME, PATH, INTERFACE or MEMBER stands for a message without that field. A message without NAME
    is a broadcast.
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
        print_line(f"  origin: {why['origin']}")
    if why["suggestions"]:
        print_line("each of these would allow the message, least privilege first:")
        for suggestion in why["suggestions"]:
            print_line(f"  {suggestion}")
