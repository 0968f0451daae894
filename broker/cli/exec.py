"""`buswarden exec`: run a command under bubblewrap, with sandboxed bus sockets alone."""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import click

from broker.cli.client import NewSandbox, ServiceClient, ask
from broker.cli.options import Settings, check_rule_buses
from broker.cli.output import print_error
from broker.cli.sandbox_options import new_sandbox_options
from broker.launcher.cgroup import own_cgroup
from broker.launcher.host import (
    check_standard_descriptors,
    find_bound,
    find_bubblewrap,
    find_host,
    find_program,
    find_shared,
    find_wayland,
    find_x11,
    make_home,
)
from broker.launcher.launch import NotStartedError, run_sandbox
from broker.launcher.plan import Wish, addresses_in, make_plan
from policy.snaps.installed import SNAP_TYPE

DEFAULT_TYPE: Final = "org.buswarden.Exec"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A sandbox for the command, and the addresses that the command must not reach."""

    sockets: dict[str, str]  # by the name of the bus
    bus_addresses: tuple[str, ...]
    runtime_dir: str


@click.command("exec", context_settings={"ignore_unknown_options": False})
@new_sandbox_options(identity_required=False)
@click.option(
    "--snap",
    metavar="NAME",
    help="Run as app --app of this snap, with the rules of the snap's connections.",
)
@click.option(
    "--share",
    metavar="PATH",
    multiple=True,
    help="Show this folder or file read-only, without the sockets inside. May be repeated.",
)
@click.option(
    "--bind",
    metavar="DIRECTORY",
    multiple=True,
    help="Give this folder writable, with working sockets inside. May be repeated.",
)
@click.option(
    "--home", is_flag=True, help="Keep a home folder for the app. Default: an empty home folder."
)
@click.option("--net", is_flag=True, help="Give the host's network. Default: no network.")
@click.option("--x11", is_flag=True, help="Give the X11 display, with all that is typed there.")
@click.option("--wayland", is_flag=True, help="Give the Wayland compositor's socket.")
@click.argument("command", metavar="-- COMMAND [ARGUMENT]...", nargs=-1, required=True)
@click.pass_obj
def exec_command(  # noqa: PLR0913 - one parameter an option
    settings: Settings,
    *,
    new: NewSandbox,
    snap: str | None,
    share: tuple[str, ...],
    bind: tuple[str, ...],
    home: bool,
    net: bool,
    x11: bool,
    wayland: bool,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND under bubblewrap, with sandboxed sockets in place of the real buses.

    COMMAND sees /usr, /etc, /opt and the folder of the program, all read-only, and the folders that
    options add. The home folder, /tmp and /run are private and empty. There is no network. The
    host's sockets do not answer, except for those that an option gives. The exit code is that of
    COMMAND.
    """
    find_bubblewrap()
    check_standard_descriptors()
    wish = Wish(
        command=command,
        sockets={},
        program=_find_program(command[0]),
        shared=tuple(find_shared(path) for path in share),
        bound=tuple(find_bound(path) for path in bind),
        network=net,
        x11=find_x11(os.environ) if x11 else None,
        wayland=find_wayland(os.environ) if wayland else "",
    )
    if snap is not None:
        if new.type or new.component:
            raise click.UsageError("--snap cannot be combined with --type or --component")
        # As for a snap's commands, the default app has the name of the snap.
        component = new.app or snap
        new = replace(new, type=SNAP_TYPE, app=snap, component=component, receive_from_host=False)
    else:
        app = new.app or Path(command[0]).name
        new = replace(new, type=new.type or DEFAULT_TYPE, app=app)
    if home:
        wish = replace(wish, home=make_home(new.app, os.environ))
    return _run(settings, new, wish)


def _run(settings: Settings, new: NewSandbox, wish: Wish) -> int:
    """Add the sandbox and run the command there. Return the command's exit code."""
    # This process alone has the write end. So the sandbox ends with this process at the latest, and
    # no program inside the sandbox can delay the end.
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb"):
        try:
            made = ask(settings, partial(_make, new=new, close_notify=read_end))
        finally:
            os.close(read_end)
        return _run_in(made, wish)


async def _make(client: ServiceClient, *, new: NewSandbox, close_notify: int) -> Made:
    status = await client.status()
    known = list(status["buses"])
    check_rule_buses(new.rules, new.buses or known[:1])
    added = await client.add(new, close_notify=close_notify)
    return Made(
        sockets=dict(added.sockets) or {known[0]: added.socket},
        bus_addresses=(client.address, *status["buses"].values()),
        runtime_dir=status["runtime_dir"],
    )


def _run_in(made: Made, wish: Wish) -> int:
    addresses = (*made.bus_addresses, *addresses_in(os.environ))
    dirs = (made.runtime_dir, os.environ.get("XDG_RUNTIME_DIR") or made.runtime_dir)
    name = wish.command[0]
    with own_cgroup() as group:
        host = find_host(bus_addresses=addresses, runtime_dirs=dirs, cgroup=group.path)
        plan = make_plan(replace(wish, sockets=made.sockets, bus_addresses=addresses), host)
        if group.why_not:
            print_error(f"no separate cgroup for {name}: {group.why_not}")
        for note in plan.notes:
            print_error(note)
        try:
            return run_sandbox(plan)
        except NotStartedError as exc:
            print_error(f"{name} was not started: {exc}")
            return 1


def _find_program(name: str) -> tuple[str, str]:
    # The search runs on the host, before a sandbox is added.
    program = None if name.startswith("-") else find_program(name)
    if program is None:
        raise click.UsageError(f"no such command: {name[:200]}")
    return program
