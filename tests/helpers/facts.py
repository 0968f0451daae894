"""What is known of snapd's D-Bus rules, and a second judge that goes by it alone.

tests/data/snapd-dbus-rules.json has the rules as they were read from snapd. Nothing here uses the catalogue or
policy.match, so that both can be wrong in different places only.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from policy.rules import Identity
from policy.snaps.catalogue_schema import System
from policy.snaps.installed import Port, Snap, World, identity_of

FILE: Final = Path(__file__).parents[1] / "data" / "snapd-dbus-rules.json"
FACTS: Final[list[dict[str, Any]]] = json.loads(FILE.read_text())
BY_NAME: Final = {fact["interface"]: fact for fact in FACTS}
INTERFACES: Final = sorted(name for name in BY_NAME if not name.startswith("_"))
DRIVER: Final = "org.freedesktop.DBus"
DRIVER_PATH: Final = "/org/freedesktop/DBus"

PLUG_APP: Final = identity_of("consumer", "app")
SLOT_APP: Final = identity_of("provider", "svc")
STRANGER: Final = identity_of("stranger", "app")
ATTRIBUTES: Final[dict[str, dict[str, object]]] = {
    "browser-support": {"allow-sandbox": True},
    "dbus": {"bus": "session", "name": "org.example.Thing"},
    "mpris": {"name": "player"},
    "polkit": {"action-prefix": "org.example"},
}
_FILLED: Final = {
    "{attr.bus}": "session",
    "{attr.name as path}": "/org/example/Thing",
    "{attr.name or snap instance}": "player",
    "{attr.name}": "org.example.Thing",
    "{own security tag, escaped}": "snap_2econsumer_2eapp",
    "{desktop prefix}": "consumer",
}
_PIECE: Final = re.compile(r"\*\*|\*|\?|\[[^\]]*\]|\{[^}]*\}|[^*?\[{]+")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Two snaps that are connected by one interface."""

    interface: str
    system: System
    system_slot: bool

    @property
    def slot(self) -> str:
        """Return the slot, as in a connection."""
        return f"{'snapd' if self.system_slot else 'provider'}:end"

    def world(self) -> World:
        """Return it for the compiler."""
        attributes: dict[str, object] = dict(ATTRIBUTES.get(self.interface, {}))
        end = Port(interface=self.interface, attributes=attributes)
        ends = {"end": end}
        app, svc = ({"end": Port(**_fields(end), apps=(each,))} for each in ("app", "svc"))
        return World(
            system=self.system,
            snaps=(
                Snap(name="snapd", system=True, slots=ends),
                Snap(name="consumer", apps=("app", "idle"), plugs=app),
                Snap(name="provider", apps=("svc", "idle"), slots=svc),
            ),
            connections=(("consumer:end", self.slot),),
        )


@dataclass(frozen=True, kw_only=True)
class Message:
    """One thing that an app does; for `own` the name is the only one of `names`."""

    access: str
    bus: str
    names: tuple[str, ...]
    path: str
    interface: str | None
    member: str
    peer: Identity | None


def _fields(port: Port) -> dict[str, Any]:
    return {"interface": port.interface, "attributes": port.attributes}


def scenes(interface: str) -> list[Scene]:
    """Return the systems and slots that rules of the interface tell apart."""
    fact = BY_NAME[interface]
    systems: tuple[System, ...] = ("classic", "core")
    return [
        Scene(interface=interface, system=system, system_slot=system_slot)
        for system in systems
        for system_slot in (True, False)
        if not system_slot or fact[f"implicit_on_{system}"]
    ]


def rules_of(scene: Scene, me: Identity, *, as_written: bool = False) -> list[dict[str, Any]]:
    """Return the rules that an app has in this scene; as snapd wrote them, or as they are meant."""
    side = {PLUG_APP: "plug", SLOT_APP: "slot"}.get(me)
    own = [rule for rule in BY_NAME[scene.interface]["rules"] if rule["side"] == side]
    if scene.system_slot:  # then the provider is not connected
        own = [rule for rule in own if side == "plug" or rule["when"] == "permanent"]
    all_have = BY_NAME["_template_"]["rules"]
    all_have = all_have if as_written else [_for_driver(rule) for rule in all_have]
    all_have = all_have + BY_NAME["_abstractions_"]["rules"]
    return [rule for rule in own + all_have if _applies(rule, scene)]


