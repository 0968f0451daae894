"""The catalogue in memory: the shipped files, and files of the administrator and the user.

An own file adds an interface, or replaces the interface of the same name. A file with any error is
refused as a whole. The error has the file name and the line.
"""

import re
import tomllib
from collections.abc import Collection, Iterable, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final, Literal

import msgspec

from policy.snaps.catalogue_schema import EVERY_SNAP, SYSTEMS, Entry, Interface, System
from policy.snaps.installed import Port, Snap, SnapError, samples
from policy.snaps.templates import EntryError, Template, find_placeholders, make_template

# Directories of own files. Later directories replace interfaces of earlier ones. The caller opens
# the directories.
OWN_DIRECTORIES: Final = ("/etc/buswarden/interfaces.d", "~/.config/buswarden/interfaces.d")
SUFFIX: Final = ".toml"
MAX_FILE: Final = 1024 * 1024  # characters; the largest shipped file has 25 000

Where = Literal[
    "plug.permanent", "plug.connected", "slot.permanent", "slot.connected", "every-snap"
]
SECTIONS: Final[tuple[Where, ...]] = (
    "plug.permanent",
    "plug.connected",
    "slot.permanent",
    "slot.connected",
    "every-snap",
)
_NAME: Final = re.compile(r"[a-z](?:-?[a-z0-9])*")
_AT_LINE: Final = re.compile(r"\(at line ([0-9]+), column [0-9]+\)|\(at end of document\)")
_AT_PLACE: Final = re.compile(r" - at `\$([^`]*)`")
_STEP: Final = re.compile(r"\.([A-Za-z0-9_-]+)|\[([0-9]+|\.\.\.)\]")
_QUOTED: Final = re.compile(r"['`]([^'`]*)['`]")
_UNKNOWN: Final = re.compile(r"unknown field `([^`]*)`")


class CatalogueError(ValueError):
    """A catalogue file is invalid. The text of the error is `FILE:LINE: problem`."""

    def __init__(self, file: str, line: int, problem: str) -> None:
        super().__init__(f"{file}:{line}: {problem}")
        self.file: Final = file
        self.line: Final = line
        self.problem: Final = problem


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """An interface that was read, with prepared rules."""

    name: str
    file: str
    interface: Interface
    sections: dict[Where, tuple[Template, ...]]


class Library(msgspec.Struct, frozen=True, kw_only=True):
    """All interfaces with rules, and the rules of every snap."""

    interfaces: dict[str, Known]
    every_snap: Known

    def system_snap(self, system: System, name: str = "snapd", there: Collection[str] = ()) -> Snap:
        """Return the snap that stands for the host, with the host's slots on a system.

        `there` are interfaces with a slot on this machine, beside interfaces with a slot on every
        such system. Raises SnapError for an interface that cannot have a slot there.
        """
        for each in there:
            known = self.interfaces.get(each)
            if known is None or system not in (
                *known.interface.system_slot,
                *known.interface.system_slot_if_there,
            ):
                raise SnapError(f"system-slots: a {system} system has no slot {each[:60]!r}")
        slots = {
            known.name: Port(interface=known.name)
            for known in self.interfaces.values()
            if system in known.interface.system_slot or known.name in there
        }
        return Snap(name=name, slots=slots, system=True)


def load_library(own: Iterable[Traversable] = ()) -> Library:
    """Read the shipped catalogue, and then the directories of own files.

    Raises CatalogueError.
    """
    # A shipped file is shown by name alone, because the location depends on the installation.
    shipped = _files(resources.files("policy.catalogue"))
    files = [(file, file.name) for file in shipped]
    files += [(file, str(file)) for directory in own for file in _files(directory)]
    loaded = [_load(file, shown) for file, shown in files]
    found = {known.name: known for known in loaded}
    every_snap = found.pop(EVERY_SNAP)
    return Library(interfaces=found, every_snap=every_snap)


def parse_interface(text: str, *, name: str, file: str) -> Known:
    """Return the interface that the text of a file describes. Raises CatalogueError."""
    if not _NAME.fullmatch(name):
        raise CatalogueError(file, 1, f"not an interface's name: {name[:60]!r}")
    if len(text) > MAX_FILE:
        raise CatalogueError(file, 1, f"longer than {MAX_FILE} characters")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise _toml_error(file, text, str(exc)) from None
    except RecursionError:
        raise CatalogueError(file, 1, "nested too deeply") from None
    try:
        interface = msgspec.convert(data, Interface)
    except msgspec.ValidationError as exc:
        raise _shape_error(file, text, str(exc)) from None
    _check_whole(interface, name, file, text)
    sections: dict[Where, tuple[Template, ...]] = {
        where: _make_section(interface, where, file, text) for where in SECTIONS
    }
    return Known(name=name, file=file, interface=interface, sections=sections)


def _files(directory: Traversable) -> list[Traversable]:
    try:
        if not directory.is_dir():
            return []
        files = [each for each in directory.iterdir() if each.name.endswith(SUFFIX)]
    except OSError as exc:
        raise CatalogueError(str(directory), 1, f"cannot be read: {exc}") from exc
    return sorted(files, key=lambda each: each.name)


def _load(file: Traversable, shown: str) -> Known:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise CatalogueError(shown, 1, f"cannot be read: {exc}") from exc
    return parse_interface(text, name=file.name.removesuffix(SUFFIX), file=shown)


