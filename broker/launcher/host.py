"""Facts about the host for a sandbox's plan, and checks of the files that `exec` options name."""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from broker.launcher.mounts import parse_mountinfo
from broker.launcher.plan import SYSTEM, Display, HostFacts, find_buses
from broker.launcher.stage import can_scope_abstract_sockets
from broker.wire.errors import ConfigError

# Folders that hold sockets of buses of any user.
_BUS_FOLDERS: Final = ("/run/user", "/run/dbus")
# While the root is made, a mount in the sandbox's namespace covers a folder of this list.
_STAGING: Final = ("/mnt", "/media", "/srv", "/tmp", "/var/tmp")  # noqa: S108
_X11_FOLDER: Final = "/tmp/.X11-unix"  # noqa: S108
_STATE: Final = ".local/state"


def find_bubblewrap() -> str:
    """Return the path of bubblewrap. Raises ConfigError."""
    path = shutil.which("bwrap")
    if path is None:
        raise ConfigError("bubblewrap is not installed (no `bwrap` in PATH)")
    return path


def find_host(
    *, bus_addresses: Iterable[str], runtime_dirs: Iterable[str], cgroup: str = ""
) -> HostFacts:
    """Collect the facts of the host that a plan needs. Raises ConfigError."""
    buses = find_buses(bus_addresses, os.environ).paths
    protected = {_resolved(path) for path in (*buses, *runtime_dirs, *_BUS_FOLDERS)}
    system = [Path(path) for path in SYSTEM]
    mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    return HostFacts(
        uid=os.getuid(),
        cwd=_cwd(),
        environ=dict(os.environ),
        home=_home(),
        staging=_find_staging(),
        folders=tuple(str(path) for path in system if path.is_dir() and not path.is_symlink()),
        links=tuple((str(path), str(path.readlink())) for path in system if path.is_symlink()),
        mounts=parse_mountinfo(mountinfo),
        protected=tuple(sorted(protected)),
        linked=tuple(_linked_sockets([*buses, *runtime_dirs])),
        resolv_conf=_regular("/etc/resolv.conf"),
        scopes=can_scope_abstract_sockets(),
        cgroup=cgroup,
    )


def _linked_sockets(paths: Iterable[str]) -> Iterator[str]:
    """Yield the sockets with a second hard link, among these paths and two levels below."""
    for path in (found for top in paths for found in _files_below(_resolved(top), 2)):
        with contextlib.suppress(OSError):
            facts = Path(path).lstat()
            if stat.S_ISSOCK(facts.st_mode) and facts.st_nlink > 1:
                yield path


def _files_below(path: str, depth: int) -> Iterator[str]:
    yield path
    if depth > 0:
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                yield from _files_below(entry.path, depth - 1)


def find_program(name: str) -> tuple[str, str] | None:
    """Return the paths of a command's file, or None if no file is found.

    The first path has a resolved folder and the file's own name. The second path is resolved
    throughout.
    """
    found = shutil.which(name)
    if found is None:
        return None
    path = Path(found).absolute()
    return str(path.parent.resolve() / path.name), str(path.resolve())


def find_shared(path: str) -> str:
    """Return the real path of a folder or file to share. Raises ConfigError."""
    real = _resolved(path)
    try:
        mode = Path(real).stat().st_mode
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from None
    if stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is a socket: only folders and files can be shared")
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise ConfigError(f"{path} is neither a folder nor a file")
    return real


def find_bound(path: str) -> str:
    """Return the real path of a folder to bind writable. Raises ConfigError."""
    real = find_shared(path)
    if not Path(real).is_dir():
        raise ConfigError(f"{path} is not a folder")
    return real