def peers_of(rule: dict[str, Any], scene: Scene, me: Identity) -> list[Identity | None]:
    """Return other ends that the rule is for."""
    match rule["peer"]:
        case "host":
            return [None]
        case "any":
            return [None, STRANGER]
        case "same app":
            return [replace_component(me, "idle")]
        case "self":
            return [me]
        case "plug app":
            return [PLUG_APP]
        case _:
            return [None if end == "host" else SLOT_APP for end in _slot_ends(rule, scene)]


def replace_component(me: Identity, component: str) -> Identity:
    """Return another app of the same snap."""
    return Identity(type=me.type, app=me.app, component=component)


def examples(rule: dict[str, Any], scene: Scene, me: Identity) -> Iterator[Message]:
    """Make messages that match: each alternative of each field once."""
    names = rule.get("own_name") or rule.get("peer_name") or []
    if rule.get("path") == [DRIVER_PATH] and rule["peer"] == "host":
        names = names or [DRIVER]
    fields: dict[str, list[Any]] = {
        "bus": [fill(rule.get("bus", "session"))],
        "names": [(text,) for name in names for text in instances(name)] or [(":1.7",)],
        "path": _texts(rule, "path", "/some/object"),
        "interface": _texts(rule, "interface", "org.example.Some"),
        "member": _texts(rule, "member", "Some"),
        "peer": peers_of(rule, scene, me),
    }
    if not all(fields.values()):
        return
    first = {key: values[0] for key, values in fields.items()}
    for access in rule["access"]:
        if access == "eavesdrop":
            continue
        yield Message(access=access, **first)
        for key, values in fields.items():
            for value in values[1:]:
                yield Message(access=access, **{**first, key: value})


def tries(scene: Scene, me: Identity) -> set[Message]:
    """Make messages that match the rules of an app, and near misses of one for each rule."""
    # The other apps of the two snaps try what those with the plug and the slot may do.
    is_end = me in {PLUG_APP, SLOT_APP}
    found: set[Message] = set()
    for rule in rules_of(scene, me) if is_end else BY_NAME[scene.interface]["rules"]:
        matching = list(examples(rule, scene, me))
        found.update(matching)
        found.update(near for message in matching[:1] for near in near_misses(message))
    return found


def near_misses(message: Message) -> Iterator[Message]:
    """Make messages that differ in one thing."""
    parent = message.path.rpartition("/")[0] or "/"
    yield replace(message, path=message.path.rstrip("/") + "/off")
    yield replace(message, path=parent)
    yield replace(message, path=message.path.rstrip("/") + "x")
    yield replace(message, interface=f"{message.interface}X")
    yield replace(message, interface=None)
    yield replace(message, member=f"{message.member}X")
    yield replace(message, member=f"X{message.member}")
    yield replace(message, bus="accessibility" if message.bus != "accessibility" else "system")
    yield replace(message, bus="other")
    yield replace(message, names=("org.example.Other",))
    yield replace(message, names=(f"{message.names[0]}.off",))
    if "." in message.names[0]:
        yield replace(message, names=(message.names[0].rpartition(".")[0],))
    yield replace(message, names=(":1.9", DRIVER))
    for peer in (None, PLUG_APP, SLOT_APP, STRANGER):
        yield replace(message, peer=peer)
        if peer is not None:
            yield replace(message, peer=replace_component(peer, "idle"))
    for access in ("send", "receive", "own"):
        yield replace(message, access=access)


@cache
def instances(pattern: str) -> tuple[str, ...]:
    """Return strings that an AppArmor pattern matches."""
    found = [""]
    for piece in _PIECE.findall(fill(pattern)):
        match piece[0]:
            case "{":
                inner = [text for one in piece[1:-1].split(",") for text in instances(one)]
                found = [text + more for text in found for more in inner]
            case "*":
                more = "x/y" if piece == "**" and "/" in pattern else "Abc"
                found = [text + ("1" if text[-1:].isdigit() else more) for text in found]
            case "?":
                found = [text + "q" for text in found]
            case "[":
                found = [text + piece[1] for text in found]
            case _:
                found = [text + piece for text in found]
    return tuple(found) if pattern else ("",)


def fill(text: str) -> str:
    """Put the attributes of our snaps in."""
    for placeholder, value in _FILLED.items():
        text = text.replace(placeholder, value)
    return text


def _texts(rule: dict[str, Any], key: str, default: str) -> list[str]:
    found = [text for pattern in rule.get(key, [default]) for text in instances(pattern)]
    return [text for text in found if text == "/" or not text.endswith("/")]


