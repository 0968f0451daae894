"""Flatpak's metadata and overrides -> rules about the names that an app may use on each bus.

Files are passed in order of precedence: the app's metadata first, then overrides. A later entry for
a name replaces an earlier entry, and `none` removes the entry. Flatpak enforces the entries by
xdg-dbus-proxy, and adds options of its own (DEFAULTS). So the entries have the meaning that
policy.importers.xdg_dbus_proxy implements.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from policy.globs import PatternError, check_bus_name
from policy.importers.report import Imported, ImportFileError, Source, Unsaid, cut
from policy.importers.xdg_dbus_proxy import Argument, import_arguments
from policy.rules import AccessList, Rule

SESSION: Final = "session"
SYSTEM: Final = "system"
ACCESSIBILITY: Final = "accessibility"

_GROUPS: Final = {
    "Session Bus Policy": SESSION,
    "System Bus Policy": SYSTEM,
    "Accessibility Bus Policy": ACCESSIBILITY,
}
# Entries of [Context] sockets= that give access to an unfiltered bus.
_SOCKETS: Final = {"session-bus": SESSION, "system-bus": SYSTEM}
_POLICIES: Final = frozenset({"none", "see", "talk", "own"})


class Default(msgspec.Struct, frozen=True, kw_only=True):
    """An option that Flatpak adds for every app, with the source in Flatpak's code."""

    bus: str
    option: str  # {app} is the app's identifier
    source: str


_FILTERS: Final = "flatpak, flatpak_context_add_bus_filters()"
_A11Y_ROOT: Final = "/org/a11y/atspi/accessible/root"
_A11Y_REGISTRY: Final = "/org/a11y/atspi/registry"
_A11Y_CONTROLLER: Final = "/org/a11y/atspi/registry/deviceeventcontroller"


def _a11y(kind: str, rule: str, path: str) -> Default:
    return Default(
        bus=ACCESSIBILITY,
        option=f"--{kind}=org.a11y.atspi.Registry=org.a11y.atspi.{rule}@{path}",
        source="flatpak, flatpak_run_add_a11y_dbus_args()",
    )


DEFAULTS: Final = (
    Default(bus=SESSION, option="--own={app}.*", source=_FILTERS),
    Default(bus=SESSION, option="--own=org.mpris.MediaPlayer2.{app}.*", source=_FILTERS),
    Default(
        bus=SESSION,
        option="--call=org.freedesktop.portal.*=*",
        source="flatpak, flatpak_run_add_session_dbus_args()",
    ),
    Default(
        bus=SESSION,
        option="--broadcast=org.freedesktop.portal.*=@/org/freedesktop/portal/*",
        source="flatpak, flatpak_run_add_session_dbus_args()",
    ),
    Default(
        bus=ACCESSIBILITY,
        option="--sloppy-names",
        source="flatpak, flatpak_run_add_a11y_dbus_args()",
    ),
    _a11y("call", "Socket.Embed", _A11Y_ROOT),
    _a11y("call", "Socket.Unembed", _A11Y_ROOT),
    _a11y("call", "Registry.GetRegisteredEvents", _A11Y_REGISTRY),
    _a11y("call", "DeviceEventController.GetKeystrokeListeners", _A11Y_CONTROLLER),
    _a11y("call", "DeviceEventController.GetDeviceEventListeners", _A11Y_CONTROLLER),
    _a11y("call", "DeviceEventController.NotifyListenersSync", _A11Y_CONTROLLER),
    _a11y("call", "DeviceEventController.NotifyListenersAsync", _A11Y_CONTROLLER),
    # Name and rule were swapped until flatpak 2afb4cf8 (CVE-2026-93676).
    _a11y("broadcast", "Registry.EventListenerRegistered", _A11Y_REGISTRY),
    _a11y("broadcast", "Registry.EventListenerDeregistered", _A11Y_REGISTRY),
)


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    group: str
    key: str
    value: str
    file: str
    line: int


