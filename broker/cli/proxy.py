"""`buswarden proxy`, for those who come to it through the group of commands: its help, and options before it.

The proxy reads its arguments itself: to click an option has no place among others.
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
    """Be an xdg-dbus-proxy: same options, same sockets, no broker."""
    return run_proxy(arguments, program="buswarden proxy")
