"""Strict reading of marshalled values: nothing is accepted that a bus would refuse.

The first byte of a Reader's data is aligned to 8: the start of a message or of a body. Each method
takes one value, and raises PeerProtocolError if the value is missing or invalid. The Reader never
recurses. Work is counted, so that a peer cannot make a header cost more than MAX_STEPS.
"""

import re
import struct
from typing import Final

from broker.wire.errors import PeerProtocolError
from broker.wire.names import is_object_path
from broker.wire.signature import BASIC, find_type_end, is_signature, is_single_type

MAX_ARRAY: Final = 2**26  # bytes; the specification's limit
# The specification allows 64 levels of containers of all kinds together.
MAX_DEPTH: Final = 64
# A normal header has at most ten fields of a step or two each, and a signature. Only a hostile
# header has thousands of values. This many steps take about ten milliseconds, and meanwhile no
# other peer is served.
MAX_STEPS: Final = 2**14

SIZES: Final = {"y": 1, "n": 2, "q": 2, "i": 4, "u": 4, "h": 4, "x": 8, "t": 8, "d": 8}
ALIGNMENTS: Final = {
    **SIZES,
    "b": 4,
    "s": 4,
    "o": 4,
    "a": 4,
    "g": 1,
    "v": 1,
    "(": 8,
    "{": 8,
}
# Unicode's non-characters: U+FDD0 to U+FDEF and the last two of each plane.
_PLANE_ENDS: Final = "".join(
    chr(plane << 16 | 0xFFFE) + chr(plane << 16 | 0xFFFF) for plane in range(17)
)
_NON_CHARACTER: Final = re.compile(f"[\ufdd0-\ufdef{_PLANE_ENDS}]")
# Nearly every variant in a header has a basic type. These bytes of such a variant need no parse.
_SHORT: Final = {bytes((1, ord(code), 0)): code for code in BASIC}
_LITTLE: Final = struct.Struct("<I")
_BIG: Final = struct.Struct(">I")


class Reader:
    """A position in marshalled bytes.

    The next value starts at `at`, and the values end at `end`.
    """

    def __init__(self, data: bytes, *, little: bool, at: int = 0, end: int | None = None) -> None:
        self.at = at
        self.end: Final = len(data) if end is None else end
        self._data: Final = data
        self._unpack: Final = (_LITTLE if little else _BIG).unpack_from
        self._steps = 0

    def spend(self, steps: int = 1) -> None:
        """Count steps of work. Raises PeerProtocolError above MAX_STEPS."""
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise PeerProtocolError("too many values")

    def align(self, alignment: int) -> None:
        """Skip padding. Raises PeerProtocolError if the padding is not zero."""
        if padding := -self.at % alignment:
            start = self._take(padding)
            if any(self._data[start : self.at]):
                raise PeerProtocolError(f"padding at byte {start} is not zero")

    def byte(self) -> int:
        """Take a `y`."""
        return self._data[self._take(1)]

    def uint32(self) -> int:
        """Take a `u`."""
        self.align(4)
        (value,) = self._unpack(self._data, self._take(4))
        return int(value)

    def boolean(self) -> bool:
        """Take a `b`."""
        value = self.uint32()
        if value > 1:
            raise PeerProtocolError(f"a boolean of {value}")
        return value == 1

    def string(self) -> str:
        """Take an `s`."""
        return self._text(self.uint32())

    def object_path(self) -> str:
        """Take an `o`."""
        text = self.string()
        if not is_object_path(text):
            raise PeerProtocolError(f"not an object path: {text[:40]!r}")
        return text

    def signature(self) -> str:
        """Take a `g`."""
        length = self.byte()
        self.spend(length)  # the check takes time in proportion to the length
        text = self._text(length)
        if not is_signature(text):
            raise PeerProtocolError(f"not a signature: {text[:40]!r}")
        return text

    def array_end(self, element: str) -> int:
        """Take an array's length, and skip to the first element. Returns the array's end."""
        length = self.uint32()
        if length > MAX_ARRAY:
            raise PeerProtocolError(f"an array of {length} bytes")
        self.align(ALIGNMENTS[element])
        if length > self.end - self.at:
            raise PeerProtocolError("an array runs past the end")
        return self.at + length

    def finish(self) -> None:
        """Check that no bytes are left."""
        if self.at != self.end:
            raise PeerProtocolError(f"{self.end - self.at} bytes too many")

    def skip(self, code: str) -> None:
        """Take and discard a value of a basic type."""
        match code:
            case "s":
                self.string()
            case "o":
                self.object_path()
            case "g":
                self.signature()
            case "b":
                self.boolean()
            case _:
                self.align(SIZES[code])
                self._take(SIZES[code])

    def variant_type(self) -> str:
        """Take the signature of a variant, which is a single complete type."""
        short = _SHORT.get(self._data[self.at : min(self.at + 3, self.end)])
        if short is not None:
            self.at += 3
            return short
        text = self.signature()
        if not is_single_type(text):
            raise PeerProtocolError(f"a variant of {text[:40]!r}")
        return text

    def _take(self, size: int) -> int:
        start = self.at
        if size > self.end - start:
            raise PeerProtocolError("a value runs past the end")
        self.at = start + size
        return start

    def _text(self, length: int) -> str:
        start = self._take(length + 1)
        raw = self._data[start : start + length]
        if self._data[start + length] or 0 in raw:
            raise PeerProtocolError("a string with a wrong NUL")
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise PeerProtocolError("a string that is not UTF-8") from None
        if not raw.isascii() and _NON_CHARACTER.search(text):
            raise PeerProtocolError("a string with a non-character")
        return text


