"""The operator's configuration, from flags, a TOML file and the environment.

    scope = "user"                  # or "system"
    runtime_dir = "/run/buswarden"
    bus_gone_seconds = 300          # 0: never
    engine = "gate"                 # or "containers1"; default: containers1 on each bus that has it
    [buses]
    session = "unix:path=/run/user/1000/bus"
    [limits]
    max_containers = 100

Flags take precedence over the file, and the file over the environment. Unknown keys are errors.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from broker.control_protocol.messages import BusSpec, SandboxLimits
from broker.posix.files import read_small
from broker.wire.address import MAX_PATH, parse_address
from broker.wire.errors import ConfigError

Scope = Literal["user", "system"]
EngineName = Literal["gate", "containers1"]

SYSTEM_RUNTIME_DIR: Final = Path("/run/buswarden")
SYSTEM_BUS: Final = "unix:path=/run/dbus/system_bus_socket"
CONTAINERS: Final = "containers"
# Seconds after which a lost bus counts as gone for good; 0: never. Restarting a bus takes far less.
BUS_GONE_SECONDS: Final = 300
# Characters of the longest file name of a socket: containers/dbus-XXXXXXXXXXXX
_ROOM_FOR_NAMES: Final = len(f"/{CONTAINERS}/dbus-") + 12
# Names of buses are shown to people, and are keys of the control protocol.
_BUS_NAME: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")


class ConfiguredLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits to everything that callers and sandboxes can grow.

    The first four have dbus-daemon's names.
    """

    max_containers: int = 10_000
    max_containers_per_user: int = 10_000
    max_connections_per_container: int = 16
    max_container_metadata_bytes: int = 65_536
    bytes_held: int = SandboxLimits().bytes_held
    bytes_queued: int = SandboxLimits().bytes_queued
    pending_calls: int = SandboxLimits().pending_calls
    match_rules: int = SandboxLimits().match_rules
    names: int = SandboxLimits().names
    tracked_names: int = SandboxLimits().tracked_names
    rule_steps: int = SandboxLimits().rule_steps
    fds: int = SandboxLimits().fds
    messages_per_second: int = SandboxLimits().messages_per_second
    log_lines_per_second: int = SandboxLimits().log_lines_per_second
    handshake_seconds: int = SandboxLimits().handshake_seconds
    message_seconds: int = SandboxLimits().message_seconds

    def for_sandbox(self) -> SandboxLimits:
        """Return the limits that the gate enforces."""
        values = msgspec.structs.asdict(self)
        mine = {name: values[name] for name in SandboxLimits.__struct_fields__ if name in values}
        return SandboxLimits(connections=self.max_connections_per_container, **mine)


# Bytes of a configuration file. One with all keys has two thousand.
MAX_FILE: Final = 1024 * 1024
SYSTEM_LIMITS: Final = ConfiguredLimits(
    max_containers=512, max_containers_per_user=16, max_container_metadata_bytes=4096
)

# The sensible range of a limit, by the last word of its name.
_RANGES: Final = {"second": (1, 10**9), "seconds": (1, 24 * 60 * 60)}


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The whole configuration of a supervisor. The first bus is the primary one."""

    scope: Scope
    buses: tuple[BusSpec, ...]
    runtime_dir: Path
    limits: ConfiguredLimits
    bus_gone_seconds: int = BUS_GONE_SECONDS
    engine: EngineName | None = None  # None: containers1 on each bus that has it


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    scope: Scope | None = None
    engine: EngineName | None = None
    runtime_dir: str | None = None
    bus_gone_seconds: int = BUS_GONE_SECONDS
    buses: dict[str, str] = {}
    limits: dict[str, int] = {}


def load_config(
    path: Path | None = None,
    *,
    scope: str | None = None,
    engine: EngineName | None = None,
    buses: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Return the configuration from flags, the file if there is one, and the environment.

    The result may have no bus, because the caller may be able to start one. Raises ConfigError.
    """
    environ = os.environ if environ is None else environ
    file = _load_file(path) if path is not None else _File()
    chosen: Scope = _check_scope(scope) or file.scope or "user"
    addresses = dict(buses or file.buses or _find_buses(chosen, environ))
    runtime_dir = _find_runtime_dir(chosen, file, environ)
    return Config(
        scope=chosen,
        buses=tuple(_make_bus(name, addresses[name], environ) for name in addresses),
        runtime_dir=runtime_dir,
        limits=_make_limits(chosen, file.limits, path),
        bus_gone_seconds=_check_bus_gone(file.bus_gone_seconds, path),
        engine=engine or file.engine,
    )


def _load_file(path: Path) -> _File:
    try:
        data = read_small(path, MAX_FILE)
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    try:
        return msgspec.toml.decode(data, type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def _check_scope(text: str | None) -> Scope | None:
    match text:
        case None | "user" | "system":
            return text
        case _:
            raise ConfigError(f"scope must be user or system, not {text[:40]!r}")


def _find_buses(scope: Scope, environ: Mapping[str, str]) -> dict[str, str]:
    if scope == "system":
        return {"system": environ.get("DBUS_SYSTEM_BUS_ADDRESS") or SYSTEM_BUS}
    address = environ.get("DBUS_SESSION_BUS_ADDRESS")
    return {"session": address} if address else {}


def _make_bus(name: str, address: str, environ: Mapping[str, str]) -> BusSpec:
    if not name or not _BUS_NAME.issuperset(name) or len(name) > 64:
        raise ConfigError(
            f"invalid bus name {name[:40]!r}: use up to 64 small letters, digits, - and _"
        )
    parse_address(address, runtime_dir=environ.get("XDG_RUNTIME_DIR"))
    return BusSpec(name=name, address=address)


def _check_bus_gone(seconds: int, path: Path | None) -> int:
    least, most = _RANGES["seconds"]
    if seconds and not least <= seconds <= most:
        raise ConfigError(
            f"{path}: bus_gone_seconds cannot be {seconds}: use {least} to {most}, or 0 for never"
        )
    return seconds


def _find_runtime_dir(scope: Scope, file: _File, environ: Mapping[str, str]) -> Path:
    if file.runtime_dir is not None:
        path = Path(file.runtime_dir)
    elif scope == "system":
        path = SYSTEM_RUNTIME_DIR
    elif folder := environ.get("XDG_RUNTIME_DIR"):
        path = Path(folder) / "buswarden"
    else:
        raise ConfigError("XDG_RUNTIME_DIR is not set: set it, or configure runtime_dir")
    if not path.is_absolute():
        raise ConfigError(f"runtime_dir must be an absolute path, not {str(path)[:80]!r}")
    if len(os.fsencode(path)) + _ROOM_FOR_NAMES > MAX_PATH:
        raise ConfigError(f"runtime_dir is too long for the paths of sockets in it: {path}")
    return path


def _make_limits(scope: Scope, given: Mapping[str, int], path: Path | None) -> ConfiguredLimits:
    defaults = SYSTEM_LIMITS if scope == "system" else ConfiguredLimits()
    for name, value in given.items():
        if name not in ConfiguredLimits.__struct_fields__:
            raise ConfigError(f"{path}: unknown limit {name[:40]!r}")
        least, most = _RANGES.get(name.rpartition("_")[2], (0, 2**63 - 1))
        if not least <= value <= most:
            raise ConfigError(f"{path}: limit {name} cannot be {value}: use {least} to {most}")
    return msgspec.structs.replace(defaults, **given)
