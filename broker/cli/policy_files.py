"""Files included by a file of `buswarden policy import`, and command lines in a file."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from broker.cli.connections import read_text
from broker.wire.errors import ConfigError
from policy.importers.apparmor_parser import Resolver
from policy.importers.report import Imported, Source
from policy.importers.xdg_dbus_proxy import import_command_line, import_options


def make_resolver(directories: Sequence[Path]) -> Resolver | None:
    """Return a function that finds AppArmor's includes in the directories.

    Return None without directories. Then includes are listed as parts that no rule expresses.
    """
    if not directories:
        return None

    def resolve(name: str) -> Sequence[Source] | None:
        bare = name.strip('<>"')
        wanted = [Path(bare)] if bare.startswith("/") else [each / bare for each in directories]
        found = next((path for path in wanted if path.exists()), None)
        if found is None:
            return None
        files = sorted(found.iterdir()) if found.is_dir() else [found]
        return [Source(str(file), read_text(file)) for file in files if file.is_file()]

    return resolve


def import_proxy(source: Source, buses: Sequence[str]) -> Imported:
    """Return the rules of a command line of xdg-dbus-proxy.

    Raises ConfigError, ImportFileError.
    """
    # A file for --args has a NUL behind each word. Any other file is split as by a shell.
    try:
        words = (
            source.text.rstrip("\0").split("\0")
            if "\0" in source.text
            else shlex.split(source.text, comments=True)
        )
    except ValueError as exc:
        raise ConfigError(f"{source.name}: {exc}") from exc
    if words and Path(words[0]).name == "xdg-dbus-proxy":
        del words[0]
    if not words or words[0].startswith("--"):
        return import_options(words, bus=buses[0], file=source.name)
    names = iter(buses)

    def bus_of(address: str) -> str:
        name = next(names, None)
        if name is None:
            raise ConfigError(f"{source.name}: no --bus is left for the address {address[:100]!r}")
        return name

    return import_command_line(words, bus_of=bus_of, file=source.name)
