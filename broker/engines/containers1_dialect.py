"""How a bus that has Containers1 itself is to be talked to: names, arguments, bodies. Pure.

The interface was proposed under other names than it was merged under, and is to get more arguments: what a bus has it
says itself, by Introspect and SupportedArguments.
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

# Where the component of an app stands in the metadata, which is the one place that a bus has for it.
COMPONENT: Final = "org.buswarden.Component"
ADD_TAKES: Final = "ssa{sv}a{sv}"
ADD_GIVES: Final = "oays"
ACCESS_TAKES: Final = "sa(usos)"
_EMPTY: Final = bytes(8)  # a marshalled a{sv}
_ADD: Final = ("AddServer", "AddContainerServer")
_STOP: Final = ("StopInstance", "RemoveContainerServer")
_STOP_LISTENING: Final = ("StopListening",)
_SET_ACCESS: Final = ("SetContainerAccess",)
# That of a bus is a tenth of it. It is read in the supervisor's loop.
MAX_DESCRIPTION: Final = 256 * 1024  # characters


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """What one bus understands. An empty name is a method that it does not have."""

    add: str
    stop: str
    stop_listening: str
    set_access: str
    arguments: frozenset[str]

    @property
    def takes_rules(self) -> bool:
        """Whether it is to have rules: what could not be changed later would come to be less than ours allow."""
        return "Allow" in self.arguments and bool(self.set_access)

    def upstream(self, instance: str, address: str) -> ContainerServer:
        """Return what the gate is to know of an instance."""
        return ContainerServer(
            instance=instance,
            address=address,
            stop=self.stop,
            stop_listening=self.stop_listening,
        )


def parse_dialect(xml: str, arguments: Sequence[str]) -> Dialect | None:
    """Return how a bus with that description is talked to; None: it has no Containers1 that we know.

    Raises CallRefusedError if it is no description.
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
    if COMPONENT.encode() in metadata:  # somebody else's word for it
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
    """Put a marshalled `a{sv}` behind other values: its entries are aligned to 8, wherever its length stands."""
    body += bytes(-len(body) % 4)
    body += marshalled[:4]
    body += bytes(-len(body) % 8)
    body += marshalled[8:]


def make_access_body(spec: SandboxSpec, bus: str, instance: str) -> bytes:
    """Return the arguments of SetContainerAccess."""
    return pack(ACCESS_TAKES, [instance, list(make_superset(spec.access, bus))])


def read_instance(called: Called) -> str:
    """Return the path of an instance that was made; empty if it does not begin with one."""
    if not called.signature.startswith("o"):
        return ""
    try:
        (path,) = unpack("o", called.body, little=called.little, whole=False)
    except ValueError:
        return ""
    return str(path)


def read_address(called: Called) -> str:
    """Return the address of an instance that was made. Raises CallRefusedError."""
    _path, _socket, address = read_values(called, ADD_GIVES)
    return str(address)


def read_values(called: Called, signature: str) -> Sequence[object] | list[str]:
    """Return what was answered. Raises CallRefusedError if it is not of this type."""
    if called.signature != signature:
        text = f"it answered with {called.signature[:40]!r} where {signature!r} was due"
        raise CallRefusedError(FAILED, text)
    try:
        return unpack(signature, called.body, little=called.little)
    except ValueError as exc:
        raise CallRefusedError(FAILED, f"it answered nonsense: {exc}") from exc


def read_arguments(called: Called) -> Sequence[str]:
    """Return the value of SupportedArguments. Raises CallRefusedError."""
    (value,) = read_values(called, "v")
    if not isinstance(value, Variant) or value.signature != "as":
        raise CallRefusedError(FAILED, "its SupportedArguments are no list of names")
    names: Sequence[str] = value.value  # type: ignore[assignment]
    return names


def describe(upstreams: Mapping[str, ContainerServer]) -> dict[str, str]:
    """Return the bus's instance paths, by bus."""
    return {bus: one.instance for bus, one in upstreams.items() if one.instance}


class _Description:
    """Reads what the methods of Containers1 take and give. Nothing that is not in the text itself is ever read."""

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
            text = f"its description has {len(xml)} characters, of {MAX_DESCRIPTION} at most"
            raise CallRefusedError(FAILED, text)
        try:
            self._parser.Parse(xml, True)
        except expat.ExpatError as exc:
            raise CallRefusedError(FAILED, f"its description is nonsense: {exc}") from exc
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
            raise CallRefusedError(FAILED, "its description has declarations of its own")

    def _refuse_entity(self, *_declaration: object) -> None:
        raise CallRefusedError(FAILED, "its description has entities of its own")
