"""The plan of a sandboxed command: file system, namespaces and environment. Pure.

The root is made of chosen parts, and everything else of the host is absent. The command sees a
folder of the host as a read-only overlay (made by broker/launcher/stage.py), in which no socket of
the host answers. Two kinds of sockets are added to the root: the sockets of the sandbox's buses,
and the sockets that an option requests.

A folder given as the host's own (`bound`) comes with its sockets. So a folder that could hold a
socket of a bus or of the broker is refused.
"""

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

from broker.launcher.mounts import (
    Mount,
    is_below,
    mounts_below,
    path_order,
    same_device,
    same_files,
)
from broker.launcher.stage import BELOW, LIVE, SHOWN, SOCKET, STATUS, STDERR
from broker.wire.address import make_unix_address, parse_address
from broker.wire.errors import ConfigError

# Shown if present on the host. NixOS has all programs in /nix.
SYSTEM: Final = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt", "/nix"),
    *("/var/cache/fontconfig", "/var/lib/dbus"),
)
# Folders that the command gets anew, empty at the start.
_OWN: Final = ("/tmp", "/var/tmp", "/run")  # noqa: S108 - made anew, not used
_KERNELS: Final = ("/dev", "/proc", "/sys")
_SYSFS: Final = ("block", "bus", "class", "dev", "devices")
_PROC_READ_ONLY: Final = (
    "sys",
    "sysrq-trigger",
    "irq",
    "bus",
    "fs",
    "driver",
    "scsi",
    "acpi",
    "mtrr",
)
MAX_PARTS: Final = 256
# Variables that name something absent inside.
_ABSENT_VARIABLES: Final = frozenset(
    {
        *("IBUS_ADDRESS", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID"),
        *("DISPLAY", "XAUTHORITY", "WAYLAND_DISPLAY", "WAYLAND_SOCKET", "PWD", "OLDPWD"),
    }
)
_SHELL: Final = f'exec "$@" 2>&{STDERR} {STDERR}>&- {STATUS}>&-'


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """The facts of the host that the plan depends on. All paths are resolved."""

    uid: int
    cwd: str
    environ: Mapping[str, str]
    home: str = ""  # empty: no home
    staging: str = "/mnt"  # a folder to mount over while the root is made
    folders: tuple[str, ...] = ()  # the members of SYSTEM that are folders
    # the members of SYSTEM that are links, with their targets
    links: tuple[tuple[str, str], ...] = ()
    mounts: tuple[Mount, ...] = ()
    # sockets of buses, and folders with sockets of buses or of the broker
    protected: tuple[str, ...] = ()
    linked: tuple[str, ...] = ()  # the sockets above that have another hard link
    resolv_conf: str | None = None  # the target of /etc/resolv.conf
    scopes: bool = False  # the kernel can keep abstract sockets out of reach
    cgroup: str = ""  # a cgroup for the command alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Display:
    """An X11 display of the host."""

    name: str  # as in DISPLAY
    socket: str = ""  # empty for a display reached by the network
    cookie: str = ""  # the file; empty: no cookie


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """The options of one `exec`. All paths are resolved."""

    command: tuple[str, ...]
    sockets: Mapping[str, str]  # sockets of the sandbox, by bus name
    program: tuple[str, str] | None = None  # the command's file as found, and resolved
    bus_addresses: tuple[str, ...] = ()  # addresses of all known real buses
    shared: tuple[str, ...] = ()
    bound: tuple[str, ...] = ()
    home: str = ""  # the folder for the home; empty for a temporary home
    network: bool = False
    x11: Display | None = None
    wayland: str = ""  # the compositor's socket


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the host at a place in the sandbox.

    `kind` is a kind of broker/launcher/stage.py.
    """

    source: str
    at: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The parts to mount, and bubblewrap's arguments around the arguments for the parts."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    environ: dict[str, str]
    parts: tuple[Part, ...] = ()
    staging: str = "/mnt"
    scope: bool = False  # keep the host's abstract sockets out of reach
    cgroup: str = ""
    notes: tuple[str, ...] = ()  # for the person who runs the command


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The places where buses can be reached."""

    paths: tuple[str, ...] = ()
    abstract: tuple[str, ...] = ()  # without the NUL
    elsewhere: tuple[str, ...] = ()  # addresses of other kinds


@dataclass(slots=True, kw_only=True)
class _Inside:
    """The sandbox while it is being planned."""

    runtime_dir: str
    home: str = ""
    parts: list[Part] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def shows(self, path: str) -> bool:
        kinds = (SHOWN, BELOW, LIVE)
        return any(part.kind in kinds and is_below(path, part.at) for part in self.parts)


def make_plan(wish: Wish, host: HostFacts) -> Plan:
    """Return the plan of the command with the sandbox's buses and no other. Raises ConfigError."""
    inside = _Inside(runtime_dir=f"/run/user/{host.uid}")
    _add_folders(inside, wish, host)
    _add_buses(inside, wish)
    _add_displays(inside, wish)
    _check_network(inside, wish, host)
    if len(inside.parts) > MAX_PARTS:
        raise ConfigError(f"{len(inside.parts)} file systems are to be shown, at most {MAX_PARTS}")
    cwd = _start_in(inside, wish, host)
    command = _command_inside(inside, wish, host)
    return Plan(
        before=(*_namespaces(network=wish.network), *_own_folders(inside, host)),
        parts=tuple(inside.parts),
        after=(*_last_words(cwd), "--", "/bin/sh", "-c", _SHELL, "buswarden", *command),
        environ=_make_environ(inside, host),
        staging=host.staging,
        scope=wish.network and host.scopes,
        cgroup=host.cgroup,
        notes=tuple(inside.notes),
    )


def _namespaces(*, network: bool) -> tuple[str, ...]:
    return (
        *("--unshare-user", "--disable-userns", "--unshare-pid", "--unshare-ipc"),
        *("--unshare-uts", "--unshare-cgroup", *(() if network else ("--unshare-net",))),
        *("--die-with-parent", "--new-session", "--cap-drop", "ALL"),
    )


def _own_folders(inside: _Inside, host: HostFacts) -> Iterator[str]:
    for folder in ("/tmp", "/var/tmp"):  # noqa: S108
        yield from ("--perms", "1777", "--tmpfs", folder)
    yield from ("--perms", "0755", "--tmpfs", "/run", "--symlink", "../run", "/var/run")
    yield from ("--perms", "0700", "--dir", inside.runtime_dir)
    if inside.home:
        yield from ("--perms", "0700", "--tmpfs", inside.home)
    yield from ("--dev", "/dev", "--proc", "/proc")
    # The command gets no access to the sandbox's first process, above all not to its descriptors.
    yield from ("--perms", "0000", "--tmpfs", "/proc/1", "--remount-ro", "/proc/1")
    # The files below would be settings of the host if root in the sandbox could write there.
    for name in _PROC_READ_ONLY:
        yield from ("--ro-bind-try", f"/proc/{name}", f"/proc/{name}")
    for name in _SYSFS:
        yield from ("--ro-bind-try", f"/sys/{name}", f"/sys/{name}")
    for path, target in host.links:
        yield from ("--symlink", target, path)


def _last_words(cwd: str) -> tuple[str, ...]:
    return ("--remount-ro", "/", "--chdir", cwd)


# -- folders ---------------------------------------------------------------------------------------


def _add_folders(inside: _Inside, wish: Wish, host: HostFacts) -> None:
    inside.home = host.home if _can_be_private(host.home) else ""
    if wish.home and not inside.home:
        raise ConfigError(
            f"no private home can stand at {host.home or 'HOME, which names no folder'}"
        )
    for path in (*wish.shared, *wish.bound):
        _check_place(path, inside.runtime_dir)
    for path in (*wish.bound, wish.home):
        if path:
            _check_live(path, host)
    found = {path: Part(source=path, at=path, kind=SHOWN) for path in (*host.folders, *wish.shared)}
    found |= {path: Part(source=path, at=path, kind=LIVE) for path in wish.bound}
    for path in _own_program(wish, host, found):
        found[path] = Part(source=path, at=path, kind=SHOWN)
    for path in [path for path, part in found.items() if part.kind == SHOWN]:
        for point in mounts_below(path, host.mounts):
            found.setdefault(point, Part(source=point, at=point, kind=BELOW))
    if wish.home:
        found[inside.home] = Part(source=wish.home, at=inside.home, kind=LIVE)
    resolv_conf = host.resolv_conf
    if wish.network and resolv_conf and not any(is_below(resolv_conf, path) for path in found):
        found[resolv_conf] = Part(source=resolv_conf, at=resolv_conf, kind=SHOWN)
    # A later mount hides an earlier mount, so a folder comes before its content.
    inside.parts += [found[path] for path in sorted(found, key=path_order)]


def _own_program(wish: Wish, host: HostFacts, found: Mapping[str, Part]) -> Iterator[str]:
    """Yield the folder of the command's file, or the file alone if sharing the folder is unsafe."""
    for path in wish.program or ():
        if any(is_below(path, folder) for folder in found):
            continue
        folder = posixpath.dirname(path)
        theirs = (*_OWN, *_KERNELS, *((host.home,) if host.home else ()))
        if not any(is_below(own, folder) for own in theirs):
            yield folder
        elif wish.program is not None and path == wish.program[1]:
            yield path


def _command_inside(inside: _Inside, wish: Wish, host: HostFacts) -> tuple[str, ...]:
    """Return the command with a name that leads to the same file inside."""
    if wish.program is None:
        return wish.command
    name, *arguments = wish.command
    found, real = wish.program
    if not inside.shows(found):
        return (real, *arguments)
    searched = host.environ.get("PATH", "").split(":")
    by_name = "/" not in name and posixpath.dirname(found) in searched
    return (name if by_name else found, *arguments)


def _can_be_private(home: str) -> bool:
    """Return whether an empty folder at the path hides no folder that the command needs."""
    if not home or any(is_below(home, folder) for folder in (*SYSTEM, *_KERNELS)):
        return False
    return not any(is_below(folder, home) for folder in (*SYSTEM, *_KERNELS, *_OWN))


def _check_place(path: str, runtime_dir: str) -> None:
    inside_kernels = any(is_below(path, folder) for folder in _KERNELS)
    hides = any(is_below(own, path) for own in (*_OWN, *_KERNELS, runtime_dir))
    if inside_kernels or hides or is_below(path, runtime_dir):
        raise ConfigError(f"cannot share {path}: the sandbox has a folder of its own there")


def _check_live(path: str, host: HostFacts) -> None:
    """Refuse a folder through which a bus or the broker could be reached. Raises ConfigError."""
    for other in host.protected:
        if same_files(path, other, host.mounts):
            raise ConfigError(f"cannot bind {path}: the folder leads to the sockets of {other}")
    for other in host.linked:
        if same_device(path, other, host.mounts):
            raise ConfigError(
                f"cannot bind {path}: the socket {other} has another name, perhaps in this folder"
            )
    for point in mounts_below(path, host.mounts):
        raise ConfigError(f"cannot bind {path}: {point} is mounted inside")


def _start_in(inside: _Inside, wish: Wish, host: HostFacts) -> str:
    if inside.shows(host.cwd):
        return host.cwd
    start = inside.home or "/"
    if host.cwd != start:
        name = wish.command[0]
        inside.notes.append(
            f"{host.cwd} is not there in the sandbox (--share shows folders): {name} starts in {start}"
        )
    return start


# -- sockets ---------------------------------------------------------------------------------------


def _add_buses(inside: _Inside, wish: Wish) -> None:
    for name, socket in sorted(wish.sockets.items()):
        at, variable = _bus_place(name, wish.sockets, inside.runtime_dir)
        inside.parts.append(Part(source=socket, at=at, kind=SOCKET))
        inside.variables[variable] = make_unix_address(at)


def _bus_place(name: str, names: Iterable[str], runtime_dir: str) -> tuple[str, str]:
    """Return the path where programs expect a bus, and the variable that names the bus.

    Raises ConfigError.
    """
    if name == "system":
        return "/run/dbus/system_bus_socket", "DBUS_SYSTEM_BUS_ADDRESS"
    if name == "accessibility":
        return f"{runtime_dir}/at-spi/bus", "AT_SPI_BUS_ADDRESS"
    rivals = [other for other in names if other not in ("system", "accessibility")]
    if len(rivals) > 1:
        text = " and ".join(sorted(rivals))
        raise ConfigError(f"the buses {text} would both be the session bus: name only one of them")
    return f"{runtime_dir}/bus", "DBUS_SESSION_BUS_ADDRESS"


def _add_displays(inside: _Inside, wish: Wish) -> None:
    if wish.x11 is not None:
        display = wish.x11
        if not display.socket and not wish.network:
            raise ConfigError(f"the display {display.name} is reached over the network: add --net")
        inside.variables["DISPLAY"] = display.name
        if display.socket:
            part = Part(source=display.socket, at=display.socket, kind=SOCKET)
            inside.parts.append(part)
        if display.cookie:
            at = f"{inside.runtime_dir}/Xauthority"
            inside.parts.append(Part(source=display.cookie, at=at, kind=SHOWN))
            inside.variables["XAUTHORITY"] = at
    if wish.wayland:
        at = f"{inside.runtime_dir}/wayland-0"
        inside.parts.append(Part(source=wish.wayland, at=at, kind=SOCKET))
        inside.variables["WAYLAND_DISPLAY"] = "wayland-0"


def _check_network(inside: _Inside, wish: Wish, host: HostFacts) -> None:
    if not wish.network:
        return
    places = find_buses(wish.bus_addresses, host.environ)
    for address in places.elsewhere:
        raise ConfigError(f"--net would let {wish.command[0]} reach the bus at {address}")
    if host.scopes:
        return
    for name in places.abstract:
        raise ConfigError(
            f"--net would let {wish.command[0]} reach the bus at the abstract socket @{name}"
            " (Linux 6.12 can prevent that)"
        )
    inside.notes.append(
        f"{wish.command[0]} can reach the host's abstract sockets (Linux 6.12 can prevent that)"
    )


def find_buses(addresses: Iterable[str], environ: Mapping[str, str]) -> Places:
    """Return the places where the buses of these addresses can be reached."""
    runtime_dir = environ.get("XDG_RUNTIME_DIR")
    paths: list[str] = []
    abstract: list[str] = []
    elsewhere: list[str] = []
    for entry in (e for address in addresses for e in address.split(";") if e):
        try:
            places = parse_address(entry, runtime_dir=runtime_dir)
        except ConfigError:
            elsewhere.append(entry)  # tcp and the like, or an address that cannot be parsed
            continue
        for place in places:
            path = place.path.decode("utf-8", "surrogateescape")
            if path.startswith("\0"):
                abstract.append(path[1:])
            else:
                paths.append(path)
    return Places(paths=tuple(paths), abstract=tuple(abstract), elsewhere=tuple(elsewhere))


# -- environment -----------------------------------------------------------------------------------


def addresses_in(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the bus addresses that environment variables contain."""
    return tuple(value for name, value in environ.items() if _names_a_bus(name) and value)


def _names_a_bus(name: str) -> bool:
    return name.endswith("_BUS_ADDRESS") or name in {"DBUS_STARTER_ADDRESS", "IBUS_ADDRESS"}


def _make_environ(inside: _Inside, host: HostFacts) -> dict[str, str]:
    kept = {
        name: value
        for name, value in host.environ.items()
        if not (_names_a_bus(name) or name.startswith("DBUS_") or name in _ABSENT_VARIABLES)
    }
    # A missing folder for temporary files would break programs for which /tmp is enough.
    for name in ("TMPDIR", "TMP", "TEMP"):
        if name in kept and not inside.shows(str(PurePosixPath(kept[name]))):
            del kept[name]
    if inside.home:
        kept["HOME"] = inside.home
    return kept | {"XDG_RUNTIME_DIR": inside.runtime_dir} | inside.variables
