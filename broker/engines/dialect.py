"""How a bus that has Containers1 itself is to be talked to: names, arguments, bodies. Pure.

The interface was proposed under other names than it was merged under, and is to get more arguments: what a bus has it
says itself, by Introspect and SupportedArguments.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from broker.bus.values import Variant, pack, unpack
from broker.gate.control import SandboxSpec
from broker.gate.upstream import CONTAINERS1, Called, Upstream
from broker.wire.errors import FAILED, CallRefusedError
from policy.superset import make_superset

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
_INTERFACE: Final = re.compile(
    rf'<interface\s+name="{re.escape(CONTAINERS1)}"\s*>(.*?)</interface>', re.DOTALL
)
_METHOD: Final = re.compile(r'<method\s+name="(\w+)"\s*(?:/>|>(.*?)</method>)', re.DOTALL)
_ARG: Final = re.compile(r"<arg\s([^>]*)>")
_TYPE: Final = re.compile(r'\btype="([^"]*)"')


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """What one bus understands. An empty name is a method that it does not have."""

    add: str
    stop: str
    stop_listening: str
    set_access: str
    arguments: frozenset[str]

    def upstream(self, instance: str, address: str) -> Upstream:
        """Return what the gate is to know of an instance."""
        return Upstream(
            instance=instance,
            address=address,
            stop=self.stop,
            stop_listening=self.stop_listening,
        )


def parse_dialect(xml: str, arguments: Sequence[str]) -> Dialect | None:
    """Return how a bus with that description is talked to; None: it has no Containers1 that we know."""
    found = _INTERFACE.search(xml)
    if found is None:
        return None
    methods = {name: _signatures(args or "") for name, args in _METHOD.findall(found[1])}

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
    if "Allow" in dialect.arguments:
        named["Allow"] = Variant("a(usos)", list(make_superset(spec.access, bus)))
    # Metadata can be large and is marshalled already.
    body = bytearray(pack("ss", [spec.identity.type, spec.identity.app]))
    _append_dict(body, _metadata(spec))
    _append_dict(body, pack("a{sv}", [named]))
    return bytes(body)


def _metadata(spec: SandboxSpec) -> bytes:
    """Return a marshalled `a{sv}` of metadata and component."""
    metadata = spec.metadata or _EMPTY
    if spec.identity.component is None:
        return metadata
    if COMPONENT.encode() in metadata:  # somebody else's word for it
        (values,) = unpack("a{sv}", metadata)
        values.pop(COMPONENT, None)
        metadata = pack("a{sv}", [values])
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
        (path,) = unpack("o", called.body, little=called.little)
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


def _signatures(args: str) -> tuple[str, str]:
    """Return what a method takes and what it gives."""
    takes = gives = ""
    for attributes in _ARG.findall(args):
        if (found := _TYPE.search(attributes)) is None:
            continue
        if re.search(r'\bdirection="out"', attributes):
            gives += found[1]
        else:
            takes += found[1]
    return takes, gives


def describe(upstreams: Mapping[str, Upstream]) -> dict[str, str]:
    """Return the bus's instance paths, by bus."""
    return {bus: one.instance for bus, one in upstreams.items() if one.instance}
