"""Snaps and their connections -> the access list of each app. Pure, and kept up to date.

A list consists of blocks: the rules of every snap, the rules of each plug and slot of the app, and
the rules of each connection. Connecting or disconnecting adds or removes the two blocks of the
connection and touches no other list. The order of blocks and rules depends on names alone, so the
same snaps and connections always give the same lists.

A refused operation (SnapError) changes nothing.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Final

import msgspec

from policy.rules import AccessList, Identity, Rule
from policy.snaps.installed import (
    Connection,
    Snap,
    SnapError,
    World,
    check_snap,
    identity_of,
    parse_connection,
    tag_of,
)
from policy.snaps.library import Library
from policy.snaps.rule_blocks import Block, BlockMaker, End


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """The change of an app's list."""

    tag: str
    added: tuple[Rule, ...] = ()
    removed: tuple[Rule, ...] = ()


# A block's place in a list: the side, the plug or slot, and the connection or an empty text.
_Key = tuple[str, str, str]
_EVERY_SNAP: Final[_Key] = ("", "", "")


class Compiler:
    """The snaps, the connections, and each app's rules."""

    def __init__(self, library: Library, world: World | None = None) -> None:
        """Compile everything. Raises SnapError."""
        world = World() if world is None else world
        self.library: Final = library
        self.system: Final = world.system
        self._maker: Final = BlockMaker(library, world.system)
        self._snaps: Final[dict[str, Snap]] = {}
        self._ends: Final[dict[tuple[str, str, str], End]] = {}
        self._connections: Final[set[Connection]] = set()
        self._blocks: Final[dict[str, dict[_Key, Block]]] = {}  # by security tag
        self._lists: Final[dict[str, AccessList]] = {}  # lists that were requested
        for snap in world.snaps:
            self.add_snap(snap)
        for plug, slot in world.connections:
            self.connect(parse_connection(plug, slot))

    @property
    def snaps(self) -> Mapping[str, Snap]:
        """Return all snaps by name."""
        return self._snaps

    @property
    def connections(self) -> list[Connection]:
        """Return all connections, in order."""
        return sorted(self._connections)

    @property
    def tags(self) -> list[str]:
        """Return the security tags of all apps, in order."""
        return sorted(self._blocks)

    def access(self, tag: str) -> AccessList:
        """Return an app's list. Raises SnapError for an unknown tag."""
        access = self._lists.get(tag)
        if access is None:
            access = AccessList(
                rules=tuple(rule for block in self._in_order(tag) for rule in block.rules),
                # As under AppArmor, messages that match no rule neither come in nor go to the bus.
                receive_from_host=False,
                bus_by_rule=True,
            )
            self._lists[tag] = access
        return access

    def identity(self, tag: str) -> Identity:
        """Return the identity of an app on the bus. Raises SnapError for an unknown tag."""
        self._in_order(tag)
        _, name, app = tag.split(".", 2)  # a snap's name has no dot
        return identity_of(name, app)

    def narrowed(self, tag: str, plugs: Collection[str]) -> AccessList:
        """Return an app's list, limited to some plugs. Raises SnapError for an unknown tag."""
        self._in_order(tag)
        blocks = self._blocks[tag]
        kept = [key for key in sorted(blocks) if key[0] != "plug" or key[1] in plugs]
        rules = tuple(rule for key in kept for rule in blocks[key].rules)
        return msgspec.structs.replace(self.access(tag), rules=rules)

    def left_out(self, tag: str) -> list[str]:
        """Describe the rules that were left out. Raises SnapError for an unknown tag."""
        return [text for block in self._in_order(tag) for text in block.left_out]

    def is_connected(self, connection: Connection) -> bool:
        """Return whether a plug and a slot are connected now."""
        return connection in self._connections

    def add_snap(self, snap: Snap) -> tuple[Change, ...]:
        """Add a snap without connections. Raises SnapError."""
        if snap.name in self._snaps:
            raise SnapError(f"there is a snap {snap.name} already")
        check_snap(snap)
        ends = [End(self.library, "plug", snap, name) for name in snap.plugs]
        ends += [End(self.library, "slot", snap, name) for name in snap.slots]
        self._snaps[snap.name] = snap
        self._blocks.update({tag_of(snap.name, app): {} for app in snap.apps})
        self._put(_EVERY_SNAP, self._maker.every_snap(snap))
        for end in ends:
            self._ends[end.side, snap.name, end.name] = end
            self._put((end.side, end.name, ""), self._maker.permanent(end))
        tags = sorted({tag_of(snap.name, app) for app in snap.apps})
        return tuple(Change(tag=tag, added=self._rules(tag)) for tag in tags)

    def remove_snap(self, name: str) -> tuple[Change, ...]:
        """Remove a snap and its connections. Raises SnapError."""
        snap = self._snap(name)
        changes: list[Change] = []
        for each in self.connections:
            if name in {each.plug_snap, each.slot_snap}:
                changes += self.disconnect(each)
        for tag in {tag_of(name, app) for app in snap.apps}:
            changes.append(Change(tag=tag, removed=self._rules(tag)))
            del self._blocks[tag]
            self._lists.pop(tag, None)
        for end in [end for end in self._ends.values() if end.snap is snap]:
            del self._ends[end.side, name, end.name]
        del self._snaps[name]
        return _together(changes)

    def connect(self, connection: Connection) -> tuple[Change, ...]:
        """Connect a plug to a slot; no change if already connected. Raises SnapError."""
        plug, slot = self._both(connection)
        if connection in self._connections:
            return ()
        self._connections.add(connection)
        changes = []
        for end, blocks in self._maker.connected(plug, slot):
            self._put((end.side, end.name, str(connection)), blocks)
            changes += [Change(tag=tag, added=block.rules) for tag, block in blocks.items()]
        return _together(changes)

    def disconnect(self, connection: Connection) -> tuple[Change, ...]:
        """Undo a connection. Raises SnapError for an unknown connection."""
        plug, slot = self._both(connection)
        if connection not in self._connections:
            raise SnapError(f"{plug} and {slot} are not connected")
        self._connections.remove(connection)
        changes = []
        for end in (plug, slot):
            for tag in end.tags:
                block = self._blocks[tag].pop((end.side, end.name, str(connection)), None)
                self._lists.pop(tag, None)
                if block is not None:
                    changes.append(Change(tag=tag, removed=block.rules))
        return _together(changes)

    def preview(self, connection: Connection) -> tuple[Change, ...]:
        """Return the changes that a connection would make. Raises SnapError."""
        made = self._maker.connected(*self._both(connection))
        return _together(
            Change(tag=tag, added=block.rules)
            for _, blocks in made
            for tag, block in blocks.items()
        )

    def _put(self, key: _Key, blocks: Mapping[str, Block]) -> None:
        for tag, block in blocks.items():
            self._blocks[tag][key] = block
            self._lists.pop(tag, None)

    def _in_order(self, tag: str) -> list[Block]:
        blocks = self._blocks.get(tag)
        if blocks is None:
            raise SnapError(f"no app has the security tag {tag[:100]!r}")
        return [blocks[key] for key in sorted(blocks)]

    def _rules(self, tag: str) -> tuple[Rule, ...]:
        return tuple(rule for block in self._in_order(tag) for rule in block.rules)

    def _snap(self, name: str) -> Snap:
        snap = self._snaps.get(name)
        if snap is None:
            raise SnapError(f"there is no snap {name[:60]!r}")
        return snap

    def _end(self, side: str, snap: str, name: str) -> End:
        end = self._ends.get((side, snap, name))
        if end is None:
            raise SnapError(f"snap {self._snap(snap).name} has no {side} {name[:60]!r}")
        return end

    def _both(self, connection: Connection) -> tuple[End, End]:
        plug = self._end("plug", connection.plug_snap, connection.plug)
        slot = self._end("slot", connection.slot_snap, connection.slot)
        if plug.port.interface != slot.port.interface:
            raise SnapError(
                f"plug {plug} is of interface {plug.port.interface[:60]},"
                f" slot {slot} of {slot.port.interface[:60]}"
            )
        return plug, slot


def _together(changes: Iterable[Change]) -> tuple[Change, ...]:
    """Return a single change for each list that changes."""
    added: dict[str, tuple[Rule, ...]] = {}
    removed: dict[str, tuple[Rule, ...]] = {}
    for change in changes:
        added[change.tag] = (*added.get(change.tag, ()), *change.added)
        removed[change.tag] = (*removed.get(change.tag, ()), *change.removed)
    return tuple(
        Change(tag=tag, added=added[tag], removed=removed[tag])
        for tag in sorted(added)
        if added[tag] or removed[tag]
    )
