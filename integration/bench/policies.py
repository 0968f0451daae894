"""The rows about policy: compiling snaps and their connections, and a judgement that nothing remembers.

All in this process, without a bus: there is no peer to compare with.
"""

import random
import time
from collections.abc import Callable, Sequence
from typing import Final

from integration.bench.client import BenchError
from integration.bench.measure import Column, Effort, Result, Series, interleave
from integration.bench.parties import Scene
from policy.globs import is_literal
from policy.match import Judge
from policy.rules import Access, AccessList, Identity, Rule
from policy.snaps.compiler import Compiler
from policy.snaps.installed import SNAP_TYPE, Port, Snap, World, parse_connection, tag_of
from policy.snaps.library import Library, load_library

SNAPS: Final = 1000
CONNECTIONS: Final = 10  # of each snap
RULES: Final = 300
# Plugs of the host's slots, and one of the snap that is next: as big as snaps with much D-Bus have them.
INTERFACES: Final = (
    "avahi-observe",
    "bluez",
    "desktop",
    "login-session-observe",
    "network-manager",
    "network-status",
    "system-observe",
    "udisks2",
    "upower-observe",
)
ME: Final = Identity(type=SNAP_TYPE, app="me", component="me")
THEM: Final = Identity(type=SNAP_TYPE, app="them", component="them")


def measure_compiling(_scene: Scene, effort: Effort) -> list[Result]:
    """Measure compiling all snaps from nothing: the catalogue is read, nothing else is."""
    library = load_library()
    world = make_world(library)
    values = []
    for _ in range(max(3, effort.blocks // 8)):
        compiler = Compiler(library)  # what was compiled before is gone, and not part of the time
        start = time.perf_counter()
        compiler = Compiler(library, world)
        for snap in world.snaps:
            for app in snap.apps:
                compiler.access(tag_of(snap.name, app))
        values.append(time.perf_counter() - start)
        _check(len(compiler.connections) == SNAPS * CONNECTIONS, "connections are missing")
    return [_result("ms", 1e3, values)]


def measure_connecting(_scene: Scene, effort: Effort) -> list[Result]:
    """Measure one connection, both lists included, among all the others."""
    library = load_library()
    compiler = Compiler(library, make_world(library))
    # The largest of the interfaces above, and one between two snaps.
    pairs = [
        parse_connection("snap1:network-manager", "snapd:network-manager"),
        parse_connection("snap1:next", "snap2:own"),
    ]

    def run(count: int) -> float:
        taken = 0.0
        for number in range(count):
            connection = pairs[number % len(pairs)]
            compiler.disconnect(connection)
            start = time.perf_counter()
            changes = compiler.connect(connection)
            for change in changes:
                compiler.access(change.tag)
            taken += time.perf_counter() - start
            _check(bool(changes), "nothing changed")
        return taken

    return [_measure("ms", 1e3, run, effort, step=len(pairs))]


def measure_judging(_scene: Scene, effort: Effort) -> list[Result]:
    """Measure judgements of messages that were never seen before, under rules of globs."""
    judge = Judge(AccessList(rules=make_glob_rules(load_library())), bus="session", me=ME)
    messages = [_make_message(number) for number in range(4096)]

    def run(count: int) -> float:
        start = time.perf_counter()
        for number in range(count):
            names, path, interface, member = messages[number % len(messages)]
            judge.send(names, path, interface, member, THEM)
        return time.perf_counter() - start

    _check(not judge.send(*messages[0], THEM).allowed, "a rule matches that should not")
    return [_measure("us", 1e6, run, effort)]


def make_world(library: Library) -> World:
    """Return the snaps: each with plugs of the system's slots, a slot, and a plug of the next one's slot."""
    host = library.system_snap("classic")
    wanted = [name for name in INTERFACES if name in host.slots]
    plugs: dict[str, Port] = {name: Port(interface=name) for name in wanted[: CONNECTIONS - 1]}
    _check(len(plugs) == CONNECTIONS - 1, "the system has not all of the slots")
    snaps = []
    pairs = []
    for number in range(SNAPS):
        name, after = f"snap{number}", (number + 1) % SNAPS
        snaps.append(
            Snap(
                name=name,
                apps=("app",),
                plugs={**plugs, "next": _make_port(after)},
                slots={"own": _make_port(number)},
            )
        )
        pairs += [(f"{name}:{plug}", f"{host.name}:{plug}") for plug in plugs]
        pairs.append((f"{name}:next", f"snap{after}:own"))
    return World(snaps=(host, *snaps), connections=tuple(pairs))


def make_glob_rules(library: Library) -> tuple[Rule, ...]:
    """Return rules with patterns, as the catalogue has them, until there are enough."""
    found: list[Rule] = []
    without_attributes = [
        known
        for known in library.interfaces.values()
        if not any(each.required for each in known.interface.attributes.plug.values())
    ]
    # As often as it takes, each time for another peer and another snap's names.
    for number in range(RULES):
        name = f"snap{number}"
        slots = {known.name: Port(interface=known.name) for known in without_attributes}
        slots["dbus"] = _make_port(number)
        snap = Snap(name=name, apps=("app",), plugs=slots)
        other = Snap(name=f"{name}-peer", apps=("app",), slots=slots)
        pairs = tuple((f"{name}:{each}", f"{name}-peer:{each}") for each in slots)
        compiler = Compiler(library, World(snaps=(snap, other), connections=pairs))
        found += [
            rule
            for rule in compiler.access(tag_of(name, "app")).rules
            if Access.SEND in rule.access and rule.bus != "system" and _has_pattern(rule)
        ]
        if len(found) >= RULES:
            break
    return tuple(found[:RULES])


def _has_pattern(rule: Rule) -> bool:
    texts = (rule.name, rule.path, rule.interface, rule.member)
    return any(text is not None and not is_literal(text) for text in texts)


def _make_message(number: int) -> tuple[tuple[str, ...], str, str, str]:
    """Return a message that no rule is about, of the interface that most of them are about."""
    word = f"{random.Random(number).randrange(2**32):x}"  # the same messages every time
    names = (f"org.freedesktop.Item{word}", f":1.{number}")
    return names, f"/org/freedesktop/{word}/thing", "org.freedesktop.DBus.Properties", f"Do{word}"


def _make_port(number: int) -> Port:
    attributes = {"bus": "session", "name": f"org.example.Snap{number}"}
    return Port(interface="dbus", attributes=attributes)


def _measure(
    unit: str, scale: float, run: Callable[[int], float], effort: Effort, *, step: int = 1
) -> Result:
    column = Column(run=run, step=step)
    interleave([column], effort)
    return _result(unit, scale, column.wall)


def _result(unit: str, scale: float, seconds: Sequence[float]) -> Result:
    return Result(unit=unit, gate=Series([value * scale for value in seconds]))


def _check(holds: bool, text: str) -> None:
    if not holds:
        raise BenchError(text)
