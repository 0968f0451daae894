"""D-Bus values as Python has them, and their bytes: dbus-next's codec, made safe for a daemon.

A value is a str, int, bool, float, bytes (`ay`), list (array), dict (`a{..}`), tuple (struct, read as
such, and written from a list as well), or a Variant. `pack` and `unpack` are inverse, and raise ValueError.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dbus_next._private.marshaller import Marshaller
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.errors import InvalidSignatureError, SignatureBodyMismatchError
from dbus_next.signature import SignatureTree, Variant as _WireVariant

# dbus-next remembers each signature it ever saw; who calls us chooses them.
MAX_SIGNATURES: Final = 1024


@dataclass(frozen=True, slots=True)
class Variant:
    """A value that says its type."""

    signature: str
    value: object


def pack(signature: str, values: Sequence[object]) -> bytes:
    """Return the little-endian bytes of a body. Raises ValueError if the values do not fit."""
    _bound_cache()
    try:
        return bytes(Marshaller(signature, to_wire(list(values))).marshall())
    except (InvalidSignatureError, SignatureBodyMismatchError, UnicodeEncodeError) as exc:
        raise ValueError(str(exc)) from exc


def unpack(signature: str, body: bytes, *, little: bool = True) -> list[Any]:
    """Return the values of a body. Raises ValueError."""
    _bound_cache()
    reader = _BodyReader(body, little=little)
    try:
        return [reader.read_argument(kind) for kind in SignatureTree._get(signature).types]  # noqa: SLF001
    except Exception as exc:
        raise ValueError(f"a body that is not of type {signature[:40]!r}") from exc


def to_wire(value: object) -> Any:
    """Return the value in dbus-next's terms. Raises ValueError for a variant that does not fit."""
    if isinstance(value, Variant):
        try:
            return _WireVariant(value.signature, to_wire(value.value))
        except (InvalidSignatureError, SignatureBodyMismatchError, TypeError) as exc:
            raise ValueError(str(exc)) from exc
    if isinstance(value, dict):
        return {key: to_wire(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_wire(item) for item in value]
    return value


def plain(value: object) -> Any:
    """Return the value without its variants' types."""
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
    """Say whether a descriptor's index is anywhere in it."""
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


class _BodyReader(Unmarshaller):
    """dbus-next's reader on bytes that are all there, giving out our Variant, and tuples for structs."""

    read_argument: Callable[[Any], Any]

    def __init__(self, body: bytes, *, little: bool) -> None:
        super().__init__(io.BytesIO(body))
        self.endian = ord("l") if little else ord("B")

    def read_variant(self, _kind: object = None) -> Variant:
        signature = self.read_signature()
        (kind,) = SignatureTree._get(signature).types  # noqa: SLF001
        return Variant(signature, self.read_argument(kind))

    def read_struct(self, kind: Any) -> tuple[object, ...]:
        return tuple(super().read_struct(kind))


def _bound_cache() -> None:
    cache = SignatureTree._cache  # noqa: SLF001
    if len(cache) > MAX_SIGNATURES:
        cache.clear()
