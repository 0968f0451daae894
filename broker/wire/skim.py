"""Skimming of headers that are legal on the bus but exceed the limits of the parser.

Such a header is too large, or has too many values. Only the message with this header is left out.
But a program may wait for the message: the caller of a call, or the app whose call a reply answers.
So the names and serial numbers are read, and every other value is skipped by length. Only the
returned values are checked, because the message is not passed on. Work is counted: a header of
64 MiB costs at most as much as MAX_STEPS values.
"""

import struct
from contextlib import suppress
from dataclasses import replace
from typing import Final

from broker.wire.errors import PeerProtocolError
from broker.wire.header import (
    BUS_LIMITS,
    FIXED_SIZE,
    READ_LIMITS,
    Data,
    Field,
    Header,
    parse_header,
    unpack_fixed,
)
from broker.wire.names import MAX_NAME, Predicate, is_bus_name
from broker.wire.reader import ALIGNMENTS, SIZES

# Type codes and signature bytes that are read. The nine fields of D-Bus take about thirty. A
# message with thousands of other values before these fields gets no answer.
MAX_STEPS: Final = 2**12

# by whether the message is little-endian
_UINT32: Final = {True: struct.Struct("<I"), False: struct.Struct(">I")}
_NAMES: Final[dict[int, Predicate]] = {Field.DESTINATION: is_bus_name, Field.SENDER: is_bus_name}
_NUMBERS: Final = (Field.REPLY_SERIAL, Field.UNIX_FDS)
_CLOSING: Final = {"(": ")", "{": "}"}


def skim_header(data: Data, offset: int = 0) -> Header:
    """Return a header with sender, destination, reply serial and descriptor count, if found.

    The whole header must be present. Raises PeerProtocolError for a header that cannot be measured.
    """
    header = skim_fixed(data, offset)
    end = FIXED_SIZE + _UINT32[header.little].unpack_from(data, offset + 12)[0]
    skim = _Skim(data, offset, end, little=header.little)
    # Malformed bytes end the search. A bus delivers no malformed header.
    with suppress(_EndOfSearch, IndexError, KeyError, struct.error):
        while skim.at < skim.end:
            skim.field()
    return replace(
        header,
        destination=skim.names.get(Field.DESTINATION),
        sender=skim.names.get(Field.SENDER),
        reply_serial=skim.numbers.get(Field.REPLY_SERIAL),
        unix_fds=skim.numbers.get(Field.UNIX_FDS, 0),
    )


def parse_or_skim(data: Data) -> Header:
    """Return a parsed header of the bus, or a skimmed header if parsing fails.

    Raises as `skim_header`.
    """
    try:
        return parse_header(data, 0, READ_LIMITS)
    except PeerProtocolError:
        return skim_header(data)


def skim_fixed(data: Data, offset: int = 0) -> Header:
    """Return a header of which only the first 16 bytes are present. Raises as `skim_header`."""
    little, type_, flags, body_length, serial, fields_length = unpack_fixed(
        data, offset, BUS_LIMITS
    )
    return Header(
        little=little,
        type=type_,
        flags=flags,
        body_length=body_length,
        serial=serial,
        size=FIXED_SIZE + (fields_length + 7 & ~7),
    )


class _EndOfSearch(Exception):  # noqa: N818 - an event, not a fault
    """Enough work was done, or the bytes ended."""


class _Skim:
    """A position among the fields, from the start of the message, with the values found so far."""

    def __init__(self, data: Data, offset: int, end: int, *, little: bool) -> None:
        self.at = FIXED_SIZE
        self.end: Final = end
        self.names: Final[dict[int, str]] = {}
        self.numbers: Final[dict[int, int]] = {}
        self._data: Final = data
        self._offset: Final = offset
        self._unpack: Final = _UINT32[little].unpack_from
        self._steps = 0

    def field(self) -> None:
        """Skip a field, and keep a value that is looked for."""
        self._align(8)
        code = self._byte()
        kind = self._signature()
        start = self.at
        self._value(kind)
        if kind == "s" and code in _NAMES:
            self._keep_name(code, start)
        elif kind == "u" and code in _NUMBERS:
            self.numbers[code] = self._number(start)

    def _keep_name(self, code: int, start: int) -> None:
        first = self._aligned(start, 4) + 4
        if self.at - first - 1 <= MAX_NAME:
            text = self._bytes(first, self.at - 1).decode("ascii", "replace")
            if _NAMES[code](text):
                self.names[code] = text

    def _value(self, kind: str) -> None:
        """Skip a value. A struct's end needs no search, because the members follow each other."""
        left = list(reversed(kind))
        while left:
            self._spend()
            code = left.pop()
            match code:
                case "s" | "o":
                    self._jump(self._length() + 1)
                case "g":
                    self._jump(self._byte() + 1)
                case "v":
                    left += reversed(self._signature())
                case "a":
                    length = self._length()
                    self._align(ALIGNMENTS[left[-1]])
                    self._jump(length)
                    self._drop_type(left)
                case "(" | "{":
                    self._align(8)
                case ")" | "}":
                    pass
                case _:
                    size = SIZES.get(code, 4)  # a boolean has four bytes
                    self._align(size)
                    self._jump(size)

    def _drop_type(self, left: list[str]) -> None:
        """Drop the element type of an array."""
        code = left.pop()
        while code == "a":
            self._spend()
            code = left.pop()
        depth = int(code in _CLOSING)
        while depth:
            self._spend()
            code = left.pop()
            depth += (code in _CLOSING) - (code in _CLOSING.values())

    def _spend(self, steps: int = 1) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise _EndOfSearch

    def _align(self, alignment: int) -> None:
        self.at = self._aligned(self.at, alignment)

    def _aligned(self, at: int, alignment: int) -> int:
        return at + -at % alignment

    def _jump(self, size: int) -> None:
        self.at += size
        if self.at > self.end:
            raise _EndOfSearch

    def _byte(self) -> int:
        self._jump(1)
        return self._data[self._offset + self.at - 1]

    def _signature(self) -> str:
        length = self._byte()
        self._spend(length + 1)
        start = self.at
        self._jump(length + 1)
        return self._bytes(start, start + length).decode("ascii", "replace")

    def _length(self) -> int:
        self._align(4)
        start = self.at
        self._jump(4)
        return self._number(start)

    def _number(self, at: int) -> int:
        value: int = self._unpack(self._data, self._offset + self._aligned(at, 4))[0]
        return value

    def _bytes(self, start: int, end: int) -> bytes:
        return bytes(self._data[self._offset + start : self._offset + end])