class _Frame:
    """Types still to be read, from `at` to `stop`.

    An array reads the types again until its end.
    """

    __slots__ = ("array_end", "at", "signature", "start", "stop")

    def __init__(self, signature: str, start: int, stop: int, array_end: int | None = None) -> None:
        self.signature: Final = signature
        self.start: Final = start
        self.stop: Final = stop
        self.array_end: Final = array_end
        # An array may be empty. So the array's end is checked before the first element, too.
        self.at = start if array_end is None else stop


def skip_value(reader: Reader, signature: str, *, depth: int = 0) -> None:
    """Check and skip a value of any type. `depth` counts the containers around the value."""
    stack = [_Frame(signature, 0, len(signature))]
    while stack:
        if depth + len(stack) > MAX_DEPTH:
            raise PeerProtocolError("a value nested too deep")
        reader.spend()
        frame = stack[-1]
        if frame.at < frame.stop:
            _skip_type(reader, frame, stack)
        elif frame.array_end is None or reader.at == frame.array_end:
            stack.pop()
        elif reader.at < frame.array_end:
            frame.at = frame.start
        else:
            raise PeerProtocolError("an element runs past the end of its array")


def _skip_type(reader: Reader, frame: _Frame, stack: list[_Frame]) -> None:
    at = frame.at
    code = frame.signature[at]
    match code:
        case "v":
            frame.at = at + 1
            inner = reader.variant_type()
            stack.append(_Frame(inner, 0, len(inner)))
        case "a" | "(" | "{":
            # A dict entry is no complete type. The array of dict entries contains nothing else.
            stop = frame.stop if code == "{" else find_type_end(frame.signature, at)
            reader.spend(stop - at)  # finding the end takes time in proportion to the type's length
            frame.at = stop
            if code == "a":
                _skip_array(reader, _Frame(frame.signature, at + 1, stop), stack)
            else:
                reader.align(8)
                stack.append(_Frame(frame.signature, at + 1, stop - 1))
        case _:
            frame.at = at + 1
            reader.skip(code)


def _skip_array(reader: Reader, element: _Frame, stack: list[_Frame]) -> None:
    code = element.signature[element.at]
    array_end = reader.array_end(code)
    if size := SIZES.get(code):
        # Any bytes are valid numbers, so no element needs a look.
        if (array_end - reader.at) % size:
            raise PeerProtocolError(f"an array that is no multiple of its {size} byte elements")
        reader.at = array_end
    else:
        stack.append(_Frame(element.signature, element.start, element.stop, array_end))
