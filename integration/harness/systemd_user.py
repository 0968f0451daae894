"""A systemd of a test's own, of a user or of a whole system: in namespaces, with a bus that it starts.

Nothing of the machine's own systemd is touched or needed. What the services say on standard error is in a file.
"""

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from integration.harness.buses import BROKER, DAEMON
from integration.harness.clients import Outcome, run
from integration.harness.processes import PROJECT, PYTHON, Process, running, wait_until
from integration.harness.rawclient import RawClient

SYSTEMD: Final = Path("/usr/lib/systemd/systemd")
RUNTIME: Final = Path("/run/user/0")
SYSTEM_BUS: Final = "/run/dbus/system_bus_socket"
SUPERVISOR: Final = "buswarden.service"
GATE: Final = "buswarden-gate.service"
GATE_SOCKET: Final = "buswarden-gate.socket"
SERVICES: Final = (SUPERVISOR, GATE)
TIMEOUT: Final = 20.0  # seconds, for what takes systemd far less than one
# Runs a command in a cgroup of its own, the name of which comes first.
_GROUP: Final = """
set -e
mount --make-rprivate /
umount -R /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$1"
echo $$ > "/sys/fs/cgroup/$1/cgroup.procs"
shift
exec "$@"
"""
_REMOVE_GROUP: Final = """
mount --make-rprivate /
umount -R /sys/fs/cgroup 2>/dev/null
mount -t cgroup2 cgroup2 /sys/fs/cgroup
find "/sys/fs/cgroup/$1" -depth -type d -exec rmdir {} +
"""
# systemd believes that the machine was booted by it if /run/systemd/system is there.
_SCRIPT: Final = """
set -e
mount -t tmpfs run /run
mkdir -p /run/systemd/system /run/dbus "$XDG_RUNTIME_DIR"
chmod 700 "$XDG_RUNTIME_DIR"
umount /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo READY
exec "$0" --user --log-target=console --log-level=warning
"""
# None of the machine's own units: only what the first of them stand for, and a bus on which all may own and call.
_SYSTEM_SCRIPT: Final = """
set -e
umount /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /usr/local/share
for folder in /run /etc/systemd/system /usr/lib/systemd/system /usr/lib/systemd/system-generators \
    /etc/dbus-1/system.d /usr/local/share
do mount -t tmpfs tmpfs "$folder"; done
mkdir -p /run/dbus /run/lock
cd /usr/lib/systemd/system
for target in sysinit basic sockets shutdown multi-user final umount
do printf '[Unit]\\nDefaultDependencies=no\\n' > "$target.target"; done
cat > dbus.socket <<X
[Unit]
DefaultDependencies=no
[Socket]
ListenStream=/run/dbus/system_bus_socket
X
cat > dbus.service <<X
[Unit]
DefaultDependencies=no
Requires=dbus.socket
[Service]
Type=notify
NotifyAccess=main
ExecStart=/usr/bin/dbus-daemon --system --address=systemd: --nofork --nopidfile --systemd-activation
X
cat > /etc/dbus-1/system.d/test.conf <<X
<busconfig><policy context="default">
<allow own="org.example.Echo"/><allow send_destination="org.example.Echo"/>
</policy></busconfig>
X
echo READY
exec "$0" --system --unit=dbus.socket --log-target=console --log-level=warning
"""
_BUS_SOCKET: Final = "[Socket]\nListenStream=%t/bus\n"
_BUS_SERVICE: Final = """
[Unit]
Requires=dbus.socket
[Service]
Type=notify
NotifyAccess=main
Sockets=dbus.socket
ExecStart={}
"""
_BUSES: Final = {
    DAEMON: "/usr/bin/dbus-daemon --session --address=systemd: --nofork --nopidfile --systemd-activation",
    BROKER: "/usr/bin/dbus-broker-launch --scope user",
}
# dbus-broker does not run without a journal to write to.
_JOURNAL: Final = """
import os, selectors, socket
os.makedirs("/run/systemd/journal", exist_ok=True)
selector = selectors.DefaultSelector()
for name, kind in ("socket", socket.SOCK_DGRAM), ("dev-log", socket.SOCK_DGRAM), ("stdout", socket.SOCK_STREAM):
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(f"/run/systemd/journal/{name}")
    if kind == socket.SOCK_STREAM:
        sock.listen()
    selector.register(sock, selectors.EVENT_READ, kind)
print("JOURNAL", flush=True)
while True:
    for key, _ in selector.select():
        if key.data == socket.SOCK_STREAM:
            selector.register(key.fileobj.accept()[0], selectors.EVENT_READ, None)
        elif not key.fileobj.recv(1 << 20):
            selector.unregister(key.fileobj)
            key.fileobj.close()
"""