def import_flatpak(sources: Sequence[Source], *, app_id: str | None = None) -> Imported:
    """Return the rules of an app. Raises ImportFileError.

    Without `app_id`, the app's metadata must name the app.
    """
    reader = _Reader(app_id)
    for source in sources:
        for entry in _entries(source):
            reader.add(entry)
    rules: list[Rule] = []
    for bus in _GROUPS.values():
        imported = import_arguments(reader.arguments(bus), bus=bus)
        # Without any policy, an app has no system bus at all.
        if bus != SYSTEM or reader.has(bus):
            rules += imported.access.rules
            reader.unsaid += imported.unsaid
    return Imported(access=AccessList(rules=tuple(rules)), unsaid=tuple(reader.unsaid))


class _Reader:
    def __init__(self, app_id: str | None) -> None:
        self.unsaid: list[Unsaid] = []
        self._app_id = app_id
        self._policies: Final[dict[str, dict[str, _Entry]]] = {bus: {} for bus in _GROUPS.values()}
        self._unfiltered: Final[set[str]] = set()

    def add(self, entry: _Entry) -> None:
        if entry.group in _GROUPS:
            self._add_policy(entry)
        elif entry.group == "Context" and entry.key == "sockets":
            self._add_sockets(entry)
        elif entry.group == "Application" and entry.key == "name" and self._app_id is None:
            _check_name(entry, entry.value)
            self._app_id = entry.value

    def has(self, bus: str) -> bool:
        return bool(self._policies[bus]) or bus in self._unfiltered

    def arguments(self, bus: str) -> Iterator[Argument]:
        if bus in self._unfiltered:
            return
        yield Argument(text="--filter", file="flatpak", line=0)
        for number, default in enumerate(DEFAULTS, 1):
            if default.bus != bus:
                continue
            if "{app}" in default.option and self._app_id is None:
                reason = "left out: no file has the app's identifier"
                self._note(default.source, number, default.option, reason)
                continue
            text = default.option.replace("{app}", self._app_id or "")
            yield Argument(text=text, file=default.source, line=number)
        for name, entry in self._policies[bus].items():
            if entry.value != "none":
                yield Argument(text=f"--{entry.value}={name}", file=entry.file, line=entry.line)

    def _add_policy(self, entry: _Entry) -> None:
        _check_name(entry, entry.key.removesuffix(".*"))
        if entry.value in _POLICIES:
            self._policies[_GROUPS[entry.group]][entry.key] = entry
        else:
            reason = "an unknown policy: Flatpak ignores the entry"
            self._note(entry.file, entry.line, f"{entry.key}={entry.value}", reason)

    def _add_sockets(self, entry: _Entry) -> None:
        for word in entry.value.split(";"):
            socket = word.strip()
            bus = _SOCKETS.get(socket.removeprefix("!"))
            if bus is None:
                if socket.startswith("if:") and socket.split(":")[1] in _SOCKETS:
                    self._note(entry.file, entry.line, socket, "left out: a conditional entry")
            elif socket.startswith("!"):
                self._unfiltered.discard(bus)
            else:
                self._unfiltered.add(bus)

    def _note(self, file: str, line: int, text: str, reason: str) -> None:
        self.unsaid.append(Unsaid(file=file, line=line, text=cut(text), reason=reason))


def _entries(source: Source) -> Iterator[_Entry]:
    """Read a key file as GLib does."""
    group: str | None = None
    # Only \n ends a line. Other line ends of Unicode may occur in values.
    for number, raw in enumerate(source.text.split("\n"), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            if not line.endswith("]") or "[" in line[1:] or "]" in line[:-1] or len(line) == 2:
                raise ImportFileError(source.name, number, f"bad group {cut(line)}")
            group = line[1:-1]
            continue
        key, equals, value = line.partition("=")
        if not equals or not key.strip():
            raise ImportFileError(source.name, number, f"neither key=value nor group: {cut(line)}")
        if group is None:
            raise ImportFileError(source.name, number, "a key before the first group")
        yield _Entry(
            group=group, key=key.strip(), value=value.strip(), file=source.name, line=number
        )


def _check_name(entry: _Entry, name: str) -> None:
    try:
        check_bus_name(name)
    except PatternError as exc:
        problem = f"{cut(name)!r} is no bus name: {exc.problem}"
        raise ImportFileError(entry.file, entry.line, problem) from None
    if name.startswith(":"):
        raise ImportFileError(entry.file, entry.line, f"{cut(name)!r} is a unique name")
