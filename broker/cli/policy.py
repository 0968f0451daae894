"""`buswarden policy`: check, show, compare, import and compile policy, without a broker."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from broker.cli.connections import FILE, read_data, read_text
from broker.cli.lint import STDIN, costs, describe_cost, read_lists
from broker.cli.options import JSON
from broker.cli.output import print_error, print_json, print_line
from broker.cli.policy_files import import_proxy, make_resolver
from broker.cli.policy_text import (
    access_facts,
    describe_interface,
    diff_lists,
    proxy_facts,
    rule_lines,
    usos_facts,
)
from broker.supervisor.config import ConfiguredLimits
from broker.supervisor.snaps.catalogue import Snaps, load_own_library
from broker.wire.errors import CallRefusedError, ConfigError
from policy.importers.apparmor import import_apparmor
from policy.importers.flatpak import import_flatpak
from policy.importers.report import ImportFileError, Source
from policy.match import excess
from policy.rules import AccessList
from policy.snaps.compiler import Compiler
from policy.snaps.installed import SnapError, World, parse_world
from policy.snaps.library import CatalogueError, parse_interface

FILE_OR_STDIN: Final = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
FORMAT: Final = click.option(
    "--format",
    "form",
    type=click.Choice(["rules", "usos", "json", "xdg-dbus-proxy"]),
    default="rules",
    help="rules: as on the command line; usos: a(usos) of Containers1, for each bus; json;"
    " xdg-dbus-proxy: options of xdg-dbus-proxy, for each bus.",
)


@click.group("policy")
def policy_command() -> None:
    """Check, show, compare, import and compile policy. No broker needs to run."""


@policy_command.command("lint")
@click.argument("files", metavar="[FILE]...", nargs=-1, type=FILE_OR_STDIN)
@click.option(
    "--rule-steps",
    metavar="N",
    type=click.IntRange(min=1),
    default=ConfiguredLimits().rule_steps,
    show_default=True,
    help="The highest allowed cost of a list, as the limit rule_steps.",
)
def lint_command(*, files: tuple[Path, ...], rule_steps: int) -> int:
    """Check interface files (.toml), and check rule lists and print the cost of each list.

    A rule list is the output of `compile` or `import`, as rules or as json. `-` reads a list from
    standard input. Without FILE the whole catalogue is checked, with the files of the user and of
    /etc.
    """
    problems = 0
    try:
        if not files:
            load_own_library()
    except CatalogueError as exc:
        problems += 1
        print_line(str(exc))
    for file in files:
        if file.suffix != ".toml":
            problems += _lint_lists(file, rule_steps)
            continue
        try:
            parse_interface(read_text(file), name=file.stem, file=str(file))
        except CatalogueError as exc:
            problems += 1
            print_line(str(exc))
    return 1 if problems else 0


def _lint_lists(file: Path, rule_steps: int) -> int:
    """Print the cost of each list in a file.

    Return the number of lists that cost too much.

    Raises ConfigError.
    """
    problems = 0
    name = "standard input" if str(file) == STDIN else str(file)
    text = sys.stdin.read() if str(file) == STDIN else read_text(file)
    for tag, access in read_lists(text, name).items():
        for bus, cost in costs(access).items():
            told = excess(cost, rule_steps)
            problems += told is not None
            where = ", ".join(part for part in (tag, bus) if part)
            print_line(f"{name}: {where}: {told or describe_cost(cost, rule_steps)}")
    return problems


@policy_command.command("show")
@click.argument("interface", metavar="INTERFACE")
@JSON
def show_command(*, interface: str, as_json: bool) -> None:
    """Show the rules that an interface gives to plugs and slots."""
    library = _library()
    known = library.interfaces.get(interface)
    if interface == library.every_snap.name:
        known = library.every_snap
    if known is None:
        raise ConfigError(f"no interface {interface[:100]!r} with D-Bus rules")
    if as_json:
        print_json({"name": known.name, "file": known.file, **msgspec.to_builtins(known.interface)})
        return
    for line in describe_interface(known):
        print_line(line)


@policy_command.command("diff")
@click.argument("before", metavar="A", type=FILE)
@click.argument("after", metavar="B", type=FILE)
def diff_command(*, before: Path, after: Path) -> None:
    """Compare the rules of each app in two files.

    Each file holds snaps, or lists made by `compile --format json`.
    """
    for line in diff_lists(_read_lists(before), _read_lists(after)):
        print_line(line)


@policy_command.command("import")
@click.argument(
    "kind", metavar="KIND", type=click.Choice(["apparmor", "flatpak", "xdg-dbus-proxy"])
)
@click.argument("files", metavar="FILE...", nargs=-1, type=FILE, required=True)
@click.option("--profile", metavar="NAME", help="apparmor: the profile to take from the file.")
@click.option(
    "--include",
    metavar="DIRECTORY",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="apparmor: a folder of includes, as /etc/apparmor.d. May be repeated.",
)
@click.option("--app-id", metavar="ID", help="flatpak: the app, if the metadata names no app.")
@click.option(
    "--bus",
    "buses",
    metavar="NAME",
    multiple=True,
    help="xdg-dbus-proxy: the bus of each address. Default: session. May be repeated.",
)
@FORMAT
def import_command(  # noqa: PLR0913 - one parameter an option
    *,
    kind: str,
    files: tuple[Path, ...],
    profile: str | None,
    include: tuple[Path, ...],
    app_id: str | None,
    buses: tuple[str, ...],
    form: str,
) -> None:
    """Print the rules for a policy of apparmor, flatpak or xdg-dbus-proxy.

    Only flatpak takes several FILEs: the metadata, then overrides. Parts of the policy that no rule
    can express are listed on standard error.
    """
    sources = [Source(str(file), read_text(file)) for file in files]
    if len(sources) > 1 and kind != "flatpak":
        raise click.UsageError(f"{kind} takes one file")
    try:
        if kind == "apparmor":
            imported = import_apparmor(sources[0], resolve=make_resolver(include), profile=profile)
        elif kind == "flatpak":
            imported = import_flatpak(sources, app_id=app_id)
        else:
            imported = import_proxy(sources[0], buses or ("session",))
    except ImportFileError as exc:
        raise ConfigError(str(exc)) from exc
    for unsaid in imported.unsaid:
        print_error(str(unsaid))
    _print_access({"": imported.access}, form)


@policy_command.command("compile")
@click.argument("file", metavar="FILE", type=FILE)
@click.option(
    "--app", "apps", metavar="SNAP.APP", multiple=True, help="Only this app. May be repeated."
)
@FORMAT
def compile_command(*, file: Path, apps: tuple[str, ...], form: str) -> None:
    """Print the access list of each app of the snaps in FILE (TOML or JSON)."""
    compiler = _compile(file, read_data(file))
    wanted = {f"snap.{app.removeprefix('snap.')}" for app in apps}
    if unknown := wanted - set(compiler.tags):
        raise ConfigError(f"{file}: no app {min(unknown)[:100]}")
    tags = [tag for tag in compiler.tags if not wanted or tag in wanted]
    for tag in tags:
        for text in compiler.left_out(tag):
            print_error(f"{tag}: left out: {text}")
    _print_access({tag: compiler.access(tag) for tag in tags}, form)


def _print_access(lists: Mapping[str, AccessList], form: str) -> None:
    """Print lists by app. A single list may belong to no app."""
    alone = "" in lists
    if form == "rules":
        for tag, access in lists.items():
            for line in rule_lines(tag, access):
                print_line(line)
        return
    make = {"usos": usos_facts, "xdg-dbus-proxy": proxy_facts}.get(form, access_facts)
    facts = {tag: make(access) for tag, access in lists.items()}
    print_json(facts[""] if alone else facts)


def _compile(file: Path, data: object) -> Compiler:
    try:
        world = parse_world(data)
        return Snaps(World(), load_own_library).build(world, ())
    except (SnapError, CallRefusedError) as exc:
        raise ConfigError(f"{file}: {exc}") from exc


def _library() -> Any:
    try:
        return load_own_library()
    except CatalogueError as exc:
        raise ConfigError(str(exc)) from exc


def _read_lists(file: Path) -> dict[str, set[str]]:
    """Return each app's rules as texts. Raises ConfigError."""
    data = read_data(file)
    if isinstance(data, dict) and "snaps" in data:
        compiler = _compile(file, data)
        data = {tag: access_facts(compiler.access(tag)) for tag in compiler.tags}
    try:
        return {tag: _rule_texts(facts["rules"]) for tag, facts in data.items()}
    except (AttributeError, KeyError, TypeError):
        raise ConfigError(f"{file}: neither snaps nor lists of `compile --format json`") from None


def _rule_texts(rules: Iterable[Mapping[str, Any]]) -> set[str]:
    return {f"{'deny' if rule['deny'] else 'allow'} {rule['rule']}" for rule in rules}
