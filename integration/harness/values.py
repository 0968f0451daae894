"""A general codec for D-Bus bodies, little-endian: test code, apart from broker.wire on purpose.

`encode("sa{sv}", ("x", {"k": Variant("u", 1)}))` gives the body; `decode` gives the values back, with
variants unwrapped. Arrays of bytes are `bytes`, dicts are dicts, structs are tuples. It trusts what it
reads: it is for bodies that a bus let through.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

_FIXED: Final = {
    "y": "<B",
    "b": "<I",
    "n": "<h",
    "q": "<H",
    "i": "<i",
    "u": "<I",
    "h": "<I",
    "x": "<q",
    "t": "<Q",
    "d": "<d",
}
_ALIGNMENT: Final = {"s": 4, "o": 4, "a": 4, "g": 1, "v": 1, "(": 8, "{": 8}


@dataclass(frozen=True, slots=True)
class Variant:
    """A value that says its type, where the signature has `v`."""

    signature: str
    value: Any


def encode(signature: str, values: Sequence[Any]) -> bytes:
    """Return the body."""
    out = bytearray()
    types = list(split_signature(signature))
    if len(types) != len(values):
        raise ValueError(f"{len(values)} values for {signature!r}")
    for one, value in zip(types, values, strict=True):
        _put(out, one, value)
    return bytes(out)


def decode(signature: str, body: bytes) -> tuple[Any, ...]:
    """Return the values of a body."""
    reader = _Reader(body)
    return tuple(reader.take(one) for one in split_signature(signature))


def split_signature(signature: str) -> Iterator[str]:
    """Yield the complete types of a signature."""
    start = 0
    while start < len(signature):
        end = _end_of_type(signature, start)
        yield signature[start:end]
        start = end


def _end_of_type(signature: str, start: int) -> int:
    if signature[start] == "a":
        return _end_of_type(signature, start + 1)
    if signature[start] not in "({":
        return start + 1
    depth = 0
    for position in range(start, len(signature)):
        depth += (signature[position] in "({") - (signature[position] in ")}")
        if depth == 0:
            return position + 1
    raise ValueError(f"unbalanced signature: {signature!r}")


def _alignment(one: str) -> int:
    fixed = _FIXED.get(one[0])
    return struct.calcsize(fixed) if fixed else _ALIGNMENT[one[0]]


def _pad(out: bytearray, alignment: int) -> None:
    out += bytes(-len(out) % alignment)


def _put(out: bytearray, one: str, value: Any) -> None:
    _pad(out, _alignment(one))
    match one[0]:
        case "s" | "o":
            if one == "o" and not value.startswith("/"):
                raise ValueError(f"not an object path, the bus would hang up: {value!r}")
            text = value.encode()
            out += struct.pack("<I", len(text)) + text + b"\0"
        case "g":
            out += bytes([len(value)]) + value.encode() + b"\0"
        case "v":
            _put(out, "g", value.signature)
            _put(out, value.signature, value.value)
        case "a":
            _put_array(out, one[1:], value)
        case "(" | "{":
            for part, item in zip(split_signature(one[1:-1]), value, strict=True):
                _put(out, part, item)
        case code:
            out += struct.pack(_FIXED[code], value)


def _put_array(out: bytearray, element: str, value: Any) -> None:
    length_at = len(out)
    out += bytes(4)
    _pad(out, _alignment(element))
    start = len(out)
    if element == "y":
        out += bytes(value)
    else:
        for item in value.items() if isinstance(value, dict) else value:
            _put(out, element, item)
    struct.pack_into("<I", out, length_at, len(out) - start)


class _Reader:
    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def take(self, one: str) -> Any:
        self._at += -self._at % _alignment(one)
        match one[0]:
            case "s" | "o":
                return self._text(self._fixed("<I"))
            case "g":
                return self._text(self._fixed("<B"))
            case "v":
                return self.take(self.take("g"))
            case "a":
                return self._array(one[1:])
            case "(" | "{":
                return tuple(self.take(part) for part in split_signature(one[1:-1]))
            case "b":
                return bool(self._fixed("<I"))
            case code:
                return self._fixed(_FIXED[code])

    def _fixed(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self._body, self._at)
        self._at += struct.calcsize(layout)
        return value

    def _text(self, length: int) -> str:
        start = self._at
        self._at += length + 1
        return self._body[start : start + length].decode()

    def _array(self, element: str) -> Any:
        length = self._fixed("<I")
        self._at += -self._at % _alignment(element)
        end = self._at + length
        if element == "y":
            start, self._at = self._at, end
            return self._body[start:end]
        items = []
        while self._at < end:
            items.append(self.take(element))
        return dict(items) if element[0] == "{" else items
