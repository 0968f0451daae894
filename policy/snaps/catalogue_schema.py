"""The types of a catalogue file: an interface, with the rules of plugs and slots.

docs/policy.md explains the format with an example. msgspec checks the shape. `policy.snaps.library`
reads the files and checks the strings.
"""

from typing import Final, Literal

import msgspec

System = Literal["classic", "core"]
SYSTEMS: Final[tuple[System, ...]] = ("classic", "core")
Confinement = Literal["strict", "classic"]

# One alternative, or several.
Texts = str | tuple[str, ...]

# The other end, as seen from the connection that a rule is about. Absent means any other end.
OtherEnd = Literal[
    "host",
    "plug",  # the apps with the plug
    "slot",  # the provider of the slot: the slot's apps, or the host for a slot of the system
    "slot-app",  # the slot's apps; no peer for a slot of the system
    "same-snap",
    "same-app",
]

AttributeType = Literal[
    "bus",  # session or system
    "bus-name",  # a well-known name, no pattern
    "name-element",  # text that may follow a `.` in a bus name
    "text",
    "flag",  # true or false; a rule that needs the flag needs true
]


class PeerBySystem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Other ends that depend on the system; any of the listed ends."""

    classic: tuple[OtherEnd, ...]
    core: tuple[OtherEnd, ...]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """A rule. Several alternatives in the fields mean every combination."""

    access: tuple[Literal["send", "receive", "own", "see"], ...]
    deny: bool = False
    bus: str | None = None
    name: Texts | None = None
    path: Texts | None = None
    interface: Texts | None = None
    member: Texts | None = None
    peer: OtherEnd | PeerBySystem | None = None
    # Conditions. If a condition is not met, the rule is left out.
    on: System | None = None
    slot_is: Literal["app", "system"] | None = None
    confinement: Confinement | None = None
    # Attributes that must be present, e.g. `plug.action-prefix`. Attributes of type `flag` must be
    # true.
    needs: tuple[str, ...] = ()
    never: str | None = None  # the reason why the entry is kept for the record but gives no rule

    def other_ends(self, system: System) -> tuple[OtherEnd | None, ...]:
        """Return the possible other ends on a system; None is any."""
        if isinstance(self.peer, PeerBySystem):
            return self.peer.classic if system == "classic" else self.peer.core
        return (self.peer,)


class Attribute(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"
):
    """An attribute of a plug or slot in the snap's own description."""

    type: AttributeType
    required: bool = False
    default: str | None = None  # may have a placeholder


class Attributes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The attributes that rules use. Other attributes are allowed and ignored."""

    plug: dict[str, Attribute] = {}
    slot: dict[str, Attribute] = {}


class Side(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rules of apps with the plug, or of apps with the slot."""

    permanent: tuple[Entry, ...] = ()  # connected or not
    connected: tuple[Entry, ...] = ()  # once for each connection


class Interface(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"
):
    """A catalogue file. The file name without `.toml` is the name of the interface."""

    summary: str
    # Systems with a slot of this interface.
    system_slot: tuple[System, ...] = ()
    # Systems with such a slot if a program is installed. The snaps file states that
    # (`system-slots`).
    system_slot_if_there: tuple[System, ...] = ()
    # Attributes that must be equal in plug and slot. Otherwise a connection gives no rules.
    same: tuple[str, ...] = ()
    attributes: Attributes = Attributes()
    plug: Side = Side()
    slot: Side = Side()
    # Only in the file `every-snap.toml`: the rules of every app of every snap.
    every_snap: tuple[Entry, ...] = ()


EVERY_SNAP: Final = "every-snap"