def find_x11(environ: Mapping[str, str]) -> Display:
    """Return the display that DISPLAY names. Raises ConfigError."""
    name = environ.get("DISPLAY", "")
    host, colon, number = name.rpartition(":")
    number = number.partition(".")[0]
    if not colon or not number.isdecimal():
        raise ConfigError("--x11: DISPLAY names no display")
    home = environ.get("HOME", "")
    cookie = _regular(environ.get("XAUTHORITY") or f"{home}/.Xauthority") or ""
    if host not in ("", "unix"):
        return Display(name=name, cookie=cookie)
    socket = f"{_X11_FOLDER}/X{number}"
    _check_socket(socket, "--x11")
    return Display(name=name, socket=socket, cookie=cookie)


def find_wayland(environ: Mapping[str, str]) -> str:
    """Return the socket that WAYLAND_DISPLAY names. Raises ConfigError."""
    folder = environ.get("XDG_RUNTIME_DIR", "")
    path = Path(folder) / (environ.get("WAYLAND_DISPLAY") or "wayland-0")
    if not path.is_absolute():
        raise ConfigError("--wayland: XDG_RUNTIME_DIR is not set")
    real = _resolved(str(path))
    _check_socket(real, "--wayland")
    return real


def make_home(app: str, environ: Mapping[str, str]) -> str:
    """Return the folder for an app's home, made if missing. Raises ConfigError."""
    if app in (".", "..") or "/" in app or "\0" in app or len(os.fsencode(app)) > 255:
        raise ConfigError(
            f"--home: {app[:80]!r} cannot be the name of a folder: give another --app"
        )
    state = environ.get("XDG_STATE_HOME") or f"{environ.get('HOME', '')}/{_STATE}"
    folder = Path(state) / "buswarden" / "homes" / app
    if not folder.is_absolute():
        raise ConfigError("--home: neither XDG_STATE_HOME nor HOME says where")
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        is_ours = folder.lstat().st_uid == os.getuid() and stat.S_ISDIR(folder.lstat().st_mode)
    except OSError as exc:
        raise ConfigError(f"--home: {folder}: {exc.strerror}") from None
    if not is_ours:
        raise ConfigError(f"--home: {folder} is not a folder of this user: remove it")
    return _resolved(str(folder))


def check_standard_descriptors() -> None:
    """Refuse a folder as standard input, output or error. Raises ConfigError.

    A command could reach the host through the descriptor of a folder.
    """
    for fd, name in enumerate(("standard input", "standard output", "standard error")):
        try:
            mode = os.fstat(fd).st_mode
        except OSError:
            # The descriptor is closed. The next opened file would get its number.
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)
            continue
        if stat.S_ISDIR(mode):
            raise ConfigError(
                f"{name} is a folder, and the command could reach the host through it"
            )


def _check_socket(path: str, option: str) -> None:
    try:
        is_socket = stat.S_ISSOCK(Path(path).lstat().st_mode)
    except OSError as exc:
        raise ConfigError(f"{option}: {path}: {exc.strerror}") from None
    if not is_socket:
        raise ConfigError(f"{option}: {path} is not a socket")


def _find_staging() -> str:
    programs = [Path(path).resolve() for path in (find_bubblewrap(), "/proc")]
    for path in _STAGING:
        folder = Path(path)
        is_plain = folder.is_dir() and not folder.is_symlink()
        if is_plain and not any(program.is_relative_to(folder) for program in programs):
            return path
    raise ConfigError(
        f"none of the folders {', '.join(_STAGING)} exists: make one of them, to stay empty"
    )


def _home() -> str:
    home = os.environ.get("HOME", "")
    return _resolved(home) if home.startswith("/") and home.strip("/") else ""


def _cwd() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return "/"  # the folder was removed meanwhile


def _regular(path: str) -> str | None:
    """Return the real path of a file, or None if the file is missing."""
    real = Path(_resolved(path))
    return str(real) if real.is_file() else None


def _resolved(path: str) -> str:
    try:
        return str(Path(path).resolve())
    except (OSError, RuntimeError, ValueError):
        raise ConfigError(f"{path[:200]}: this path cannot be followed") from None
