"""`buswarden exec`: a command under bubblewrap, with the sandbox's bus socket and no other bus."""

import os
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import click

from broker.cli.client import Added, Client, NewSandbox, ask
from broker.cli.options import (
    ALLOW,
    DENY,
    PORTALS_AS_HOST,
    Settings,
    all_rules,
    end_options,
    identity_options,
)
from broker.cli.output import print_error
from broker.sandbox.launch import NotStartedError, find_bubblewrap, find_host, run_sandbox
from broker.sandbox.plan import Wish, addresses_in, make_plan
from policy.snaps import SNAP_TYPE

DEFAULT_TYPE: Final = "org.buswarden.Exec"
# Sockets that are to be hidden come and go: so often one may go while it is being hidden.
ATTEMPTS: Final = 5
RuleTexts = tuple[tuple[bool, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A sandbox for the command, and what to keep out of its sight."""

    added: Added
    bus_addresses: tuple[str, ...]
    runtime_dir: str


@click.command("exec", context_settings={"ignore_unknown_options": False})
@identity_options(required=False)
@click.option(
    "--snap",
    metavar="NAME",
    help="The command is an app of this snap, --app says which: the snap's connections give the rules.",
)
@ALLOW
@DENY
@PORTALS_AS_HOST
@end_options
@click.option(
    "--share",
    metavar="DIRECTORY",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, resolve_path=True),
    help="Show this, read-only, though it is below /tmp or /run. May be repeated.",
)
@click.argument("command", metavar="-- COMMAND [ARGUMENT]...", nargs=-1, required=True)
@click.pass_obj
def exec_command(  # noqa: PLR0913 - one parameter an option
    settings: Settings,
    *,
    type_: str | None,
    app: str | None,
    component: str,
    snap: str | None,
    allow: RuleTexts,
    deny: RuleTexts,
    portals_as_host: bool,
    process: int | None,
    cgroup: str,
    time_limit: int | None,
    share: tuple[str, ...],
    command: tuple[str, ...],
) -> int:
    """Run COMMAND under bubblewrap with a bus socket of its own in place of the session bus.

    The file system is read-only, /tmp and /run are empty and its own. Its exit code is ours.
    """
    find_bubblewrap()
    _check_command(command[0])
    new = NewSandbox(
        type=type_ or DEFAULT_TYPE,
        app=app or Path(command[0]).name,
        component=component,
        rules=tuple(all_rules(allow, deny)),
        portals_as_host=portals_as_host,
        process=process,
        cgroup=cgroup,
        time_limit=time_limit or 0,
    )
    if snap is not None:
        if type_ or component:
            raise click.UsageError("--snap says what --type and --component are")
        # As for a snap's commands: the app of the snap's own name is the one without a second name.
        new = replace(new, type=SNAP_TYPE, app=snap, component=app or snap, receive_from_host=False)
    for _ in range(ATTEMPTS):
        status = _run_once(settings, new, command, share)
        if status is not None:
            return status
        print_error("a socket was gone before it could be hidden: trying again")
    return 1


def _run_once(
    settings: Settings, new: NewSandbox, command: tuple[str, ...], shared: tuple[str, ...]
) -> int | None:
    """Run the command in a sandbox of its own; None: it did not start, and might now."""
    read_end, write_end = os.pipe()
    try:
        made = ask(settings, partial(_make, new=new, close_notify=read_end))
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    return _run(made, command, shared, write_end)


async def _make(client: Client, *, new: NewSandbox, close_notify: int) -> Made:
    status = await client.status()
    added = await client.add(new, close_notify=close_notify)
    return Made(
        added=added,
        bus_addresses=(client.address, *status["buses"].values()),
        runtime_dir=status["runtime_dir"],
    )


def _run(
    made: Made, command: tuple[str, ...], shared: tuple[str, ...], close_notify: int
) -> int | None:
    addresses = (*made.bus_addresses, *addresses_in(os.environ))
    dirs = (made.runtime_dir, os.environ.get("XDG_RUNTIME_DIR") or made.runtime_dir)
    host = find_host(bus_addresses=addresses, runtime_dirs=dirs)
    plan = make_plan(
        Wish(command=command, socket=made.added.socket, bus_addresses=addresses, shared=shared),
        host,
    )
    if plan.no_network:
        print_error(f"{command[0]} has no network: a bus can be reached by {plan.no_network}")
    if plan.cwd != host.cwd:
        print_error(f"{host.cwd} is not there in the sandbox: {command[0]} starts in {plan.cwd}")
    try:
        return run_sandbox(plan, close_notify=close_notify)
    except NotStartedError:
        # No file can be made in the sandbox to hide it behind.
        left = find_host(bus_addresses=addresses, runtime_dirs=dirs).sockets
        return 1 if set(host.sockets) <= set(left) else None


def _check_command(name: str) -> None:
    # Looked for outside, before anything is made; the sandbox has the same files.
    if shutil.which(name) is None:
        raise click.UsageError(f"no such command: {name[:200]}")
