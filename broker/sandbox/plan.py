"""What a sandboxed command sees, as arguments and environment for bubblewrap. Pure.

The plan is conservative: the whole file system read-only, /tmp and /run empty and the app's own, no other
process in sight, no capability, and one bus socket, the sandbox's. It promises that no socket that the
host listens on at this moment is reachable by path, and no bus by another way: a bus may listen
anywhere, and nothing but asking it tells a bus from another socket. It does not confine files or network.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from broker.wire.address import parse_address
from broker.wire.errors import ConfigError

# Empty in every sandbox. Session buses, portals, agents and our own state live below these.
EMPTY_DIRS: Final = ("/tmp", "/run")  # noqa: S108 - hidden, not used
# A sandbox without a name for the host's bus has no use for these, and a program that trusts one
# of them before DBUS_SESSION_BUS_ADDRESS would only find a closed door.
_SERVICE_VARIABLES: Final = frozenset({"IBUS_ADDRESS", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What there is outside, as far as the plan depends on it."""

    uid: int
    cwd: str
    environ: Mapping[str, str]
    sockets: tuple[str, ...] = ()  # resolved paths of all that listen, and of the known buses
    abstract_sockets: tuple[str, ...] = ()  # names of those that listen, without the NUL
    runtime_dirs: tuple[str, ...] = ()  # resolved; hidden whole: the user's and the supervisor's
    resolv_conf: str | None = None  # what /etc/resolv.conf leads to


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is asked for."""

    command: tuple[str, ...]
    socket: str  # of the sandbox
    bus_addresses: tuple[str, ...]  # of every real bus that is known
    shared: tuple[
        str, ...
    ] = ()  # resolved; shown, read-only, even if it is below an empty directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to start: `argv` follows the name of bubblewrap and its options about descriptors."""

    argv: tuple[str, ...]
    environ: dict[str, str]
    cwd: str
    no_network: str = ""  # why the sandbox has no network; empty: it has


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where buses can be reached."""

    paths: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()  # by the network or an abstract socket, in words


def make_plan(wish: Wish, host: Host) -> Plan:
    """Return how to run the command with the sandbox's bus and no other. Raises ConfigError."""
    no_network = _why_no_network(wish, host)
    inside = f"/run/user/{host.uid}"
    argv = [
        *("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *("--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *(("--unshare-net",) if no_network else ()),
        *("--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"),
        *_hide(wish, host, inside),
        *("--perms", "0700", "--dir", inside, "--ro-bind", wish.socket, f"{inside}/bus"),
    ]
    resolv_conf = host.resolv_conf
    if resolv_conf is not None and not no_network and not _is_visible(resolv_conf, wish, host):
        argv += ("--ro-bind", resolv_conf, resolv_conf)
    cwd = host.cwd if _is_visible(host.cwd, wish, host) else "/"
    return Plan(
        argv=(*argv, "--chdir", cwd, "--", *wish.command),
        environ=_make_environ(host.environ, inside),
        cwd=cwd,
        no_network=no_network,
    )


def _hide(wish: Wish, host: Host, inside: str) -> list[str]:
    argv: list[str] = []
    for directory in EMPTY_DIRS:
        argv += ("--tmpfs", directory)
    for directory in wish.shared:
        if _below(inside, [directory]) or _below(directory, ("/dev", "/proc")):
            raise ConfigError(f"cannot share {directory}: the sandbox has its own")
        argv += ("--ro-bind", directory, directory)
    # What is mounted later lies on top: nothing that is shared brings a bus back.
    for directory in _outermost(host.runtime_dirs):
        if _has_files(directory, wish):
            argv += ("--tmpfs", directory)
    for path in sorted(set(host.sockets)):
        if _is_visible(path, wish, host):
            argv += ("--ro-bind", "/dev/null", path)
    return argv


def find_buses(addresses: Iterable[str], environ: Mapping[str, str]) -> Places:
    """Return where the buses of these addresses can be reached."""
    runtime_dir = environ.get("XDG_RUNTIME_DIR")
    paths: list[str] = []
    elsewhere: list[str] = []
    for entry in (e for address in addresses for e in address.split(";") if e):
        try:
            places = parse_address(entry, runtime_dir=runtime_dir)
        except ConfigError:
            elsewhere.append(entry)  # tcp and the like, or nothing that we can judge
            continue
        for place in places:
            path = place.path.decode("utf-8", "surrogateescape")
            if path.startswith("\0"):
                elsewhere.append(f"the abstract socket @{path[1:]}")
            else:
                paths.append(path)
    return Places(paths=tuple(paths), elsewhere=tuple(elsewhere))


def addresses_in(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the bus addresses that the environment gives away."""
    return tuple(value for name, value in environ.items() if _names_a_bus(name) and value)


def _names_a_bus(name: str) -> bool:
    return name.endswith("_BUS_ADDRESS") or name in {"DBUS_STARTER_ADDRESS", "IBUS_ADDRESS"}


def _make_environ(environ: Mapping[str, str], runtime_dir: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in environ.items()
        if not (_names_a_bus(name) or name.startswith("DBUS_") or name in _SERVICE_VARIABLES)
    }
    return kept | {
        "XDG_RUNTIME_DIR": runtime_dir,
        "DBUS_SESSION_BUS_ADDRESS": f"unix:path={runtime_dir}/bus",
    }


def _why_no_network(wish: Wish, host: Host) -> str:
    for place in find_buses(wish.bus_addresses, host.environ).elsewhere:
        return place
    for name in host.abstract_sockets:
        # dbus-daemon and at-spi name theirs so (`/tmp/dbus-XXXXXXXXXX`): a bus that nobody told us of
        # must not be the way out.
        if "dbus" in name:
            return f"the abstract socket @{name}"
    return ""


def _is_visible(path: str, wish: Wish, host: Host) -> bool:
    return _has_files(path, wish) and not _below(path, host.runtime_dirs)


def _has_files(path: str, wish: Wish) -> bool:
    """Say whether the files of the host are there, runtime directories apart."""
    return _below(path, wish.shared) or not _below(path, (*EMPTY_DIRS, "/dev", "/proc"))


def _below(path: str, directories: Iterable[str]) -> bool:
    return any(PurePosixPath(path).is_relative_to(directory) for directory in directories)


def _outermost(directories: Iterable[str]) -> list[str]:
    """Drop what is below another one: mounting over the outer one hides both."""
    kept: list[str] = []
    for directory in sorted(set(directories)):
        if not _below(directory, kept):
            kept.append(directory)
    return kept
