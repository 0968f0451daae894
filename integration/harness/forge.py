"""Messages that no library would make: every field as the test says it, right or wrong."""

import struct
from collections.abc import Sequence
from typing import Any, Final

from integration.harness.service import ECHO, PATH
from integration.harness.values import encode

Field = tuple[int, str, Any]  # code, signature, value (bytes: as they are)

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
# A call of the service: what most forgeries begin with.
GOOD: Final[Sequence[Field]] = (
    (1, "o", PATH),
    (2, "s", ECHO),
    (3, "s", "Ping"),
    (6, "s", ECHO),
)


def without(*codes: int) -> list[Field]:
    """Return GOOD without some of its fields."""
    return [field for field in GOOD if field[0] not in codes]


def with_field(code: int, signature: str, value: Any) -> list[Field]:
    """Return GOOD with one field in place of its own, or more."""
    return [*without(code), (code, signature, value)]


def forge(
    fields: Sequence[Field] = GOOD,
    *,
    kind: int = CALL,
    serial: int = 77,
    flags: int = 0,
    version: int = 1,
    endian: bytes = b"l",
    body: bytes = b"",
    body_length: int | None = None,
    fields_length: int | None = None,
    padding: bytes = b"\0",
) -> bytes:
    """Return a little-endian message, whatever its first byte says."""
    array = bytearray()
    for code, signature, value in fields:
        array += padding * (-len(array) % 8)
        array += bytes([code, len(signature)]) + signature.encode() + b"\0"
        if isinstance(value, bytes):
            array += value
            continue
        array += padding * (-len(array) % (1 if signature == "g" else 4))
        array += encode(signature.replace("o", "s"), (value,))  # where "o" would be checked
    announced = len(array) if fields_length is None else fields_length
    size = len(body) if body_length is None else body_length
    head = struct.pack("<BBBBIII", endian[0], kind, flags, version, size, serial, announced)
    return head + bytes(array) + padding * (-len(array) % 8) + body


def text(value: bytes, *, end: bytes = b"\0") -> bytes:
    """Return a string as it is marshalled behind a one-letter signature, with any bytes in it."""
    return struct.pack("<I", len(value)) + value + end
