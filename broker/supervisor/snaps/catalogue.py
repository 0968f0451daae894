"""Installed snaps and connections, compiled into rules. Nothing here waits.

The catalogue is read on first need, because a system without snaps needs no memory for it.
"""

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

import msgspec

from broker.wire.errors import FAILED, INVALID_ARGS, CallRefusedError, ConfigError
from policy.rules import AccessList, Identity
from policy.snaps.compiler import Compiler
from policy.snaps.installed import (
    SNAP_TYPE,
    SnapError,
    World,
    parse_connection,
    parse_world,
    tag_of,
)
from policy.snaps.library import OWN_DIRECTORIES, CatalogueError, Known, Library, load_library

LOGGER: Final = logging.getLogger(__name__)
MAX_WORLD: Final = 32 * 1024 * 1024  # characters of JSON; 1000 snaps with 10 connections take 1 MiB


def load_own_library() -> Library:
    """Read the catalogue with the administrator's and the user's own files. Raises CatalogueError."""
    return load_library([Path(directory).expanduser() for directory in OWN_DIRECTORIES])


def is_snap(type_: str, component: str | None) -> bool:
    """Return whether a sandbox can be an app of a snap."""
    return type_ == SNAP_TYPE and component is not None


class Snaps:
    """The compiler in force.

    Assign `compiler` to replace it by a compiler that `build` made.
    """

    def __init__(self, world: World, load: Callable[[], Library]) -> None:
        """Compile the stored snaps. Raises ConfigError."""
        self._load: Final = load
        self._library: Library | None = None
        self.compiler: Compiler | None = None
        if world.snaps:
            try:
                bare = World(system=world.system, snaps=world.snaps)
                self.compiler = self.build(bare, world.connections)
            except CallRefusedError as exc:
                raise ConfigError(f"cannot compile the stored snaps: {exc}") from exc

    @property
    def library(self) -> Library:
        """Return the catalogue. Raises CallRefusedError."""
        if self._library is None:
            try:
                self._library = self._load()
            except (CatalogueError, OSError) as exc:
                raise CallRefusedError(FAILED, f"cannot read the catalogue: {exc}") from exc
        return self._library

    def ready(self) -> Compiler:
        """Return the compiler, which has no snaps if none were loaded. Raises CallRefusedError."""
        if self.compiler is None:
            self.compiler = self.build(World(), ())
        return self.compiler

    def build(self, world: World, kept: tuple[tuple[str, str], ...]) -> Compiler:
        """Compile snaps with the connections in `kept` that are still valid. Raises CallRefusedError."""
        library = self.library
        names = {snap.name for snap in world.snaps}
        try:
            host = library.system_snap(world.system, there=world.system_slots)
            if host.name not in names and not any(snap.system for snap in world.snaps):
                world = msgspec.structs.replace(world, snaps=(*world.snaps, host))
            compiler = Compiler(library, world)
        except SnapError as exc:
            raise CallRefusedError(INVALID_ARGS, str(exc)) from exc
        for plug, slot in kept:
            try:
                compiler.connect(parse_connection(plug, slot))
            except SnapError as exc:
                LOGGER.warning("disconnected %s from %s: %s", plug, slot, exc)
        return compiler

    def compiled(self, identity: Identity, plugs: Collection[str] = ()) -> AccessList | None:
        """Return the rules of an app of a snap; None for any other app.

        If the creator of the sandbox named plugs, only the rules of these plugs are returned.
        """
        tag = self.tag_for(identity)
        if self.compiler is None or tag is None:
            return None
        return self.compiler.narrowed(tag, plugs) if plugs else self.compiler.access(tag)

    def tag_for(self, identity: Identity) -> str | None:
        """Return the security tag of an app of a snap; None for any other app."""
        if self.compiler is None or not is_snap(identity.type, identity.component):
            return None
        # Found by snap and app, because the text of a tag does not show where the snap's name ends.
        snap, app = self.compiler.snaps.get(identity.app), str(identity.component)
        return tag_of(snap.name, app) if snap is not None and app in snap.apps else None

    def tag(self, name: str) -> str:
        """Return the security tag for `SNAP.APP` or for a tag. Raises CallRefusedError."""
        known = self.ready().tags
        for tag in (f"snap.{name}", name):
            if tag in known:
                return tag
        raise CallRefusedError(INVALID_ARGS, f"no installed snap has an app {name[:100]!r}")

    def interface(self, name: str) -> Known:
        """Return the catalogue's entry for an interface of snaps. Raises CallRefusedError."""
        known = self.library.interfaces.get(name)
        if known is None:
            text = f"the catalogue has no interface {name[:100]!r} with D-Bus rules"
            raise CallRefusedError(INVALID_ARGS, text)
        return known


def world_of(compiler: Compiler) -> World:
    """Return the snaps and connections of a compiler."""
    pairs = tuple(
        (f"{one.plug_snap}:{one.plug}", f"{one.slot_snap}:{one.slot}")
        for one in compiler.connections
    )
    snaps = tuple(snap for _, snap in sorted(compiler.snaps.items()))
    return World(system=compiler.system, snaps=snaps, connections=pairs)


def decode_world(text: str) -> World:
    """Return the snaps that JSON describes. Raises CallRefusedError InvalidArgs."""
    if len(text) > MAX_WORLD:
        raise CallRefusedError(INVALID_ARGS, f"the JSON has more than {MAX_WORLD} characters")
    try:
        return parse_world(msgspec.json.decode(text))
    except (msgspec.MsgspecError, SnapError, RecursionError) as exc:
        raise CallRefusedError(INVALID_ARGS, f"the snaps cannot be read: {exc}") from exc
