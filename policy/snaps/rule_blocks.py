"""The rules that a plug, slot or connection gives, for each app.

This module decides which entries of the catalogue apply, and which peers the rules have.
`policy.snaps.compiler` keeps the blocks and makes lists of the blocks.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Final

import msgspec

from policy.rules import Peer, Rule
from policy.snaps.catalogue_schema import OtherEnd, System
from policy.snaps.installed import (
    SNAP_TYPE,
    Port,
    Snap,
    app_values,
    attribute_values,
    snap_values,
    tag_of,
)
from policy.snaps.library import Known, Library, Where
from policy.snaps.templates import Template, fill

HOST: Final = Peer(kind="host")
# on the bus a snap is an app, and the snap's apps are components
SAME_SNAP: Final = Peer(kind="same-app")
NO_VALUES: Final[Mapping[str, str]] = {}

Peers = tuple[Peer | None, ...]


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """Rules, and descriptions of rules that were left out because no message could match."""

    rules: tuple[Rule, ...] = ()
    left_out: tuple[str, ...] = ()


class End:
    """A plug or slot of a snap, with all facts that rules need. Raises SnapError."""

    def __init__(self, library: Library, side: str, snap: Snap, name: str) -> None:
        self.side: Final = side
        self.snap: Final = snap
        self.name: Final = name
        self.port: Final[Port] = (snap.plugs if side == "plug" else snap.slots)[name]
        self.apps: Final = sorted(set(snap.apps_of(self.port)))
        self.tags: Final = [tag_of(snap.name, app) for app in self.apps]
        known = library.interfaces.get(self.port.interface)
        self.known: Final[Known | None] = known
        self.values: Final = (
            NO_VALUES
            if known is None
            else attribute_values(known.interface, side, snap, name, self.port)
        )

    def __str__(self) -> str:
        return f"{self.snap.name}:{self.name}"

    @cached_property
    def peers(self) -> Peers:
        """Return the peers at this end.

        As in snapd, all apps of a snap together are a single peer.
        """
        if len(self.apps) > 1 and set(self.apps) == set(self.snap.apps):
            return (Peer(kind="app", type=SNAP_TYPE, app=self.snap.name),)
        return tuple(
            Peer(kind="app", type=SNAP_TYPE, app=self.snap.name, component=app) for app in self.apps
        )


class BlockMaker:
    """A maker of blocks for a system."""

    def __init__(self, library: Library, system: System) -> None:
        self._library: Final = library
        self._system: Final = system
        self._chosen: Final[dict[tuple[str, Where, str, bool], _Chosen]] = {}

    def every_snap(self, snap: Snap) -> dict[str, Block]:
        """Return the rules that each app has without any plug or slot."""
        known = self._library.every_snap
        chosen = self._choose(known, "every-snap", snap, system_slot=False)
        origin = f"{known.name} ({known.file})"
        return _blocks(snap, snap.apps, chosen, origin, NO_VALUES, _ALWAYS)

    def permanent(self, end: End) -> dict[str, Block]:
        """Return the rules that each app has because of a plug or slot, connected or not."""
        if end.known is None:
            return {}
        where: Where = "plug.permanent" if end.side == "plug" else "slot.permanent"
        chosen = self._choose(end.known, where, end.snap, system_slot=False)
        origin = f"{end.known.name} {end.side} {end} ({end.known.file})"
        return _blocks(end.snap, end.apps, chosen, origin, end.values, _ALWAYS)

    def connected(self, plug: End, slot: End) -> list[tuple[End, dict[str, Block]]]:
        """Return the rules that each app at either end has because of a connection."""
        known = plug.known
        if known is None:
            return []
        for key in known.interface.same:
            if plug.values.get(f"plug.{key}") != slot.values.get(f"slot.{key}"):
                return []
        is_system = slot.snap.system
        peers: dict[OtherEnd | None, Peers] = {
            **_ALWAYS,
            "plug": plug.peers,
            "slot": (HOST,) if is_system else slot.peers,
            "slot-app": () if is_system else slot.peers,
        }
        values = {**plug.values, **slot.values}
        plug_rules = self._choose(known, "plug.connected", plug.snap, system_slot=is_system)
        slot_rules = self._choose(known, "slot.connected", slot.snap, system_slot=is_system)
        about = f"connected {plug} {slot} ({known.file})"
        name = known.name
        return [
            (end, _blocks(end.snap, end.apps, chosen, f"{name} {end.side}, {about}", values, peers))
            for end, chosen in ((plug, plug_rules), (slot, slot_rules))
        ]

    def _choose(self, known: Known, where: Where, snap: Snap, *, system_slot: bool) -> "_Chosen":
        """Return the entries whose conditions are met."""
        key = (known.name, where, snap.confinement, system_slot)
        chosen = self._chosen.get(key)
        if chosen is None:
            kind = "system" if system_slot else "app"
            confinements: set[str | None] = {None, snap.confinement}
            if snap.confinement == "classic" and where != "every-snap":
                # Such a snap may do everything. So snapd gives the snap neither rules nor denials
                # of interfaces.
                confinements.remove(None)
            templates = [
                template
                for template in known.sections[where]
                if template.entry.never is None
                and template.entry.on in {None, self._system}
                and template.entry.slot_is in {None, kind}
                and template.entry.confinement in confinements
            ]
            chosen = self._chosen[key] = _Chosen(templates, self._system, where)
        return chosen


class _Chosen:
    """Templates, with a flag for templates that are the same for all apps of a snap."""

    def __init__(self, templates: list[Template], system: System, where: Where) -> None:
        self.templates: Final = [(each, each.entry.other_ends(system)) for each in templates]
        # A slot sends announcements to connected apps, and a plug does not.
        self.to_host: Final = where != "plug.connected"
        self.alike: Final = not any(
            "same-app" in ends or "tag:path" in template.placeholders
            for template, ends in self.templates
        )


_ALWAYS: Final[Mapping[OtherEnd | None, Peers]] = {
    None: (None,),
    "host": (HOST,),
    "same-snap": (SAME_SNAP,),
}


def _blocks(
    snap: Snap,
    apps: tuple[str, ...] | list[str],
    chosen: _Chosen,
    origin: str,
    values: Mapping[str, str],
    peers: Mapping[OtherEnd | None, Peers],
) -> dict[str, Block]:
    if not apps or not chosen.templates:
        return {}
    if chosen.alike:
        own_values = {**snap_values(snap), **values}
        block = _block(chosen, origin, own_values, peers)
        return {tag_of(snap.name, app): block for app in apps}
    made = {}
    for app in apps:
        tag = tag_of(snap.name, app)
        me = Peer(kind="app", type=SNAP_TYPE, app=snap.name, component=app)
        own_values = {**snap_values(snap), **app_values(tag), **values}
        ends = {**peers, "same-app": (me,)}
        made[tag] = _block(chosen, origin, own_values, ends)
    return made


def _block(
    chosen: _Chosen,
    origin: str,
    values: Mapping[str, str],
    peers: Mapping[OtherEnd | None, Peers],
) -> Block:
    rules: list[Rule] = []
    left_out: list[str] = []
    for template, ends in chosen.templates:
        if template.entry.needs and not values.keys() >= set(template.entry.needs):
            continue
        others = [peer for end in ends for peer in peers[end]]
        made, unmade = fill(template, others, origin, values, to_host=chosen.to_host)
        rules += made
        left_out += unmade
    return Block(rules=tuple(rules), left_out=tuple(left_out))