def _for_driver(rule: dict[str, Any]) -> dict[str, Any]:
    # snapd can only say "unconfined" and the path; it is about the bus (docs/policy.md, differences).
    if rule.get("path") == [DRIVER_PATH]:
        return {**rule, "peer_name": [DRIVER]}
    return rule


def _applies(rule: dict[str, Any], scene: Scene) -> bool:
    slot = "system" if scene.system_slot else "app"
    # A slot that has apps is no system slot, even while nobody is connected to it.
    kind = "app" if rule.get("side") == "slot" else slot
    return (
        rule.get("only_on", scene.system) == scene.system
        and rule.get("only_when_slot_is", kind) == kind
        and rule.get("needs") != "classic confinement"
        and not gives_nothing(rule)
    )


def gives_nothing(rule: dict[str, Any]) -> bool:
    """Say whether it is for another program, or asks for a bus name that cannot be."""
    return "only_for" in rule or rule.get("peer_name") == ["unconfined"]


def _slot_ends(rule: dict[str, Any], scene: Scene) -> list[str]:
    slot_is = rule["slot_is"]
    ends = [slot_is.get("always"), slot_is.get(scene.system)]
    ends.append(slot_is.get("system slot" if scene.system_slot else "app slot"))
    if scene.system == "classic":
        ends.append(slot_is.get("classic, additionally"))
    found = {end for end in ends if end} - ({"slot app"} if scene.system_slot else set())
    return sorted(found)


class Known:
    """The rules of one app, and whether they allow something. As AppArmor would judge it."""

    def __init__(self, rules: Sequence[dict[str, Any]], scene: Scene, me: Identity) -> None:
        self._me = me
        self._by_access: dict[str, list[_Compiled]] = {"send": [], "receive": [], "own": []}
        for rule in rules:
            compiled = _Compiled(rule, scene, me)
            for access in self._by_access.keys() & set(rule["access"]):
                self._by_access[access].append(compiled)

    def allows(self, message: Message) -> bool:
        """Judge it."""
        found = [
            rule for rule in self._by_access[message.access] if rule.matches(message, self._me)
        ]
        return bool(found) and not any(rule.deny for rule in found)


class _Compiled:
    def __init__(self, rule: dict[str, Any], scene: Scene, me: Identity) -> None:
        self.deny = rule.get("effect") == "deny"
        self._bus = fill(rule["bus"]) if "bus" in rule else None
        self._names = _regex(tuple(rule.get("own_name") or rule.get("peer_name") or ()))
        if "own_name_regex" in rule:
            self._names = re.compile(fill(rule["own_name_regex"]))
        self._path = _regex(tuple(rule.get("path", ())))
        self._interface = _regex(tuple(rule.get("interface", ())))
        self._member = _regex(tuple(rule.get("member", ())))
        self._peer = rule["peer"]
        self._peers = () if self._peer in {"any", "same app"} else peers_of(rule, scene, me)

    def matches(self, message: Message, me: Identity) -> bool:
        if self._bus not in {None, message.bus}:
            return False
        if self._names is not None and not any(map(self._names.fullmatch, message.names)):
            return False
        return message.access == "own" or (
            (self._path is None or bool(self._path.fullmatch(message.path)))
            and (self._member is None or bool(self._member.fullmatch(message.member)))
            and (
                self._interface is None
                or bool(message.interface and self._interface.fullmatch(message.interface))
            )
            and self._is_peer(message.peer, me)
        )

    def _is_peer(self, peer: Identity | None, me: Identity) -> bool:
        if self._peer == "any":
            return True
        if self._peer == "same app":
            return peer is not None and peer.app == me.app
        return peer in self._peers


@cache
def _regex(patterns: tuple[str, ...]) -> re.Pattern[str] | None:
    if not patterns:
        return None
    return re.compile("|".join(f"(?:{''.join(_translate(fill(each)))})" for each in patterns))


def _translate(pattern: str) -> Iterator[str]:
    for piece in _PIECE.findall(pattern):
        match piece[0]:
            case "{":
                parts = ("".join(_translate(part)) for part in piece[1:-1].split(","))
                yield f"(?:{'|'.join(parts)})"
            case "*":
                yield ".*" if piece == "**" else "[^/]*"
            case "?":
                yield "[^/]"
            case "[":
                yield piece
            case _:
                yield re.escape(piece)
