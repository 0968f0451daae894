"""The snaps of a system: apps, plugs, slots, attributes and connections.

Input from outside is checked here. SnapError names the plug or slot and the problem.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from policy.globs import PatternError, check_bus_name
from policy.rules import Identity
from policy.snaps.catalogue_schema import Attribute, Confinement, Interface, System
from policy.snaps.templates import fill_text

SNAP_TYPE: Final = "io.snapcraft.snapd"  # container type of snaps' sandboxes
MAX_ATTRIBUTE: Final = 255  # characters; no name on D-Bus is longer

_SNAP: Final = re.compile(r"[a-z0-9](?:-?[a-z0-9])*(?:_[a-z0-9]{1,10})?")
# A hook is an app called `hook.NAME`, with a security tag of the same form.
_APP: Final = re.compile(r"(?:hook\.)?[A-Za-z0-9](?:-?[A-Za-z0-9])*")
_PORT: Final = re.compile(r"[a-z](?:-?[a-z0-9])*")
_ELEMENT: Final = re.compile(r"[A-Za-z0-9_-]+")
MAX_SNAP: Final = 51  # characters of name and instance key


class SnapError(ValueError):
    """A snap, plug, slot or connection makes no sense. Nothing was changed."""


class Port(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plug or slot."""

    interface: str
    attributes: dict[str, Any] = {}
    apps: tuple[str, ...] | None = None  # apps with the plug or slot; None: all apps


class Snap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A snap. `name` includes the instance key."""

    name: str
    apps: tuple[str, ...] = ()
    plugs: dict[str, Port] = {}
    slots: dict[str, Port] = {}
    confinement: Confinement = "strict"
    system: bool = False  # the snap's slots belong to the host

    def apps_of(self, port: Port) -> tuple[str, ...]:
        """Return the apps with the plug or slot."""
        return self.apps if port.apps is None else port.apps


class Connection(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A plug and a slot that are connected now."""

    plug_snap: str
    plug: str
    slot_snap: str
    slot: str

    def __str__(self) -> str:
        return f"{self.plug_snap}:{self.plug} {self.slot_snap}:{self.slot}"


