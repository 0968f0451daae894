"""`buswarden upgrade`."""

import click

from broker.cli.client import ServiceClient, ask
from broker.cli.options import Settings
from broker.cli.output import print_line


@click.command("upgrade")
@click.pass_obj
def upgrade_command(settings: Settings) -> None:
    """Have the gate replaced by a new process, of the code that is installed now.

    No connection is closed and no message lost. If the new one does not work the old one goes on.
    """
    old, new = ask(settings, ServiceClient.upgrade)
    print_line(f"the gate is process {new} now, instead of {old}")