class UnavailableError(Exception):
    """Such a manager cannot be had here; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manager:
    """A manager that runs."""

    scope: str  # "user" or "system"
    process: Process
    pid_outside: int
    home: Path
    log: Path  # of the broker's services

    @property
    def bus(self) -> str:
        """The address of its bus, from outside."""
        path = RUNTIME / "bus" if self.scope == "user" else SYSTEM_BUS
        return f"unix:path={self.outside(path)}"

    @property
    def units(self) -> Path:
        """Where units are written to, from outside."""
        if self.scope == "user":
            return self.home / ".config" / "systemd" / "user"
        return self.outside("/etc/systemd/system")

    def outside(self, path: Path | str) -> Path:
        """Return by which path something in there is reached from here."""
        return Path(f"/proc/{self.pid_outside}/root{path}")

    def run(self, *argv: str, timeout: float = TIMEOUT) -> Outcome:
        """Run a command in there."""
        # Not in a cgroup of the manager: systemd would count it as a process of ours.
        spaces = ("--mount",) if self.scope == "user" else ("--mount", "--pid")
        inside = ("nsenter", f"--target={self.pid_outside}", *spaces, f"--wd={Path.cwd()}")
        return run(*inside, *argv, env=self.env, timeout=timeout)

    @property
    def env(self) -> dict[str, str]:
        if self.scope == "system":
            return {"HOME": str(self.home), "COLUMNS": "200"}
        return {
            **_env(self.home),
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path={RUNTIME}/bus",
            "COLUMNS": "200",
        }

    def cli(self, *args: str) -> Outcome:
        """Run our command line in there."""
        return self.run(PYTHON, "-m", "broker.cli", *args)

    def systemctl(self, *args: str) -> str:
        """Run systemctl and return what it printed."""
        outcome = self.run("systemctl", f"--{self.scope}", *args)
        assert outcome.code == 0, f"systemctl {args}: {outcome.err}\n{self.said()}"
        return outcome.out.strip()

    def get(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.systemctl("show", "--value", f"--property={name}", unit)

    def pid(self, unit: str) -> int:
        """Return the main process of a service, as it is seen in there; 0: it has none."""
        return int(self.get(unit, "MainPID"))

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a process in there."""
        # The shell's own kill: there need be no other.
        outcome = self.run("sh", "-c", f"kill -{int(number)} {pid}")
        assert outcome.code == 0, outcome.err

    def wait_state(self, unit: str, state: str) -> None:
        """Wait until the unit is in that state."""
        seen = wait_until(lambda: self.get(unit, "ActiveState") == state, TIMEOUT)
        assert seen, f"{unit} is {self.get(unit, 'ActiveState')}\n{self.said()}"

    def wait_other(self, unit: str, pid: int) -> int:
        """Wait until a service runs as another process than that, and return it."""
        seen = wait_until(lambda: self._serves_as(unit) not in (0, pid), TIMEOUT)
        assert seen, f"{unit} is not started again: {self.get(unit, 'Result')}\n{self.said()}"
        return self.pid(unit)

    def _serves_as(self, unit: str) -> int:
        return self.pid(unit) if self.get(unit, "ActiveState") == "active" else 0

    def drop_in(self, unit: str, text: str, name: str = "test") -> None:
        """Add to a unit."""
        folder = self.units / f"{unit}.d"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.conf").write_text(text)

    def connect(self) -> RawClient:
        """Return a connection to its bus."""
        return RawClient.connect(self.bus)

    def install(self) -> None:
        """Install the units of this checkout; what the services say goes to `log`."""
        outcome = self.cli("install-units", f"--{self.scope}", "--force")
        assert outcome.code == 0, outcome.err
        for unit in SERVICES:
            log = f"[Service]\nStandardOutput=append:{self.log}\nStandardError=append:{self.log}\n"
            self.drop_in(unit, log, name="log")
            if self.scope == "system":
                # This checkout may be in /tmp, of which the services have an empty one.
                self.drop_in(unit, f"[Service]\nBindReadOnlyPaths={PROJECT}\n", name="checkout")
        self.systemctl("daemon-reload")
        self.systemctl("start", GATE_SOCKET)

    def said(self) -> str:
        """Return what the services and the manager said."""
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        return f"--- services:\n{log}\n--- manager:\n{self.process.log}"