class World(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The input of a compilation. Connections are pairs of `SNAP:PLUG` and `SNAP:SLOT`."""

    system: System = "classic"
    # Interfaces with a system slot on this machine, beside interfaces that always have such a slot.
    system_slots: tuple[str, ...] = msgspec.field(default=(), name="system-slots")
    snaps: tuple[Snap, ...] = ()
    connections: tuple[tuple[str, str], ...] = ()


def parse_connection(plug: str, slot: str) -> Connection:
    """Return the connection of `SNAP:PLUG` and `SNAP:SLOT`. Raises SnapError."""
    plug_snap, plug_name = _split(plug, "SNAP:PLUG")
    slot_snap, slot_name = _split(slot, "SNAP:SLOT")
    return Connection(plug_snap=plug_snap, plug=plug_name, slot_snap=slot_snap, slot=slot_name)


def parse_world(data: object) -> World:
    """Return the world that decoded JSON or TOML describes. Raises SnapError."""
    try:
        return msgspec.convert(data, World)
    except msgspec.ValidationError as exc:
        raise SnapError(str(exc)) from None


def tag_of(snap: str, app: str) -> str:
    """Return the security tag of an app."""
    return f"snap.{snap}.{app}"


def identity_of(snap: str, app: str | None) -> Identity:
    """Return the identity of an app on the bus."""
    return Identity(type=SNAP_TYPE, app=snap, component=app)


def check_snap(snap: Snap) -> None:
    """Accept a snap with valid names. Raises SnapError."""
    if len(snap.name) > MAX_SNAP or not _SNAP.fullmatch(snap.name):
        raise SnapError(f"not a snap's name: {snap.name[:60]!r}")
    _check_all(snap.apps, _APP, f"snap {snap.name}: not an app's name")
    if snap.system and snap.apps:
        raise SnapError(f"snap {snap.name}: the system's snap has no apps of its own")
    for what, ports in (("plug", snap.plugs), ("slot", snap.slots)):
        _check_all(ports, _PORT, f"snap {snap.name}: not a {what}'s name")
        for name, port in ports.items():
            _check_all(port.apps or (), _APP, f"{what} {snap.name}:{name}: not an app's name")
            if unknown := set(port.apps or ()) - set(snap.apps):
                text = f"{what} {snap.name}:{name}: the snap has no app {min(unknown)!r}"
                raise SnapError(text)


def attribute_values(
    interface: Interface, side: str, snap: Snap, name: str, port: Port
) -> dict[str, str]:
    """Return the placeholder values of a port's attributes. Raises SnapError."""
    declared = getattr(interface.attributes, side)
    values: dict[str, str] = {}
    for key, attribute in declared.items():
        value = port.attributes.get(key)
        where = f"{side} {snap.name}:{name}: attribute {key!r}"
        if value is None and attribute.default is not None:
            value = fill_text(attribute.default, snap_values(snap))
        if value is None:
            if attribute.required:
                raise SnapError(f"{where} is missing")
            continue
        if attribute.type == "flag":
            if not isinstance(value, bool):
                raise SnapError(f"{where} is neither true nor false")
            if value:  # false counts as absent, as in snapd
                values[f"{side}.{key}"] = "true"
            continue
        values[f"{side}.{key}"] = _check_value(attribute, value, where)
        values[f"{side}.{key}:path"] = "/" + value.replace(".", "/")
    return values


def snap_values(snap: Snap) -> dict[str, str]:
    """Return the placeholder values of a snap."""
    # In desktop paths snapd replaces `-` and the separator of the instance key by `_`.
    return {"snap": snap.name, "snap:desktop": snap.name.replace("-", "_")}


def app_values(tag: str) -> dict[str, str]:
    """Return the placeholder values of an app."""
    return {"tag:path": re.sub(r"[^A-Za-z0-9]", lambda found: f"_{ord(found[0]):02x}", tag)}


def samples(interface: Interface, sides: Iterable[str]) -> dict[str, str]:
    """Return a sample for each placeholder that rules of some sides may have."""
    found = {"snap": "x", "snap:desktop": "x", "tag:path": "x"}
    for side in sides:
        declared: Mapping[str, Attribute] = getattr(interface.attributes, side)
        for key, attribute in declared.items():
            if attribute.type in {"text", "flag"}:
                continue  # a text could contain a pattern, and a flag has no placeholder
            found[f"{side}.{key}"] = "x.x" if attribute.type == "bus-name" else "x"
            found[f"{side}.{key}:path"] = "/x"
    return found


def _split(text: str, form: str) -> tuple[str, str]:
    snap, colon, name = text.partition(":")
    if not colon or not snap or not name:
        raise SnapError(f"not {form}: {text[:100]!r}")
    return snap, name


def _check_all(names: Iterable[str], pattern: re.Pattern[str], problem: str) -> None:
    for name in names:
        if not pattern.fullmatch(name):
            raise SnapError(f"{problem}: {name[:60]!r}")


def _check_value(attribute: Attribute, value: object, where: str) -> str:
    if not isinstance(value, str):
        raise SnapError(f"{where} is not a text")
    if not value or len(value) > MAX_ATTRIBUTE:
        raise SnapError(f"{where} is empty or longer than {MAX_ATTRIBUTE} characters")
    match attribute.type:
        case "bus" if value not in {"session", "system"}:
            raise SnapError(f"{where} is neither 'session' nor 'system': {value[:60]!r}")
        case "bus-name":
            try:
                check_bus_name(value)
            except PatternError as exc:
                raise SnapError(f"{where} is no bus name: {exc}") from None
            if value.startswith(":"):
                raise SnapError(f"{where} is a unique name: {value[:60]!r}")
        case "name-element" if not _ELEMENT.fullmatch(value):
            raise SnapError(f"{where} has other characters than letters, digits, _ and -")
        case _:
            pass
    return value
