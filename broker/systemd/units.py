"""The texts of the units, and of the files by which a bus starts them. No I/O.

Two services, so that systemd can restart either without the other: the supervisor is restarted, reloaded and watched; the gate goes
on meanwhile, with the apps' connections. Neither is told to start the other: the first call to our name starts
the supervisor, and its first connection to the gate's socket starts the gate.
"""

import hashlib
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Scope = Literal["user", "system"]

NAME: Final = "org.buswarden.Broker1"
UNITS: Final = ("buswarden.service", "buswarden-gate.socket", "buswarden-gate.service")
BUS_SERVICE: Final = f"{NAME}.service"
BUS_POLICY: Final = f"{NAME}.conf"
_MARK: Final = re.compile(
    r"(?:# |<!-- )Written by `buswarden install-units` \(([0-9a-f]{16})\)[^\n]*\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """Where the program is that the units start."""

    python: str
    path: str = ""  # for PYTHONPATH, if Python does not find it by itself


@dataclass(frozen=True, slots=True)
class _Option:
    """A line of a unit and why it stands there."""

    line: str
    reason: str
    scopes: tuple[Scope, ...] = ("user", "system")


_SYSTEM: Final[tuple[Scope, ...]] = ("system",)
# What both services do without. User managers cannot set up most of what needs a namespace, and where they can
# it would put the gate, whose process portals look at, into another user namespace than the session.
_HARDENING: Final = (
    _Option("NoNewPrivileges=yes", "Neither starts anything that has to gain a privilege."),
    _Option("LockPersonality=yes", "No other personality is ever needed."),
    _Option(
        "MemoryDenyWriteExecute=yes", "Python is interpreted: no page is written and then run."
    ),
    _Option("RestrictNamespaces=yes", "Namespaces are made by whoever makes a sandbox, not by us."),
    _Option("RestrictRealtime=yes", "Nothing here runs at a real-time priority."),
    _Option("RestrictSUIDSGID=yes", "No file of ours has such a bit."),
    _Option(
        "SystemCallArchitectures=native", "Calls of another architecture would go by the filter."
    ),
    _Option(
        "SystemCallFilter=@system-service",
        "What a service needs, and no mounts, modules or clocks.",
    ),
    _Option("SystemCallErrorNumber=EPERM", "What is not allowed fails, and is not the end of all."),
    _Option("UMask=0077", "What is made is for us alone, unless it is said otherwise."),
    _Option("KeyringMode=private", "No key is needed.", _SYSTEM),
    _Option("ProtectSystem=strict", "Only the runtime folder is written to.", _SYSTEM),
    _Option("ProtectHome=read-only", "The program itself may be installed there.", _SYSTEM),
    _Option("PrivateTmp=yes", "Nothing there is ours.", _SYSTEM),
    _Option("PrivateDevices=yes", "No device is needed.", _SYSTEM),
    _Option("ProtectKernelTunables=yes", "Nothing there is written.", _SYSTEM),
    _Option("ProtectKernelModules=yes", "None is loaded.", _SYSTEM),
    _Option("ProtectKernelLogs=yes", "They are not read.", _SYSTEM),
    _Option("ProtectControlGroups=yes", "They are watched and not changed.", _SYSTEM),
    _Option("ProtectClock=yes", "It is not set.", _SYSTEM),
    _Option("ProtectHostname=yes", "It is not set.", _SYSTEM),
    _Option("IPAddressDeny=any", "All that is spoken to is on this machine.", _SYSTEM),
)
_SUPERVISOR: Final = (
    _Option(
        "RestrictAddressFamilies=AF_UNIX AF_NETLINK",
        "Buses and the gate; the kernel tells the ends of processes by netlink.",
    ),
    _Option(
        "CapabilityBoundingSet=CAP_CHOWN CAP_NET_ADMIN",
        "A sandbox's socket is given to its user; the process connector asks for the other.",
        _SYSTEM,
    ),
)
_GATE: Final = (
    _Option("ProtectProc=invisible", "It looks at no process but itself.", _SYSTEM),
    _Option("ProcSubset=pid", "Nothing else there is read.", _SYSTEM),
    _Option("RestrictAddressFamilies=AF_UNIX", "Buses, apps and the supervisor; no network."),
    _Option(
        "CapabilityBoundingSet=CAP_SETUID CAP_SETGID",
        "A connection to the bus is made as the user whose app it is.",
        _SYSTEM,
    ),
    _Option(
        "LimitNOFILE=524288", "Two descriptors a connection, one a socket, and what is passed on."
    ),
)
_FOLDER: Final = (
    _Option("RuntimeDirectory=buswarden", "The one folder that is written to.", _SYSTEM),
    _Option("RuntimeDirectoryMode=0711", "Users reach the sockets of their sandboxes.", _SYSTEM),
    _Option(
        "RuntimeDirectoryPreserve=yes", "The other service is in there when this one ends.", _SYSTEM
    ),
)


def make_files(scope: Scope, installation: Installation) -> dict[str, str]:
    """Return all files by their names."""
    files = {
        "buswarden.service": _supervisor(scope, installation),
        "buswarden-gate.socket": _socket(scope),
        "buswarden-gate.service": _gate(scope, installation),
        BUS_SERVICE: _bus_service(scope),
    }
    marked = {name: _mark(text, "# {}\n") for name, text in files.items()}
    if scope == "system":
        marked[BUS_POLICY] = _mark(_POLICY, "<!-- {} -->\n")
    return marked


def is_unchanged(text: str) -> bool:
    """Say whether a file is as this program, or another version of it, wrote it."""
    found = _MARK.match(text)
    return found is not None and found[1] == _digest(text[found.end() :])


def _supervisor(scope: Scope, installation: Installation) -> str:
    arguments = ("-P", "-m", "broker.cli", "run", "--scope", scope)
    return f"""\
[Unit]
Description=buswarden: who is behind a sandbox's D-Bus connection, and what it may do
Requires=dbus.socket buswarden-gate.socket
After=dbus.socket buswarden-gate.socket
# One that fails at once each time has nothing to gain from another try.
StartLimitIntervalSec=60
StartLimitBurst=10

[Service]
# It says when it can be asked.
Type=notify
NotifyAccess=main
ExecStart={_command(installation, arguments)}
{_environment(installation)}\
# The gate is replaced by a new process without one connection closed. The shell's own kill: a minimal system has no other,
# and Type=notify-reload takes systemd 253.
ExecReload=/bin/sh -c 'kill -HUP "$$MAINPID"'
# Connections and rules are the gate's meanwhile. A mistake in the settings (2) is not mended by another try.
Restart=on-failure
RestartSec=100ms
RestartPreventExitStatus=2
# It says so twice in this time, if its loop turns and the gate answers.
WatchdogSec=30
# It answers what is pending, writes its state, and is gone within 5 seconds.
TimeoutStopSec=10
# The gate is a service of its own: nothing of this one is to outlive it.
KillMode=mixed
# The sockets of the sandboxes: should both services die, apps can connect again to the same ones.
FileDescriptorStoreMax=20000
{_options(scope, _FOLDER, _SUPERVISOR, _HARDENING)}
[Install]
WantedBy={"default.target" if scope == "user" else "multi-user.target"}
"""


def _socket(scope: Scope) -> str:
    return f"""\
[Unit]
Description=buswarden: where the supervisor reaches the gate

[Socket]
ListenStream=%t/buswarden/gate.sock
FileDescriptorName=control
# Whoever connects there may give and take rules.
SocketMode=0600
DirectoryMode={"0700" if scope == "user" else "0711"}
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
"""


def _gate(scope: Scope, installation: Installation) -> str:
    places = ("--control", "%t/buswarden/gate.sock", "--trace", "%t/buswarden/gate-trace")
    arguments = ("-P", "-m", "broker.gate", *places)
    return f"""\
[Unit]
Description=buswarden: the gate, which serves the sandboxes' sockets
Requires=buswarden-gate.socket
After=buswarden-gate.socket
StartLimitIntervalSec=60
StartLimitBurst=10

[Service]
# It says when it serves, and which process does after an upgrade.
Type=notify
NotifyAccess=main
ExecStart={_command(installation, arguments)}
{_environment(installation)}\
# Apps that lost their connections can connect again: the supervisor holds the sockets.
Restart=on-failure
RestartSec=100ms
# Its end costs every app its connection: it has to be stuck indeed.
WatchdogSec=60
TimeoutStopSec=10
# One process at a time, and two for a moment during an upgrade.
KillMode=mixed
{_options(scope, _FOLDER, _GATE, _HARDENING)}"""


def _bus_service(scope: Scope) -> str:
    user = "User=root\n" if scope == "system" else ""
    # Exec is for a bus that knows no systemd: it must not start what systemd would not know of.
    return f"""\
[D-BUS Service]
Name={NAME}
Exec=/bin/false
{user}SystemdService=buswarden.service
"""


_POLICY: Final = f"""\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <policy user="root">
    <allow own="{NAME}"/>
  </policy>
  <policy context="default">
    <allow send_destination="{NAME}"/>
  </policy>
</busconfig>
"""


def _options(scope: Scope, *groups: Sequence[_Option]) -> str:
    return "".join(_lines(scope, [option for group in groups for option in group]))


def _lines(scope: Scope, options: Sequence[_Option]) -> Iterator[str]:
    for option in options:
        if scope in option.scopes:
            yield f"# {option.reason}\n{option.line}\n"


def _command(installation: Installation, arguments: Sequence[str]) -> str:
    # %t is for systemd to replace; what is the installation's is as it is.
    return " ".join([quote(installation.python), *(shlex.quote(one) for one in arguments)])


def _environment(installation: Installation) -> str:
    path = installation.path
    return f"Environment={quote(f'PYTHONPATH={path}')}\n" if path else ""


def quote(text: str) -> str:
    """Return a word as it stands in a unit for exactly this text."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"' if re.search(r"[^A-Za-z0-9_@%+=:,./$-]", escaped) else escaped


def _mark(text: str, comment: str) -> str:
    line = (
        f"Written by `buswarden install-units` ({_digest(text)}); it leaves alone what was changed."
    )
    return comment.format(line) + text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
