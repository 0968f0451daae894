"""D-Bus bodies read and written in slices, with a limit on the steps of a body.

A step is a value, or as many bytes of text as take the same time. Other programs choose the bodies
that are read here, so a body is never read in one go. `Unpacker.run` and `Packer.run` stop after a
number of steps, and the next call continues. Both refuse a body with more steps than the limit.
Both are strict, and raise ValueError for a body that does not fit the signature.
"""

import struct
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from broker.wire.names import is_object_path
from broker.wire.signature import BASIC, find_type_end, is_signature, is_single_type

# Steps of a body. The longest rule list has 50 000 steps, and metadata of 64 KiB at most 16 384.
MAX_STEPS: Final = 100_000
# Bytes of a body. A list of 10 000 typical rules has a tenth of this size.
MAX_BODY: Final = 8 * 1024 * 1024
# Steps between the turns of other callers. A step takes one to three microseconds.
STEPS_A_SLICE: Final = 1000
# The specification's limit, for containers of all kinds together.
MAX_DEPTH: Final = 64
# Bytes of text that take as long as a value.
BYTES_A_STEP: Final = 1024
# Compiled signatures that are remembered. Callers choose the signatures, so the number is limited.
MAX_SIGNATURES: Final = 256

_CODES: Final = {
    "y": "B",
    "b": "I",
    "n": "h",
    "q": "H",
    "i": "i",
    "u": "I",
    "h": "I",
    "x": "q",
    "t": "Q",
    "d": "d",
}
_LITTLE: Final = {code: struct.Struct("<" + layout) for code, layout in _CODES.items()}
_BIG: Final = {code: struct.Struct(">" + layout) for code, layout in _CODES.items()}
_ALIGNMENTS: Final = {"s": 4, "o": 4, "a": 4, "g": 1, "v": 1, "(": 8, "{": 8}


class TooLongError(ValueError):
    """A body is within the specification but over a limit of this program."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A value with its type."""

    signature: str
    value: object


@dataclass(frozen=True, slots=True)
class Kind:
    """A complete type.

    A flat type is read at once: a basic type, or a struct or dict entry of flat types.
    """

    code: str
    alignment: int
    inner: tuple["Kind", ...] = ()
    flat: bool = True


@lru_cache(MAX_SIGNATURES)
def parse_kinds(signature: str) -> tuple[Kind, ...]:
    """Return the complete types of a signature. Raises ValueError."""
    if not is_signature(signature):
        raise ValueError(f"not a signature: {signature[:40]!r}")
    return tuple(_split(signature))


@lru_cache(MAX_SIGNATURES)
def parse_kind(signature: str) -> Kind:
    """Return the complete type of a variant's value. Raises ValueError."""
    if not is_single_type(signature):
        raise ValueError(f"a variant of {signature[:40]!r}")
    return _compile(signature)


def _split(signature: str) -> Iterator[Kind]:
    at = 0
    while at < len(signature):
        # a dict entry is no complete type, but the only content of its array
        if signature[at] == "{":
            yield _compile(signature[at:])
            return
        end = find_type_end(signature, at)
        yield _compile(signature[at:end])
        at = end


def _compile(text: str) -> Kind:
    code = text[0]
    if (fixed := _LITTLE.get(code)) is not None:
        return Kind(code, fixed.size)
    inner: tuple[Kind, ...] = ()
    if code == "a":
        inner = tuple(_split(text[1:]))
    elif code in "({":
        inner = tuple(_split(text[1:-1]))
    flat = code in "sog" or (code in "({" and all(one.flat for one in inner))
    return Kind(code, _ALIGNMENTS[code], inner, flat)


class _Work:
    """A task whose steps are counted."""

    def __init__(self, steps: Iterator[None], limit: int) -> None:
        self._steps: Final = steps
        self._limit: Final = limit
        self._all = limit
        self._left = 0
        self._depth = 0
        self.longest_slice = 0  # the largest number of steps taken at a time

    @property
    def spent(self) -> int:
        """Return the number of steps taken so far."""
        return self._limit - self._all

    def run(self, steps: int = STEPS_A_SLICE) -> bool:
        """Take some steps, and return whether the work is finished.

        Raises ValueError. The object cannot be used after an error.
        """
        self._left = steps
        try:
            next(self._steps)
        except StopIteration:
            return True
        except TooLongError:
            raise
        except (struct.error, ValueError, TypeError, IndexError, AttributeError) as exc:
            raise ValueError(str(exc)) from exc
        finally:
            self.longest_slice = max(self.longest_slice, steps - self._left)
        return False

    def run_all(self) -> None:
        """Take all remaining steps. Raises ValueError."""
        while not self.run(self._limit):
            pass

    def _spend(self, steps: int) -> None:
        self._left -= steps
        self._all -= steps
        if self._all < 0:
            raise TooLongError(f"more than {self._limit} values")

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError("a value nested too deep")


