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
@click.option("--own", "direction", flag_value="own", help="The app owns NAME.")
@click.option("--see", "direction", flag_value="see", help="The app sees NAME and its owner.")
@click.argument("bus", metavar="BUS")
@click.argument("name", metavar="NAME")
@click.argument("path", metavar="[PATH", required=False)
@click.argument("interface", metavar="INTERFACE", required=False)
@click.argument("member", metavar="MEMBER]", required=False)
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
    path: str | None,
    interface: str | None,
    member: str | None,
    peer: str,
    as_json: bool,
) -> None:
    """Explain whether sandbox ID, or SNAP.APP, may send or receive a message, or own or see NAME.

    The answer names the deciding rule and the origin of the rule. A denied message comes with the
    connections or the single rule that would allow the message, least privilege first. `-` for
    NAME, PATH, INTERFACE or MEMBER stands for a message without that field. A message without NAME
    is a broadcast. --own and --see need BUS and NAME alone.
    """
    if direction is None:
        raise click.UsageError("one of --send and --receive, or of --own and --see, is needed")
    fields = {"path": path, "interface": interface, "member": member}
    _check_fields(direction, name, fields)
    message = {"direction": direction, "bus": bus, "name": name, **fields, "peer": peer}
    said = {key: text for key, text in message.items() if text and text != NOTHING}
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


def _check_fields(direction: str, name: str, fields: dict[str, str | None]) -> None:
    """Raise UsageError if the arguments are not those of a message, or of a name."""
    if direction in {"send", "receive"}:
        for field, text in fields.items():
            if text is None:
                raise click.UsageError(f"Missing argument '{field.upper()}'.")
    elif name == NOTHING:
        raise click.UsageError(f"--{direction} needs a NAME")
    elif any(text not in {None, NOTHING} for text in fields.values()):
        raise click.UsageError(f"--{direction} takes BUS and NAME alone")
