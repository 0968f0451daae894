"""Texts of the unit files and of the D-Bus service files that start the units. No I/O.

There are two services, so that systemd can restart either of them without the other. The supervisor
is restarted, reloaded and watched. Meanwhile the gate keeps running with the apps' connections.
Neither unit asks for the other service. The first call to the bus name starts the supervisor, and
the supervisor's first connection to the gate's socket starts the gate.
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
    """The location of the program that the units start."""

    python: str
    path: str = ""  # for PYTHONPATH, if Python does not find the program without


@dataclass(frozen=True, slots=True)
class _Option:
    """A line of a unit with the reason for the line."""

    line: str
    reason: str
    scopes: tuple[Scope, ...] = ("user", "system")


_SYSTEM: Final[tuple[Scope, ...]] = ("system",)
# Privileges that neither service needs. User managers cannot set up most of the options that need a
# namespace. Where a user manager can, the option would put the gate into another user namespace
# than the session, and portals look at the gate's process.
_HARDENING: Final = (
    _Option("NoNewPrivileges=yes", "Neither service starts a program that gains a privilege."),
    _Option("LockPersonality=yes", "No other personality is ever needed."),
    _Option(
        "MemoryDenyWriteExecute=yes", "Python is interpreted: no page is written and then run."
    ),
    _Option("RestrictNamespaces=yes", "Sandbox tools make namespaces; this service makes none."),
    _Option("RestrictRealtime=yes", "Nothing here runs at a real-time priority."),
    _Option("RestrictSUIDSGID=yes", "No file of this service has such a bit."),
    _Option(
        "SystemCallArchitectures=native", "Calls of another architecture would bypass the filter."
    ),
    _Option(
        "SystemCallFilter=@system-service",
        "The calls that a service needs, without mounts, modules and clocks.",
    ),
    _Option("SystemCallErrorNumber=EPERM", "A refused call fails and does not kill the service."),
    _Option("UMask=0077", "New files are private unless the program says otherwise."),
    _Option("KeyringMode=private", "No key is needed.", _SYSTEM),
    _Option("ProtectSystem=strict", "Only the runtime folder is written to.", _SYSTEM),
    _Option("ProtectHome=read-only", "The program itself may be installed there.", _SYSTEM),
    _Option("PrivateTmp=yes", "No file in /tmp is needed.", _SYSTEM),
    _Option("PrivateDevices=yes", "No device is needed.", _SYSTEM),
    _Option("ProtectKernelTunables=yes", "No tunable is written.", _SYSTEM),
    _Option("ProtectKernelModules=yes", "No module is loaded.", _SYSTEM),
    _Option("ProtectKernelLogs=yes", "Kernel logs are not read.", _SYSTEM),
    _Option("ProtectControlGroups=yes", "Control groups are watched and not changed.", _SYSTEM),
    _Option("ProtectClock=yes", "The clock is not set.", _SYSTEM),
    _Option("ProtectHostname=yes", "The host name is not set.", _SYSTEM),
    _Option("IPAddressDeny=any", "All peers are on this machine.", _SYSTEM),
)
_SUPERVISOR: Final = (
    _Option(
        "RestrictAddressFamilies=AF_UNIX AF_NETLINK",
        "Buses and the gate; the kernel reports the ends of processes by netlink.",
    ),
    _Option(
        "CapabilityBoundingSet=CAP_CHOWN CAP_NET_ADMIN",
        "A sandbox's socket is given to its user; the process connector needs CAP_NET_ADMIN.",
        _SYSTEM,
    ),
)
_GATE: Final = (
    _Option("ProtectProc=invisible", "The gate looks at no process but its own.", _SYSTEM),
    _Option("ProcSubset=pid", "Nothing else in /proc is read.", _SYSTEM),
    _Option("RestrictAddressFamilies=AF_UNIX", "Buses, apps and the supervisor; no network."),
    _Option(
        "CapabilityBoundingSet=CAP_SETUID CAP_SETGID",
        "The gate connects to the bus as the user who runs the app.",
        _SYSTEM,
    ),
    _Option(
        "LimitNOFILE=524288",
        "Two descriptors a connection, one a socket, and descriptors that are passed on.",
    ),
)
_FOLDER: Final = (
    _Option("RuntimeDirectory=buswarden", "The only folder that is written to.", _SYSTEM),
    _Option("RuntimeDirectoryMode=0711", "Users reach the sockets of their sandboxes.", _SYSTEM),
    _Option(
        "RuntimeDirectoryPreserve=yes",
        "The other service may be using the folder when this service ends.",
        _SYSTEM,
    ),
)


def make_files(scope: Scope, installation: Installation) -> dict[str, str]:
    """Return the texts of all files, by file name."""
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
    """Return whether a file is as this program, or another version of this program, wrote it."""
    found = _MARK.match(text)
    return found is not None and found[1] == _digest(text[found.end() :])


def _supervisor(scope: Scope, installation: Installation) -> str:
    arguments = ("-P", "-m", "broker.cli", "run", "--scope", scope)
    return f"""\
