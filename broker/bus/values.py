"""D-Bus values as Python values, and their marshalled bytes.

A value is a str, int, bool, float, bytes (`ay`), list (array), dict (`a{..}`), tuple (struct) or
Variant. A struct may be written from a list, too.

`pack` and `unpack` are inverse and raise ValueError. Both work through a body at once, which suits
short bodies and bodies of this program. Bodies of others are read by `unpack_in_turns`.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from broker.bus.codec import MAX_BODY, MAX_STEPS, Packer, Unpacker, Variant

__all__ = [
    "Turn",
    "Variant",
    "holds_descriptor",
    "nesting",
    "pack",
    "pack_in_turns",
    "plain",
    "unpack",
    "unpack_in_turns",
]

Turn = Callable[[], Awaitable[None]]
# A reply may have as many values as the bytes allow, because this program requested the reply.
_NO_LIMIT: Final = 2**31


def pack(signature: str, values: Sequence[object]) -> bytes:
    """Return the little-endian bytes of a body. Raises ValueError if the values do not fit."""
    packer = Packer(signature, values, max_bytes=_NO_LIMIT)
    packer.run_all()
    return packer.body


def unpack(signature: str, body: bytes, *, little: bool = True, whole: bool = True) -> list[Any]:
    """Return the values of a body, or of its beginning. Raises ValueError."""
    unpacker = Unpacker(signature, body, little=little, limit=_NO_LIMIT, whole=whole)
    try:
        unpacker.run_all()
    except ValueError as exc:
        raise ValueError(f"a body that is not of type {signature[:40]!r}") from exc
    return unpacker.values


async def pack_in_turns(
    signature: str, values: Sequence[object], turn: Turn, *, max_bytes: int = MAX_BODY
) -> bytes:
    """Return the bytes of a body, with turns of other callers in between.

    Raises ValueError and TooLongError.
    """
    packer = Packer(signature, values, max_bytes=max_bytes)
    while not packer.run():
        await turn()
    return packer.body


async def unpack_in_turns(
    signature: str, body: bytes, turn: Turn, *, little: bool = True, limit: int = MAX_STEPS
) -> list[Any]:
    """Return the values of another program's body, with turns of other callers in between.

    Raises ValueError and TooLongError.
    """
    unpacker = Unpacker(signature, body, little=little, limit=limit)
    while not unpacker.run():
        await turn()
    return unpacker.values


def plain(value: object) -> Any:
    """Return a value with plain values in place of variants."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return value


def holds_descriptor(value: object) -> bool:
    """Return whether a value contains the index of a descriptor."""
    if isinstance(value, Variant):
        return "h" in value.signature or holds_descriptor(value.value)
    if isinstance(value, dict):
        return any(holds_descriptor(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(holds_descriptor(item) for item in value)
    return False


def nesting(value: object) -> int:
    """Count the containers (arrays, structs, variants) around the innermost value."""
    if isinstance(value, Variant):
        return 1 + nesting(value.value)
    if isinstance(value, dict):
        return 2 + max(map(nesting, value.values()), default=0)
    if isinstance(value, list | tuple):
        return 1 + max(map(nesting, value), default=0)
    return 0