@contextmanager
def open_user_manager(folder: Path, bus: str = DAEMON) -> Iterator[Manager]:
    """Run a user's manager for as long as the block; all that it started ends with it.

    `bus` is what its session bus is. Raises UnavailableError.
    """
    _check_possible()
    home = folder / "home"
    units = home / ".config" / "systemd" / "user"
    units.mkdir(parents=True)
    (units / "dbus.socket").write_text(_BUS_SOCKET)
    (units / "dbus.service").write_text(_BUS_SERVICE.format(_BUSES[bus]))
    argv = ["unshare", "--cgroup", "bash", "-c", _SCRIPT, str(SYSTEMD)]
    with _running_apart(argv, _env(home), folder / "systemd.log") as process:
        manager = Manager(
            scope="user",
            process=process,
            pid_outside=process.pid,
            home=home,
            log=folder / "services.log",
        )
        _wait_running(manager)
        inside = ("nsenter", f"--target={process.pid}", "--mount")
        with running([*inside, PYTHON, "-c", _JOURNAL]) as journal:
            journal.wait_line("JOURNAL")
            try:
                yield manager
            finally:
                units_of_ours = ("buswarden*", "dbus.socket", "dbus.service")
                manager.run("systemctl", "--user", "stop", *units_of_ours)


@contextmanager
def open_system_manager(folder: Path) -> Iterator[Manager]:
    """Run a system's manager for as long as the block, as the first process of a namespace. Raises UnavailableError."""
    _check_possible()
    argv = ["unshare", "--cgroup", "--pid", "--fork", "--kill-child", "--mount-proc"]
    argv += ["bash", "-c", _SYSTEM_SCRIPT, str(SYSTEMD)]
    with _running_apart(argv, {"container": "test"}, folder / "systemd.log") as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        manager = Manager(
            scope="system",
            process=process,
            pid_outside=int(children[0]),
            home=folder,
            log=folder / "services.log",
        )
        _wait_running(manager)
        try:
            yield manager
        finally:
            # The kernel ends all others in there with the first one.
            os.kill(manager.pid_outside, signal.SIGKILL)


def _check_possible() -> None:
    if os.geteuid() != 0:
        raise UnavailableError("the kernel lets only root have cgroups for a systemd of its own")
    if not SYSTEMD.exists():
        raise UnavailableError(f"there is no {SYSTEMD}")


@contextmanager
def _running_apart(argv: Sequence[str], env: Mapping[str, str], log: Path) -> Iterator[Process]:
    """Run a command, in mounts and a cgroup of its own, that says READY. Raises UnavailableError."""
    group = f"buswarden-test-{os.urandom(6).hex()}"
    apart = ["unshare", "--mount", "bash", "-c"]
    with running([*apart, _GROUP, "sh", group, *argv], env=env, log=log) as process:
        try:
            process.wait_line("READY")
        except EOFError:
            raise UnavailableError(
                f"the machine does not let us mount what systemd needs: {process.log[-200:]}"
            ) from None
        yield process
    # What systemd started may take a moment to be gone, and cgroups outlive namespaces.
    removed = wait_until(lambda: run(*apart, _REMOVE_GROUP, "sh", group).code == 0, TIMEOUT)
    assert removed, f"there is still something in the cgroup {group}"


def _env(home: Path) -> dict[str, str]:
    # dbus-daemon asks the user database for the home directory, unless this one is there.
    data = str(home / ".local" / "share")
    return {"HOME": str(home), "XDG_DATA_HOME": data, "XDG_RUNTIME_DIR": str(RUNTIME)}


def _wait_running(manager: Manager) -> None:
    def is_running() -> bool:
        outcome = manager.run("systemctl", f"--{manager.scope}", "is-system-running")
        return outcome.out.strip() in {"running", "degraded"}

    if not wait_until(is_running, TIMEOUT):
        raise UnavailableError(
            f"the machine's systemd does not run in here: {manager.process.log[-200:]}"
        )
