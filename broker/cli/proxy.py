"""`buswarden proxy` as a member of the command group.

This form is for options in front of the command's name, and for the overview. The proxy parses the
arguments without click, because the order of the options has a meaning that click does not keep.
"""

import click

from broker.proxy.service import run_proxy


@click.command(
    "proxy",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    add_help_option=False,
)
@click.argument("arguments", metavar="[OPTION]... [ADDRESS PATH [OPTION]...]...", nargs=-1)
def proxy_command(*, arguments: tuple[str, ...]) -> int:
    """Run a replacement of xdg-dbus-proxy: same options, same sockets, no broker."""
    return run_proxy(arguments, program="buswarden proxy")
