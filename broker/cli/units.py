"""`buswarden install-units`: write the units of systemd and the files of D-Bus."""

import os
import sys
import sysconfig
from pathlib import Path
from typing import Final, NoReturn, cast

import click

import broker
from broker.cli.output import print_line
from broker.posix.files import open_folder, read_small, write_file
from broker.systemd.units import (
    BUS_POLICY,
    BUS_SERVICE,
    Installation,
    Scope,
    is_unchanged,
    make_files,
)
from broker.wire.errors import BrokerError, ConfigError

_SYSTEM_FOLDERS: Final = {
    "": Path("/etc/systemd/system"),
    BUS_SERVICE: Path("/usr/local/share/dbus-1/system-services"),
    BUS_POLICY: Path("/etc/dbus-1/system.d"),
}
# Folders that PrivateTmp= replaces by empty folders for a service.
_PRIVATE: Final = ("/tmp", "/var/tmp")  # noqa: S108 - nothing is written there
_ENABLED: Final = "buswarden-gate.socket buswarden.service"
_MAX_UNIT: Final = 1024 * 1024  # bytes of a file that exists already


class UnitsError(BrokerError):
    """The files cannot be written, or were changed by another program."""


@click.command("install-units")
@click.option("--user", "scope", flag_value="user", default="user", help="For one user (default).")
@click.option("--system", "scope", flag_value="system", help="For all users, on the system bus.")
@click.option(
    "--dir",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write all files to this folder.",
)
@click.option("--print", "only_print", is_flag=True, help="Print the files, and write nothing.")
@click.option("--remove", is_flag=True, help="Remove the files.")
@click.option("--force", is_flag=True, help="Replace or remove also files that were changed.")
def install_units_command(
    *, scope: str, folder: Path | None, only_print: bool, remove: bool, force: bool
) -> None:
    """Write the systemd units of this installation, and the D-Bus files that start the broker."""
    installation = find_installation()
    files = {
        _place(cast("Scope", scope), folder, name): text
        for name, text in make_files(cast("Scope", scope), installation).items()
    }
    if only_print:
        for path, text in files.items():
            click.echo(f"# {path}\n{text}")
        return
    if not force:
        _check(files)
        if scope == "system" and folder is None and not remove:
            _check_visible(installation)
    if remove:
        _remove(files)
    else:
        _write(files)
    if folder is None:
        print_line(f"now run: {_next(scope, remove=remove)}")


def find_installation() -> Installation:
    """Return the interpreter and the import path that start this program."""
    here = str(Path(broker.__file__).parent.parent)
    by_itself = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    return Installation(python=sys.executable, path="" if here in by_itself else here)


def _check_visible(installation: Installation) -> None:
    """Check that the program is not in /tmp, which services of the system do not see.

    Raises UnitsError.
    """
    for path in filter(None, (installation.python, installation.path)):
        if any(Path(path).is_relative_to(folder) for folder in _PRIVATE):
            raise UnitsError(
                f"{path} is hidden from the services (PrivateTmp): install buswarden in /opt,"
                " for example"
            )


def _place(scope: Scope, folder: Path | None, name: str) -> Path:
    if folder is not None:
        return folder / name
    if scope == "system":
        return _SYSTEM_FOLDERS.get(name, _SYSTEM_FOLDERS[""]) / name
    if name == BUS_SERVICE:
        return _home("XDG_DATA_HOME", ".local/share") / "dbus-1" / "services" / name
    return _home("XDG_CONFIG_HOME", ".config") / "systemd" / "user" / name


def _home(variable: str, otherwise: str) -> Path:
    path = Path(os.environ.get(variable) or Path("~").expanduser() / otherwise)
    if not path.is_absolute():
        raise ConfigError(f"${variable} is not an absolute path: {str(path)[:80]!r}")
    return path


def _check(files: dict[Path, str]) -> None:
    """Check that no file was changed by another program. Raises UnitsError."""
    for path in files:
        try:
            before = read_small(path, _MAX_UNIT).decode("utf-8", "replace")
        except FileNotFoundError:
            continue
        except OSError as exc:
            _fail(exc, path)
        if not is_unchanged(before):
            raise UnitsError(
                f"{path} was changed, or was not written by buswarden: use --force to go on"
            )


def _write(files: dict[Path, str]) -> None:
    for path, text in files.items():
        try:
            with open_folder(path.parent, make=0o755):
                write_file(path, text.encode(), 0o644)
        except OSError as exc:
            _fail(exc, path)
        print_line(f"wrote {path}")


def _remove(files: dict[Path, str]) -> None:
    for path in files:
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as exc:
            _fail(exc, path)
        print_line(f"removed {path}")


def _fail(exc: OSError, path: Path) -> NoReturn:
    raise UnitsError(f"{exc.filename or path}: {exc.strerror}") from exc


def _next(scope: str, *, remove: bool) -> str:
    systemctl = "systemctl --user" if scope == "user" else "systemctl"
    if remove:
        return f"{systemctl} stop {_ENABLED} buswarden-gate.service; {systemctl} daemon-reload"
    return f"{systemctl} daemon-reload && {systemctl} enable --now {_ENABLED}"
