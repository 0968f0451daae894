"""Dispatch of method calls to D-Bus objects, with introspection.

The standard interfaces are answered here. Peer exists on every path, and Properties on objects.
Introspectable exists on objects and on every path above an object, so that `busctl tree` finds the
objects. An error inside a method becomes an error reply to that call, and has no other effect.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from broker.bus.callers import CallerGoneError
from broker.bus.codec import TooLongError
from broker.bus.connection import Call
from broker.bus.values import Variant, pack_in_turns
from broker.posix.reserve import SCARCE
from broker.wire.errors import (
    FAILED,
    INVALID_ARGS,
    LIMITS_EXCEEDED,
    UNKNOWN_INTERFACE,
    UNKNOWN_METHOD,
    UNKNOWN_PROPERTY,
    BrokerError,
    CallRefusedError,
)
from broker.wire.header import Header
from broker.wire.interfaces import INTROSPECTABLE, PEER, PROPERTIES

LOGGER: Final = logging.getLogger(__name__)
UNKNOWN_OBJECT: Final = "org.freedesktop.DBus.Error.UnknownObject"
PROPERTY_READ_ONLY: Final = "org.freedesktop.DBus.Error.PropertyReadOnly"
# Bytes of arguments, unless a method has a limit of its own. Several texts of the longest allowed
# length fit.
MAX_ARGUMENTS: Final = 64 * 1024
_MACHINE_ID: Final = Path("/etc/machine-id")
DOCTYPE: Final = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)


def do_nothing() -> None:
    """Do nothing after the reply."""


@dataclass(frozen=True, slots=True)
class ReturnValues:
    """The return values of a method. `then` is called once the reply is queued.

    An array among the values may be an iterator. The elements are then taken in slices.
    """

    values: Sequence[object] = ()
    then: Callable[[], None] = do_nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Arg:
    """An argument in either direction."""

    name: str
    type: str


def args(*pairs: str) -> tuple[Arg, ...]:
    """Return the arguments that the texts `"name:type"` describe."""
    return tuple(
        Arg(name=name, type=kind) for name, _, kind in (pair.partition(":") for pair in pairs)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method with the function that carries out calls."""

    name: str
    takes: tuple[Arg, ...] = ()
    gives: tuple[Arg, ...] = ()
    longest: int = MAX_ARGUMENTS  # bytes of arguments
    run: Callable[[Call], ReturnValues | Awaitable[ReturnValues]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalSpec:
    """A signal in the description of an interface."""

    name: str
    args: tuple[Arg, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Property:
    """A property that never changes."""

    name: str
    type: str
    value: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """An interface on an object."""

    name: str
    methods: tuple[Method, ...]
    signals: tuple[SignalSpec, ...] = ()
    properties: tuple[Property, ...] = ()


class Answerer(Protocol):
    """The part of a bus connection that answers calls."""

    def answer_body(self, call: Call, signature: str, body: bytes) -> None:
        """Answer a call."""

    def refuse(self, call: Call, name: str, text: str) -> None:
        """Answer a call with an error."""


class Objects:
    """All objects on one bus, as interfaces by path."""

    def __init__(self, objects: Mapping[str, Sequence[Interface]]) -> None:
        self._objects: Final = {
            path: (*interfaces, *self._standard(interfaces)) for path, interfaces in objects.items()
        }

    async def serve(self, bus: Answerer, call: Call) -> None:
        """Carry out a call and answer it."""
        try:
            method = self._find(call)
            await call.unpack()
            given = method.run(call)
            reply = given if isinstance(given, ReturnValues) else await given
            gives = _signature(method.gives)
            bus.answer_body(call, gives, await _pack(gives, reply, call))
        except CallerGoneError as exc:
            LOGGER.debug("%s: %s", call.member, exc)
        except CallRefusedError as exc:
            bus.refuse(call, exc.dbus_name, str(exc))
        except BrokerError as exc:  # the gate, or a bus, went away meanwhile
            LOGGER.warning("%s: %s", call.member, exc)
            bus.refuse(call, FAILED, str(exc))
        except OSError as exc:
            if exc.errno not in SCARCE:
                LOGGER.exception("%s failed", call.member)
                bus.refuse(call, FAILED, "internal error")
                return
            LOGGER.warning("%s: %s", call.member, exc)
            bus.refuse(call, LIMITS_EXCEEDED, f"the broker has too little left: {exc.strerror}")
        except Exception:  # An error in the request of one caller must not affect other callers.
            LOGGER.exception("%s failed", call.member)
            bus.refuse(call, FAILED, "internal error")
        else:
            reply.then()

    def look(self, header: Header) -> None:
        """Refuse a call whose header is reason enough. Raises CallRefusedError."""
        method = self._find(header)
        if header.body_length > method.longest:
            text = f"{method.name} takes arguments of at most {method.longest} bytes"
            raise CallRefusedError(LIMITS_EXCEEDED, text)

    def _find(self, call: Call | Header) -> Method:
        path = call.path or ""
        interfaces = self._objects.get(path) or self._standard(())
        if path not in self._objects and call.interface not in (PEER, INTROSPECTABLE):
            raise CallRefusedError(UNKNOWN_OBJECT, f"no object at {path[:100]!r}")
        wanted = [one for one in interfaces if call.interface in (None, one.name)]
        if not wanted:
            raise CallRefusedError(
                UNKNOWN_INTERFACE, f"no interface {call.interface} at {path[:100]!r}"
            )
        method = next((m for one in wanted for m in one.methods if m.name == call.member), None)
        if method is None:
            raise CallRefusedError(UNKNOWN_METHOD, f"no method {call.member} at {path[:100]!r}")
        if call.signature != _signature(method.takes):
            text = f"{call.member} takes {_signature(method.takes)!r}, not {call.signature!r}"
            raise CallRefusedError(INVALID_ARGS, text)
        return method

    # -- the standard interfaces -------------------------------------------------------------------

    def _standard(self, interfaces: Sequence[Interface]) -> tuple[Interface, ...]:
        by_name = {interface.name: interface for interface in interfaces}
        peer = (
            Method(name="Ping", run=_ping),
            Method(name="GetMachineId", gives=args("machine_uuid:s"), run=_machine_id),
        )
        introspect = Method(name="Introspect", gives=args("xml_data:s"), run=self._introspect)
        name, prop = args("interface_name:s", "property_name:s")

        def get(call: Call) -> ReturnValues:
            return ReturnValues((_get(by_name, call.values[0], call.values[1]),))

        def get_all(call: Call) -> ReturnValues:
            interface = _interface(by_name, call.values[0])
            return ReturnValues(({p.name: Variant(p.type, p.value) for p in interface.properties},))

        def put(call: Call) -> ReturnValues:
            _get(by_name, call.values[0], call.values[1])
            raise CallRefusedError(PROPERTY_READ_ONLY, f"{call.values[1][:100]!r} is read-only")

        properties = (
            Method(name="Get", takes=(name, prop), gives=args("value:v"), run=get),
            Method(name="GetAll", takes=(name,), gives=args("properties:a{sv}"), run=get_all),
            Method(name="Set", takes=(name, prop, *args("value:v")), run=put),
        )
        return (
            Interface(name=PEER, methods=peer),
            Interface(name=INTROSPECTABLE, methods=(introspect,)),
            *([Interface(name=PROPERTIES, methods=properties)] if interfaces else []),
        )

    def _introspect(self, call: Call) -> ReturnValues:
        above = call.path.rstrip("/") + "/"
        children = {
            path.removeprefix(above).partition("/")[0]
            for path in self._objects
            if path.startswith(above)
        }
        interfaces = self._objects.get(call.path, () if not children else self._standard(()))
        if not interfaces:
            raise CallRefusedError(UNKNOWN_OBJECT, f"no object at {call.path[:100]!r}")
        lines = [line for interface in interfaces for line in describe_interface(interface)]
        lines += [f'  <node name="{child}"/>' for child in sorted(children)]
        return ReturnValues((DOCTYPE + "\n".join(["<node>", *lines, "</node>", ""]),))


async def _pack(gives: str, reply: ReturnValues, call: Call) -> bytes:
    try:
        return await pack_in_turns(gives, reply.values, call.turn)
    except TooLongError as exc:
        raise CallRefusedError(LIMITS_EXCEEDED, f"the answer would have {exc}") from exc


def _ping(_call: Call) -> ReturnValues:
    return ReturnValues()


def _machine_id(_call: Call) -> ReturnValues:
    try:
        return ReturnValues((_MACHINE_ID.read_text(encoding="ascii").strip(),))
    except (OSError, UnicodeDecodeError) as exc:
        raise CallRefusedError(FAILED, "this machine has no id") from exc


def _interface(by_name: Mapping[str, Interface], name: str) -> Interface:
    interface = by_name.get(name)
    if interface is None:
        raise CallRefusedError(UNKNOWN_INTERFACE, f"no interface {name[:100]!r} with properties")
    return interface


def _get(by_name: Mapping[str, Interface], interface_name: str, name: str) -> Variant:
    found: list[Any] = [
        prop for prop in _interface(by_name, interface_name).properties if prop.name == name
    ]
    if not found:
        raise CallRefusedError(UNKNOWN_PROPERTY, f"no property {name[:100]!r}")
    return Variant(found[0].type, found[0].value)


def _signature(arguments: Sequence[Arg]) -> str:
    return "".join(arg.type for arg in arguments)


def describe_interface(interface: Interface) -> Iterator[str]:
    """Yield the lines of the introspection XML of an interface."""
    yield f'  <interface name="{interface.name}">'
    for method in interface.methods:
        yield f'    <method name="{method.name}">'
        for direction, arguments in (("in", method.takes), ("out", method.gives)):
            for arg in arguments:
                yield f'      <arg name="{arg.name}" type="{arg.type}" direction="{direction}"/>'
        yield "    </method>"
    for signal in interface.signals:
        yield f'    <signal name="{signal.name}">'
        for arg in signal.args:
            yield f'      <arg name="{arg.name}" type="{arg.type}"/>'
        yield "    </signal>"
    for prop in interface.properties:
        yield f'    <property name="{prop.name}" type="{prop.type}" access="read">'
        yield (
            '      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal"'
            ' value="const"/>'
        )
        yield "    </property>"
    yield "  </interface>"
