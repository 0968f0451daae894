"""Real message buses for tests: dbus-daemon and dbus-broker, private, on a socket in a given folder.

Both allow everything that a stock session bus allows. `services` makes names activatable: a name and the
argv that the bus starts for it, with DBUS_STARTER_ADDRESS in its environment.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from integration.harness.processes import PROJECT, PYTHON, running

DAEMON: Final = "dbus-daemon"
BROKER: Final = "dbus-broker"
KINDS: Final = (DAEMON, BROKER)
# dbus-daemon with Containers1, which `make containers1-daemon` builds: the engine of the same name works with it.
CONTAINERS1: Final = "containers1"
CONTAINERS1_DAEMON: Final = PROJECT / ".cache" / "containers1" / "prefix" / "bin" / DAEMON
# How a note of .ci/containers1-daemon begins if it is not the machine that lacks something.
BUILD_FAILED: Final = "the build failed"
# Those of a session, which its own defaults are below.
CONTAINERS1_LIMITS: Final = {
    "max_containers": 10_000,
    "max_containers_per_user": 10_000,
    "max_container_metadata_bytes": 65_536,
    "max_connections_per_container": 16,
}

# What /usr/share/dbus-1/session.conf says, but for its folders of services.
_CONFIG: Final = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <keep_umask/>
  <listen>{address}</listen>
  <auth>EXTERNAL</auth>
  <servicedir>{services}</servicedir>
  <policy context="default">
    {connect}
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
  <limit name="max_incoming_bytes">1000000000</limit>
  <limit name="max_incoming_unix_fds">250000000</limit>
  <limit name="max_outgoing_bytes">1000000000</limit>
  <limit name="max_outgoing_unix_fds">250000000</limit>
  <limit name="max_message_size">1000000000</limit>
  <limit name="service_start_timeout">120000</limit>
  <limit name="auth_timeout">240000</limit>
  <limit name="pending_fd_timeout">150000</limit>
  <limit name="max_completed_connections">100000</limit>
  <limit name="max_incomplete_connections">10000</limit>
  <limit name="max_connections_per_user">100000</limit>
  <limit name="max_pending_service_starts">10000</limit>
  <limit name="max_names_per_connection">50000</limit>
  <limit name="max_match_rules_per_connection">50000</limit>
  <limit name="max_replies_per_connection">50000</limit>
  {limits}
</busconfig>
"""

Services = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bus:
    """A bus that runs."""

    kind: str
    address: str
    pid: int

    @property
    def forwards_unknown_fields(self) -> bool:
        """Whether header field 10 gets through."""
        return self.kind == BROKER


def why_no_containers1(cache: Path = CONTAINERS1_DAEMON.parents[2]) -> str:
    """Return why that daemon is not there, in words that blame the machine only if CI cannot mend it."""
    note = cache / "why-not"
    why = note.read_text().strip() if note.exists() else "run make containers1-daemon"
    is_excused = note.exists() and not why.startswith(BUILD_FAILED)
    return f"{'this machine has no' if is_excused else 'no'} dbus-daemon with Containers1: {why}"


@contextmanager
def open_bus(
    kind: str, folder: Path, services: Services | None = None, *, everybody: bool = False
) -> Iterator[Bus]:
    """Run a bus of that kind whose socket is `folder`/bus; `everybody`: for all users (dbus-daemon)."""
    if kind == CONTAINERS1:
        opening = open_containers1_daemon(folder, services, everybody=everybody)
    elif kind == DAEMON:
        opening = open_dbus_daemon(folder, services, everybody=everybody)
    else:
        assert not everybody, "not needed so far"
        opening = open_dbus_broker(folder, services)
    with opening as bus:
        yield bus


@contextmanager
def open_dbus_daemon(
    folder: Path, services: Services | None = None, *, everybody: bool = False
) -> Iterator[Bus]:
    """Run dbus-daemon: with its stock session configuration, unless something else is asked for."""
    address = f"unix:path={folder}/bus"
    how = "--session"
    if services is not None or everybody:
        config = _write_config(folder, address, services or {}, everybody=everybody)
        how = f"--config-file={config}"
    argv = [DAEMON, how, "--nofork", "--nopidfile", "--print-address=1", f"--address={address}"]
    with running(argv, env=_bus_env(folder), log=folder / "bus.log") as process:
        yield Bus(kind=DAEMON, address=process.wait_line("unix:"), pid=process.pid)


@contextmanager
def open_containers1_daemon(
    folder: Path, services: Services | None = None, *, everybody: bool = False, **limits: int
) -> Iterator[Bus]:
    """Run the dbus-daemon that labels connections; what it labels makes no difference to who does not ask."""
    address = f"unix:path={folder}/bus"
    all_limits = CONTAINERS1_LIMITS | limits
    config = _write_config(folder, address, services or {}, everybody=everybody, limits=all_limits)
    argv = [str(CONTAINERS1_DAEMON), f"--config-file={config}", "--nofork", "--nopidfile"]
    argv += ["--print-address=1", f"--address={address}"]
    with running(argv, env=_bus_env(folder), log=folder / "bus.log") as process:
        yield Bus(kind=DAEMON, address=process.wait_line("unix:"), pid=process.pid)


@contextmanager
def open_dbus_broker(folder: Path, services: Services | None = None) -> Iterator[Bus]:
    """Run dbus-broker under a controller of our own (`integration.harness.controller`)."""
    path = folder / "bus"
    argv = [PYTHON, "-m", "integration.harness.controller", "--socket", str(path)]
    for name, command in (services or {}).items():
        argv += ["--service", f"{name}={shlex.join(command)}"]
    with running(argv, env=_bus_env(folder), log=folder / "bus.log") as process:
        pid = int(process.wait_line("READY").split()[1])
        yield Bus(kind=BROKER, address=f"unix:path={path}", pid=pid)


def _bus_env(folder: Path) -> dict[str, str]:
    # The runtime directory keeps a bus from looking for service files of whoever runs the tests.
    return {"XDG_RUNTIME_DIR": str(folder), "HOME": str(folder), "PYTHONPATH": str(PROJECT)}


def _write_config(
    folder: Path,
    address: str,
    services: Services,
    *,
    everybody: bool = False,
    limits: Mapping[str, int] | None = None,
) -> Path:
    service_folder = folder / "services"
    service_folder.mkdir()
    for name, command in services.items():
        text = f"[D-BUS Service]\nName={name}\nExec={shlex.join(command)}\n"
        (service_folder / f"{name}.service").write_text(text)
    config = folder / "bus.conf"
    text = _CONFIG.format(
        address=escape(address),
        services=escape(str(service_folder)),
        connect='<allow user="*"/>' if everybody else "",
        limits="\n".join(
            f'<limit name="{name}">{value}</limit>' for name, value in (limits or {}).items()
        ),
    )
    config.write_text(text)
    return config
