"""A bus's driver that has Containers1, in words of a test's choice: it answers calls, and keeps what it was asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from broker.bus.values import Variant
from broker.wire.errors import (
    ACCESS_DENIED,
    LIMITS_EXCEEDED,
    NOT_CONTAINER,
    UNKNOWN_METHOD,
    CallRefusedError,
)
from broker.wire.interfaces import CONTAINERS1

INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
PREFIX = "/org/freedesktop/DBus/Containers1/"
MAX_METADATA = 3  # entries
Result = tuple[str, list[Any]]


def _method(name: str, takes: Sequence[str] = (), gives: Sequence[str] = ()) -> str:
    args = [f'<arg type="{one}" direction="in" name="x"/>' for one in takes]
    args += [f'<arg direction="out" type="{one}"/>' for one in gives]
    return f'<method name="{name}">{"".join(args)}</method>' if name else ""


@dataclass
class FakeDriver:
    """What it has. In `mode` "hangs" it answers nothing, "silent" not AddServer; "nonsense", "refuse" and "unreachable" are said below."""

    mode: str = "good"
    add: str = "AddServer"
    stop: str = "StopInstance"
    stop_listening: str = "StopListening"
    set_access: str = ""
    arguments: tuple[str, ...] = ()
    make_address: Callable[[str], str] = lambda instance: f"unix:abstract={instance}"
    instances: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = field(
        default_factory=dict
    )
    asked: list[tuple[str, list[Any]]] = field(default_factory=list)
    made: int = 0

    @property
    def xml(self) -> str:
        """Describe it."""
        methods = [
            _method(self.add, ("s", "s", "a{sv}", "a{sv}"), ("o", "ay", "s")),
            _method(self.stop, ("o",)),
            _method(self.stop_listening, ("o",)),
            _method(self.set_access, ("s", "a(usos)")),
        ]
        found = f'<interface name="{CONTAINERS1}">{"".join(methods)}</interface>'
        return f'<node><interface name="org.x"></interface>{"" if self.mode == "none" else found}</node>'

    def answer(self, member: str, values: list[Any]) -> Result | None:
        """Return signature and values; None: no answer. Raises CallRefusedError."""
        self.asked.append((member, values))
        match member:
            case "Introspect" if self.mode == "hangs":
                return None
            case "Introspect":
                return "s", [self.xml]
            case "Get" if self.mode == "nonsense-arguments":
                return "v", [Variant("u", 7)]
            case "Get":
                return "v", [Variant("as", list(self.arguments))]
            case "Ping":
                return "", []
            case _:
                return self._change(member, values)

    def _change(self, member: str, values: list[Any]) -> Result | None:
        if member == self.add:
            return self._add(values)
        if member == self.set_access:
            return "", []
        if member in (self.stop, self.stop_listening):
            if values[0] not in self.instances:
                raise CallRefusedError(NOT_CONTAINER, f"no container {values[0]}")
            if member == self.stop:
                del self.instances[values[0]]
            return "", []
        raise CallRefusedError(UNKNOWN_METHOD, f"no method {member}")

    def _add(self, values: list[Any]) -> Result | None:
        type_, app, metadata, named = values
        if self.mode == "silent":
            return None
        if self.mode == "refuse":
            raise CallRefusedError(ACCESS_DENIED, "not you")
        if self.mode == "nonsense":
            return "s", ["what?"]
        if len(metadata) > MAX_METADATA:
            raise CallRefusedError(LIMITS_EXCEEDED, f"too much (max={MAX_METADATA})")
        if unknown := set(named) - set(self.arguments):
            raise CallRefusedError("org.freedesktop.DBus.Error.InvalidArgs", str(unknown))
        instance = f"{PREFIX}c{100 + self.made}"
        self.made += 1
        self.instances[instance] = (type_, app, metadata, named)
        if self.mode == "another-form":
            return "o", [instance]
        address = self.make_address(instance)
        if self.mode == "unreachable":
            address = "unix:path=/nowhere/at/all"
        return "oays", [instance, b"/x\0", address]
