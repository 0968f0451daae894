"""Dialects of Containers1: the names, arguments and bodies of a bus. Pure.

The interface was merged under other names than it was proposed under, and will get more arguments. Therefore a
bus describes the dialect, by Introspect and SupportedArguments.
"""

from collections.abc import Mapping, Sequence
from typing import Final
from xml.parsers import expat

import msgspec

from broker.bus.values import Variant, pack, unpack
from broker.control_protocol.messages import Called, ContainerServer, SandboxSpec
from broker.wire.errors import FAILED, CallRefusedError
from broker.wire.interfaces import CONTAINERS1
from policy.usos.convert import make_superset

# The key of an app's component in the metadata, because a bus has no other place for components.
COMPONENT: Final = "org.buswarden.Component"
ADD_TAKES: Final = "ssa{sv}a{sv}"
ADD_GIVES: Final = "oays"
ACCESS_TAKES: Final = "sa(usos)"
_EMPTY: Final = bytes(8)  # a marshalled a{sv}
_ADD: Final = ("AddServer", "AddContainerServer")
_STOP: Final = ("StopInstance", "RemoveContainerServer")
_STOP_LISTENING: Final = ("StopListening",)
_SET_ACCESS: Final = ("SetContainerAccess",)
# Ten times a bus's description. The text is parsed in the supervisor's loop.
MAX_DESCRIPTION: Final = 256 * 1024  # characters


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """The methods and arguments of a bus.

    An empty name stands for a method that the bus lacks.
    """

    add: str
    stop: str
    stop_listening: str
    set_access: str
    arguments: frozenset[str]

    @property
    def takes_rules(self) -> bool:
        """Return whether the bus is given rules."""
        # Rules that cannot be changed would refuse messages that later rules allow.
        return "Allow" in self.arguments and bool(self.set_access)

    def server(self, instance: str, address: str) -> ContainerServer:
        """Return the description of an instance for the gate."""
        return ContainerServer(
            instance=instance,
            address=address,
            stop=self.stop,
            stop_listening=self.stop_listening,
        )


def parse_dialect(xml: str, arguments: Sequence[str]) -> Dialect | None:
    """Return the dialect in a bus's introspection XML; None without Containers1.

    Raises CallRefusedError if the XML is malformed.
    """
    methods = _Description().read(xml)

    def pick(names: Sequence[str], takes: str, gives: str = "") -> str:
        return next((name for name in names if methods.get(name) == (takes, gives)), "")

    add, stop = pick(_ADD, ADD_TAKES, ADD_GIVES), pick(_STOP, "o")
    if not add or not stop:
        return None
    return Dialect(
        add=add,
        stop=stop,
        stop_listening=pick(_STOP_LISTENING, "o"),
        set_access=pick(_SET_ACCESS, ACCESS_TAKES),
        arguments=frozenset(arguments),
    )


def make_add_body(spec: SandboxSpec, bus: str, dialect: Dialect) -> bytes:
    """Return the arguments of AddServer."""
    named: dict[str, Variant] = {}
    if dialect.takes_rules:
        named["Allow"] = Variant("a(usos)", list(make_superset(spec.access, bus)))
    # Metadata can be large and is marshalled already.
    body = bytearray(pack("ss", [spec.identity.type, spec.identity.app]))
    _append_dict(body, _metadata(spec))
    _append_dict(body, pack("a{sv}", [named]))
    return bytes(body)


def _metadata(spec: SandboxSpec) -> bytes:
    """Return a marshalled `a{sv}` of metadata and component."""
    metadata = spec.metadata or _EMPTY
    if COMPONENT.encode() in metadata:  # written by the creator, who must not choose the component
        (values,) = unpack("a{sv}", metadata)
        values.pop(COMPONENT, None)
        metadata = pack("a{sv}", [values])
    if spec.identity.component is None:
        return metadata
    entry = pack("a{sv}", [{COMPONENT: Variant("s", spec.identity.component)}])[8:]
    entries = metadata[8:]
    entries += bytes(-len(entries) % 8) + entry
    return len(entries).to_bytes(4, "little") + bytes(4) + entries


