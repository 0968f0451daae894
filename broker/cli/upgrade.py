"""`buswarden upgrade`: replace the gate."""

import click

from broker.cli.client import ServiceClient, ask
from broker.cli.options import Settings
from broker.cli.output import print_line


@click.command("upgrade")
@click.pass_obj
def upgrade_command(settings: Settings) -> None:
    """Replace the gate by a new process, with the code that is installed now.

    No connection is closed and no message is lost. If the new gate does not work, the old gate
    continues.
    """
    old, new = ask(settings, ServiceClient.upgrade)
    print_line(f"the gate is process {new} now, instead of {old}")