[Unit]
Description=buswarden: identity and access of sandboxed apps on D-Bus
Requires=dbus.socket buswarden-gate.socket
After=dbus.socket buswarden-gate.socket
# A service that fails at once each time gains nothing from another try.
StartLimitIntervalSec=60
StartLimitBurst=10

[Service]
# The supervisor reports when requests are accepted.
Type=notify
NotifyAccess=main
ExecStart={_command(installation, arguments)}
{_environment(installation)}\
# The gate is replaced by a new process, and no connection closes. `kill` is the shell's own,
# because a minimal system has no other. Type=notify-reload would need systemd 253.
ExecReload=/bin/sh -c 'kill -HUP "$$MAINPID"'
# Meanwhile the gate holds connections and rules. Another try mends no mistake in the settings (2).
Restart=on-failure
RestartSec=100ms
RestartPreventExitStatus=2
# The supervisor reports twice in this time, if its loop turns and the gate answers.
WatchdogSec=30
# The supervisor answers pending calls, writes the state, and ends within 5 seconds.
TimeoutStopSec=10
# The gate is a service of its own: nothing of this service is to outlive the supervisor.
KillMode=mixed
# The sockets of the sandboxes. If both services die, apps can connect again to the same sockets.
FileDescriptorStoreMax=20000
{_options(scope, _FOLDER, _SUPERVISOR, _HARDENING)}
[Install]
WantedBy={"default.target" if scope == "user" else "multi-user.target"}
"""


def _socket(scope: Scope) -> str:
    return f"""\
[Unit]
Description=buswarden: the socket by which the supervisor reaches the gate

[Socket]
ListenStream=%t/buswarden/gate.sock
FileDescriptorName=control
# A client of this socket may give and take rules.
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
# The gate reports when it serves, and after an upgrade the new main process.
Type=notify
NotifyAccess=main
ExecStart={_command(installation, arguments)}
{_environment(installation)}\
# Apps that lost their connections can connect again, because the supervisor holds the sockets.
Restart=on-failure
RestartSec=100ms
# The end of the gate costs every app its connection, so the gate must be stuck for long.
WatchdogSec=60
TimeoutStopSec=10
# One process at a time, and two for a moment during an upgrade.
KillMode=mixed
{_options(scope, _FOLDER, _GATE, _HARDENING)}"""


def _bus_service(scope: Scope) -> str:
    user = "User=root\n" if scope == "system" else ""
    # Exec is for a bus without systemd. Such a bus must not start a process unknown to systemd.
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
    # systemd replaces %t in the arguments. A percent sign in the path of Python is escaped.
    return " ".join([quote(installation.python), *(shlex.quote(one) for one in arguments)])


def _environment(installation: Installation) -> str:
    path = installation.path
    return f"Environment={quote(f'PYTHONPATH={path}')}\n" if path else ""


def quote(text: str) -> str:
    """Return a word escaped so that systemd reads exactly this text from a unit."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"' if re.search(r"[^A-Za-z0-9_@%+=:,./$-]", escaped) else escaped


def _mark(text: str, comment: str) -> str:
    line = (
        f"Written by `buswarden install-units` ({_digest(text)}); the command keeps changed files."
    )
    return comment.format(line) + text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