class Unpacker(_Work):
    """A reader of a body. `values` is complete once `run` has returned True."""

    def __init__(
        self,
        signature: str,
        body: bytes,
        *,
        little: bool = True,
        limit: int = MAX_STEPS,
        whole: bool = True,
    ) -> None:
        super().__init__(self._read_all(signature, whole=whole), limit)
        self.values: Final[list[Any]] = []
        self._data: Final = body
        self._at = 0
        self._order: Final = "<" if little else ">"
        self._structs: Final = _LITTLE if little else _BIG

    def _read_all(self, signature: str, *, whole: bool) -> Iterator[None]:
        for kind in parse_kinds(signature):
            self.values.append((yield from self._value(kind)))
        if whole and self._at != len(self._data):
            raise ValueError(f"{len(self._data) - self._at} bytes too many")

    def _value(self, kind: Kind) -> Generator[None, None, Any]:
        if kind.flat:
            value = self._flat(kind)
            if self._left < 0:
                yield
            return value
        self._enter()
        self._spend(1)
        if kind.code == "v":
            value = yield from self._variant()
        elif kind.code == "a":
            value = yield from self._array(kind.inner[0])
        else:
            self._align(8)
            value = ()
            for inner in kind.inner:
                value += ((yield from self._value(inner)),)
        self._depth -= 1
        if self._left < 0:
            yield
        return value

    def _variant(self) -> Generator[None, None, Any]:
        kind = _SHORT.get(self._data[self._at : self._at + 3])
        if kind is not None:  # nearly every variant has a basic type
            self._at += 3
            return Variant(kind.code, self._flat(kind))
        signature = self._signature()
        return Variant(signature, (yield from self._value(parse_kind(signature))))

    def _array(self, kind: Kind) -> Generator[None, None, Any]:
        size: int = self._fixed("u")
        self._align(kind.alignment)
        end = self._at + size
        if end > len(self._data):
            raise ValueError("an array runs past the end")
        if kind.code in self._structs and kind.code != "b":
            return self._numbers(kind, end)
        items: list[Any] = []
        while self._at < end:
            if kind.flat:
                items.append(self._flat(kind))
            else:
                items.append((yield from self._element(kind)))
            if self._left < 0:
                yield
        if self._at != end:
            raise ValueError("an element runs past the end of its array")
        return dict(items) if kind.code == "{" else items

    def _element(self, kind: Kind) -> Generator[None, None, Any]:
        if kind.code != "{":
            return (yield from self._value(kind))
        self._align(8)
        self._spend(1)
        key, item = kind.inner
        name = self._flat(key)
        return name, (yield from self._value(item))

    def _numbers(self, kind: Kind, end: int) -> object:
        """Take an array of numbers at once."""
        start, size = self._at, self._structs[kind.code].size
        count, rest = divmod(end - start, size)
        if rest:
            raise ValueError(f"an array that is no multiple of its {size} byte elements")
        self._at = end
        if kind.code == "y":
            self._spend(count // BYTES_A_STEP)
            return self._data[start:end]
        self._spend(count)
        return list(
            struct.unpack_from(f"{self._order}{count}{_CODES[kind.code]}", self._data, start)
        )

    def _flat(self, kind: Kind) -> Any:
        code = kind.code
        self._spend(1)
        if code in "so":
            text = self._text(self._fixed("u"))
            if code == "o" and not is_object_path(text):
                raise ValueError(f"not an object path: {text[:40]!r}")
            return text
        if code in "({":
            self._align(8)
            return tuple(map(self._flat, kind.inner))
        if code == "g":
            return self._signature()
        value = self._fixed(code)
        if code != "b":
            return value
        if value > 1:
            raise ValueError(f"a boolean of {value}")
        return value == 1

    def _fixed(self, code: str) -> Any:
        layout = self._structs[code]
        if self._at % layout.size:
            self._align(layout.size)
        (value,) = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return value

    def _signature(self) -> str:
        length = self._fixed("y")
        # The check takes time in proportion to the signature's length.
        self._spend(length)
        text = self._text(length)
        if not is_signature(text):
            raise ValueError(f"not a signature: {text[:40]!r}")
        return text

    def _text(self, length: int) -> str:
        start = self._at
        stop = start + length
        if self._data[stop]:
            raise ValueError("a string without its NUL")
        self._spend(length // BYTES_A_STEP)
        text = self._data[start:stop].decode()
        if "\0" in text:
            raise ValueError("a string with a NUL in it")
        self._at = stop + 1
        return text

    def _align(self, alignment: int) -> None:
        start = self._at
        self._at += -start % alignment
        if any(self._data[start : self._at]):
            raise ValueError(f"padding at byte {start} is not zero")


class Packer(_Work):
    """A writer of a little-endian body. `body` is complete once `run` has returned True.

    An array's value may be an iterator. The elements are then taken one by one, as the steps allow.
    """

    def __init__(
        self,
        signature: str,
        values: Sequence[object],
        *,
        limit: int = 2**31,
        max_bytes: int = MAX_BODY,
    ) -> None:
        super().__init__(self._put_all(signature, values), limit)
        self._out = bytearray()
        self._max: Final = max_bytes

    @property
    def body(self) -> bytes:
        """Return the bytes that were packed so far."""
        return bytes(self._out)

    def _put_all(self, signature: str, values: Sequence[object]) -> Iterator[None]:
        kinds = parse_kinds(signature)
        if len(kinds) != len(values):
            raise ValueError(f"{len(values)} values for {signature[:40]!r}")
        for kind, value in zip(kinds, values, strict=True):
            yield from self._put(kind, value)

    def _put(self, kind: Kind, value: Any) -> Iterator[None]:
        if kind.flat:
            self._put_flat(kind, value)
            if self._left < 0:
                yield
            return
        self._enter()
        self._spend(1)
        if kind.code == "v":
            self._put_flat(_SIGNATURE, value.signature)
            yield from self._put(parse_kind(value.signature), value.value)
        elif kind.code == "a":
            yield from self._put_array(kind.inner[0], value)
        else:
            self._align(8)
            for inner, item in zip(kind.inner, value, strict=True):
                yield from self._put(inner, item)
        self._depth -= 1
        if self._left < 0:
            yield

    def _put_array(self, kind: Kind, value: Any) -> Iterator[None]:
        self._align(4)
        length_at = len(self._out)
        self._out += bytes(4)
        self._align(kind.alignment)
        start = len(self._out)
        if kind.code == "y":
            self._out += bytes(value)
            self._spend(len(value) // BYTES_A_STEP)
        else:
            if isinstance(value, str):
                raise TypeError("a text as an array")
            items: Iterable[Any] = value.items() if kind.code == "{" else value
            for item in items:
                yield from self._put(kind, item)
        _LITTLE["u"].pack_into(self._out, length_at, len(self._out) - start)
        self._check_size()

    def _put_flat(self, kind: Kind, value: Any) -> None:
        self._spend(1)
        out, code = self._out, kind.code
        if (layout := _LITTLE.get(code)) is not None:
            if (code == "b") is not isinstance(value, bool):
                raise TypeError(f"{value!r} as {code!r}")
            self._align(layout.size)
            out += layout.pack(value)
        elif code in "({":
            self._align(8)
            for inner, item in zip(kind.inner, value, strict=True):
                self._put_flat(inner, item)
        else:
            self._put_text(code, value)

    def _put_text(self, code: str, text: str) -> None:
        raw = text.encode()
        if b"\0" in raw:
            raise ValueError(f"{text[:40]!r} has a NUL")
        if (code == "o" and not is_object_path(text)) or (code == "g" and not is_signature(text)):
            raise ValueError(f"{text[:40]!r} as {code!r}")
        self._spend(len(raw) // BYTES_A_STEP)
        if code == "g":
            self._out.append(len(raw))
        else:
            self._align(4)
            self._out += _LITTLE["u"].pack(len(raw))
        self._out += raw
        self._out.append(0)
        self._check_size()

    def _check_size(self) -> None:
        if len(self._out) > self._max:
            raise TooLongError(f"more than {self._max} bytes")

    def _align(self, alignment: int) -> None:
        self._out += bytes(-len(self._out) % alignment)


_SIGNATURE: Final = Kind("g", 1)
# The first bytes of variants of basic types.
_SHORT: Final = {bytes((1, ord(code), 0)): parse_kind(code) for code in sorted(BASIC)}
