"""The types of a catalogue file: an interface, and the rules of its plugs and slots.

docs/policy.md explains the format with an example. msgspec checks the shape; `policy.snaps.library` reads the
files, and checks what stands in the strings.
"""

from typing import Final, Literal

import msgspec

System = Literal["classic", "core"]
SYSTEMS: Final[tuple[System, ...]] = ("classic", "core")
Confinement = Literal["strict", "classic"]

# One alternative, or several.
Texts = str | tuple[str, ...]

# Who the other end is, as seen from the connection that a rule is about. Absent: anybody.
OtherEnd = Literal[
    "host",
    "plug",  # the apps that have the plug
    "slot",  # who provides the slot: its apps, or the host if it is the system's
    "slot-app",  # the slot's apps; nobody if the slot is the system's
    "same-snap",
    "same-app",
]

AttributeType = Literal[
    "bus",  # session or system
    "bus-name",  # a well-known name, no pattern
    "name-element",  # what may follow a `.` in one
    "text",
    "flag",  # true or false; a rule that needs it needs true
]


class PeerBySystem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Other ends that are not the same on every system; any of those that are listed."""

    classic: tuple[OtherEnd, ...]
    core: tuple[OtherEnd, ...]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """A rule. Several alternatives in its fields mean each combination."""

    access: tuple[Literal["send", "receive", "own", "see"], ...]
    deny: bool = False
    bus: str | None = None
    name: Texts | None = None
    path: Texts | None = None
    interface: Texts | None = None
    member: Texts | None = None
    peer: OtherEnd | PeerBySystem | None = None
    # Conditions: the rule is left out where one is not met.
    on: System | None = None
    slot_is: Literal["app", "system"] | None = None
    confinement: Confinement | None = None
    # Attributes that must be there, e.g. `plug.action-prefix`; those of type `flag` must be true.
    needs: tuple[str, ...] = ()
    never: str | None = None  # why this is kept for the record but gives no rule

    def other_ends(self, system: System) -> tuple[OtherEnd | None, ...]:
        """Return who the other end may be; None is anybody."""
        if isinstance(self.peer, PeerBySystem):
            return self.peer.classic if system == "classic" else self.peer.core
        return (self.peer,)


class Attribute(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"
):
    """An attribute that a plug or slot has in the snap's own description."""

    type: AttributeType
    required: bool = False
    default: str | None = None  # may have a placeholder


class Attributes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The attributes that rules use. Others are allowed and not looked at."""

    plug: dict[str, Attribute] = {}
    slot: dict[str, Attribute] = {}


class Side(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rules of the apps that have the plug, or of those that have the slot."""

    permanent: tuple[Entry, ...] = ()  # connected or not
    connected: tuple[Entry, ...] = ()  # once for each connection


class Interface(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"
):
    """A file. Its name without `.toml` is the interface's."""

    summary: str
    # Where the system itself has a slot of this interface.
    system_slot: tuple[System, ...] = ()
    # Where it has one if the program behind it is installed: the snaps file says so (`system-slots`).
    system_slot_if_there: tuple[System, ...] = ()
    # Attributes that must be equal in plug and slot for a connection to give rules.
    same: tuple[str, ...] = ()
    attributes: Attributes = Attributes()
    plug: Side = Side()
    slot: Side = Side()
    # In the file of this name alone: the rules of every app of every snap.
    every_snap: tuple[Entry, ...] = ()


EVERY_SNAP: Final = "every-snap"