def _append_dict(body: bytearray, marshalled: bytes) -> None:
    """Append a marshalled `a{sv}` to other values.

    The entries are aligned to 8 bytes, wherever the length stands.
    """
    body += bytes(-len(body) % 4)
    body += marshalled[:4]
    body += bytes(-len(body) % 8)
    body += marshalled[8:]


def make_access_body(spec: SandboxSpec, bus: str, instance: str) -> bytes:
    """Return the arguments of SetContainerAccess."""
    return pack(ACCESS_TAKES, [instance, list(make_superset(spec.access, bus))])


def read_instance(called: Called) -> str:
    """Return the path of a new instance; empty if the answer does not begin with a path."""
    if not called.signature.startswith("o"):
        return ""
    try:
        (path,) = unpack("o", called.body, little=called.little, whole=False)
    except ValueError:
        return ""
    return str(path)


def read_address(called: Called) -> str:
    """Return the address of a new instance. Raises CallRefusedError."""
    _path, _socket, address = read_values(called, ADD_GIVES)
    return str(address)


def read_values(called: Called, signature: str) -> Sequence[object] | list[str]:
    """Return the values of an answer. Raises CallRefusedError if the answer has another type."""
    if called.signature != signature:
        text = f"it answered with {called.signature[:40]!r} where {signature!r} was due"
        raise CallRefusedError(FAILED, text)
    try:
        return unpack(signature, called.body, little=called.little)
    except ValueError as exc:
        raise CallRefusedError(FAILED, f"the bus returned a malformed answer: {exc}") from exc


def read_arguments(called: Called) -> Sequence[str]:
    """Return the value of SupportedArguments. Raises CallRefusedError."""
    (value,) = read_values(called, "v")
    if not isinstance(value, Variant) or value.signature != "as":
        raise CallRefusedError(FAILED, "the bus's SupportedArguments is not a list of names")
    names: Sequence[str] = value.value  # type: ignore[assignment]
    return names


def instance_paths(servers: Mapping[str, ContainerServer]) -> dict[str, str]:
    """Return the paths of the buses' own instances, by bus."""
    return {bus: one.instance for bus, one in servers.items() if one.instance}


class _Description:
    """A parser of Containers1's method signatures, which reads no other file."""

    def __init__(self) -> None:
        self._parser: Final = expat.ParserCreate()
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.StartDoctypeDeclHandler = self._start_doctype
        self._parser.EntityDeclHandler = self._refuse_entity
        self._open: Final[list[str]] = []  # elements
        self._is_ours = False
        self._takes: list[str] = []
        self._gives: list[str] = []
        self._methods: Final[dict[str, tuple[list[str], list[str]]]] = {}

    def read(self, xml: str) -> dict[str, tuple[str, str]]:
        """Return signatures by method. Raises CallRefusedError."""
        if len(xml) > MAX_DESCRIPTION:
            text = f"the bus's introspection XML has {len(xml)} characters, of {MAX_DESCRIPTION} at most"
            raise CallRefusedError(FAILED, text)
        try:
            self._parser.Parse(xml, True)
        except expat.ExpatError as exc:
            text = f"the bus returned malformed introspection XML: {exc}"
            raise CallRefusedError(FAILED, text) from exc
        return {
            name: ("".join(takes), "".join(gives)) for name, (takes, gives) in self._methods.items()
        }

    def _start(self, element: str, attributes: Mapping[str, str]) -> None:
        match element, len(self._open):
            case "interface", 1:
                self._is_ours = attributes.get("name") == CONTAINERS1
            case "method", 2 if self._is_ours and self._open[1] == "interface":
                self._takes, self._gives = [], []
                self._methods[attributes.get("name", "")] = self._takes, self._gives
            case "arg", 3 if self._is_ours and self._open[1:] == ["interface", "method"]:
                is_out = attributes.get("direction") == "out"
                (self._gives if is_out else self._takes).append(attributes.get("type", ""))
        self._open.append(element)

    def _end(self, _element: str) -> None:
        self._open.pop()

    def _start_doctype(
        self, _name: str, _system: str | None, _public: str | None, has_subset: object
    ) -> None:
        if has_subset:
            raise CallRefusedError(
                FAILED, "the bus's introspection XML declares elements of its own"
            )

    def _refuse_entity(self, *_declaration: object) -> None:
        raise CallRefusedError(FAILED, "the bus's introspection XML declares entities of its own")