def _check_whole(interface: Interface, name: str, file: str, text: str) -> None:
    if interface.every_snap and name != EVERY_SNAP:
        line = _line_of(text, [EVERY_SNAP, 0])
        raise CatalogueError(file, line, f"{EVERY_SNAP} rules outside {EVERY_SNAP}{SUFFIX}")
    for key in interface.same:
        for side in ("plug", "slot"):
            if key not in getattr(interface.attributes, side):
                line = _line_of(text, ["same"], key)
                raise CatalogueError(file, line, f"{side} has no attribute {key!r}")
    for side in ("plug", "slot"):
        for key, attribute in getattr(interface.attributes, side).items():
            line = _line_of(text, ["attributes", side, key, "default"])
            try:
                placeholders = find_placeholders(attribute.default or "")
            except ValueError as exc:
                raise CatalogueError(file, line, str(exc)) from None
            if unknown := set(placeholders) - {"snap"}:
                problem = f"unknown placeholder <{min(unknown)}>: a default may have <snap>"
                raise CatalogueError(file, line, problem)


def _make_section(interface: Interface, where: Where, file: str, text: str) -> tuple[Template, ...]:
    side, _, when = where.partition(".")
    sides = () if not when else ("plug", "slot") if when == "connected" else (side,)
    known = samples(interface, sides)
    attributes = {f"{side}.{key}" for side in sides for key in getattr(interface.attributes, side)}
    made = []
    for number, entry in enumerate(_entries(interface, where)):
        try:
            if when != "connected":
                _check_permanent(entry)
            made.append(make_template(entry, known, attributes))
        except EntryError as exc:
            line = _line_of(text, [*where.split("."), number, exc.key], exc.value)
            raise CatalogueError(file, line, str(exc)) from None
    return tuple(made)


def _entries(interface: Interface, where: Where) -> Sequence[Entry]:
    match where:
        case "plug.permanent":
            return interface.plug.permanent
        case "plug.connected":
            return interface.plug.connected
        case "slot.permanent":
            return interface.slot.permanent
        case "slot.connected":
            return interface.slot.connected
        case "every-snap":
            return interface.every_snap


def _check_permanent(entry: Entry) -> None:
    """Refuse conditions that only a connection can meet."""
    ends = {end for system in SYSTEMS for end in entry.other_ends(system)}
    for end in ("plug", "slot", "slot-app"):
        if end in ends:
            raise EntryError(f"without a connection there is no {end}", "peer", end)
    if entry.slot_is is not None:
        raise EntryError("without a connection slot-is has no meaning", "slot-is")


# -- finding the line ------------------------------------------------------------------------------


def _toml_error(file: str, text: str, problem: str) -> CatalogueError:
    found = _AT_LINE.search(problem)
    line = text.count("\n") + 1
    if found is not None and found[1] is not None:
        line = int(found[1])
    return CatalogueError(file, line, _AT_LINE.sub("", problem).strip())


def _shape_error(file: str, text: str, problem: str) -> CatalogueError:
    place = _AT_PLACE.search(problem)
    steps: list[str | int] = []
    for name, index in _STEP.findall(place[1] if place is not None else ""):
        steps.append(int(index) if index.isdigit() else name or "...")
    if (unknown := _UNKNOWN.search(problem)) is not None:
        steps.append(unknown[1])
    return CatalogueError(file, _nearest_line(text, steps, problem), _AT_PLACE.sub("", problem))


def _nearest_line(text: str, steps: list[str | int], problem: str) -> int:
    """Return the line of an error, also if a step is `...`.

    msgspec writes `...` instead of an attribute's name, so the attribute is searched.
    """
    if "..." not in steps:
        return _line_of(text, steps)
    at = steps.index("...")
    prefix = ".".join(str(step) for step in steps[:at])
    value = _QUOTED.search(problem)
    lines = text.splitlines()
    found = [1]
    for name in re.findall(rf"(?m)^\[{re.escape(prefix)}\.([A-Za-z0-9_-]+)\]", text):
        line = _line_of(text, [*steps[:at], name, *steps[at + 1 :]])
        if value is not None and value[1] in lines[line - 1]:
            return line
        found.append(line)
    return found[-1]


def _line_of(text: str, steps: Sequence[str | int], value: str = "") -> int:
    """Return the line of `[[plug.connected]]` number N, or of a key below; 1 if not found.

    TOML can be written in other ways than by headings and keys. In that case the result is the line
    of the nearest heading.
    """
    lines = text.splitlines()
    at, end = 0, len(lines)
    rest = list(steps)
    # The longest beginning of the steps that is a heading.
    for length in range(len(rest), 0, -1):
        names = [str(step) for step in rest[:length] if isinstance(step, str)]
        last = rest[length - 1]
        number = last if isinstance(last, int) else 0
        heading = _heading(lines, ".".join(names), number)
        if heading is not None:
            at, rest = heading, rest[length:]
            end = next((n for n in range(at + 1, len(lines)) if lines[n].startswith("[")), end)
            break
    key = next((step for step in rest if isinstance(step, str)), None)
    if key is None:
        return at + 1
    for n in range(at, end):
        if re.match(rf"[ \t]*\"?{re.escape(key)}\"?[ \t]*=", lines[n]):
            inside = (m for m in range(n, end) if value and f'"{value}"' in lines[m])
            return next(inside, n) + 1
    return at + 1


def _heading(lines: Sequence[str], name: str, number: int) -> int | None:
    pattern = re.compile(rf"[ \t]*\[\[?[ \t]*{re.escape(name)}[ \t]*\]\]?[ \t]*(#.*)?")
    found = [n for n, line in enumerate(lines) if pattern.fullmatch(line)]
    return found[number] if number < len(found) else None
