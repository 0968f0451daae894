"""Snaps for the tests of the compiler: a few, or many drawn by hypothesis."""

from functools import cache

from hypothesis import strategies as st

from policy.snaps.compiler import Compiler
from policy.snaps.installed import Connection, Port, Snap, World, parse_connection
from policy.snaps.library import Library, load_library

# Interfaces of all kinds: only host, slots of apps, both, attributes, and one that has no rules.
INTERFACES = ("network", "network-manager", "mpris", "dbus", "bluez", "browser-support", "camera")
THING = {"bus": "session", "name": "org.example.Thing"}


@cache
def library() -> Library:
    """Return the shipped catalogue."""
    return load_library()


def port(interface: str, *apps: str) -> Port:
    """Return a plug or slot, of all apps or of some."""
    attributes = THING if interface == "dbus" else {}
    return Port(interface=interface, attributes=dict(attributes), apps=apps or None)


def some_snaps() -> tuple[Snap, ...]:
    """Return the host, two clients and a provider; each has all that INTERFACES can."""
    return (
        Snap(
            name="snapd",
            system=True,
            slots={name: Port(interface=name) for name in ("network", "network-manager", "bluez")},
        ),
        Snap(
            name="client",
            apps=("app", "other"),
            plugs={name: port(name) for name in INTERFACES} | {"only": port("mpris", "app")},
        ),
        Snap(name="second_x", apps=("app",), plugs={name: port(name) for name in INTERFACES}),
        Snap(
            name="provider",
            apps=("svc", "extra"),
            slots={name: port(name, "svc") for name in INTERFACES if name != "network"},
        ),
    )


def possible_connections() -> list[Connection]:
    """Return all connections that these snaps may have."""
    snaps = some_snaps()
    return [
        parse_connection(f"{one.name}:{plug}", f"{other.name}:{slot}")
        for one in snaps
        for plug, at_plug in one.plugs.items()
        for other in snaps
        for slot, at_slot in other.slots.items()
        if at_plug.interface == at_slot.interface
    ]


def compiler(*connections: tuple[str, str]) -> Compiler:
    """Return a compiler with the snaps, and these connected."""
    return Compiler(library(), World(snaps=some_snaps(), connections=connections))


connection_sets = st.sets(st.sampled_from(possible_connections()), max_size=12)
