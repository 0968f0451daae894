"""Entries of a(usos) are refused with ValueError in one line, or their rules can all be said again."""

import struct
from typing import Final

from integration.fuzz.pieces import Choices, text_of
from policy.usos.wire_form import Usos, make_usos, parse_usos

_FLAGS: Final = struct.Struct("<I")
_MAX_ENTRIES: Final = 4


def check(data: bytes) -> None:
    """Hold the invariant."""
    entries = entries_of(Choices(data))
    try:
        rules = parse_usos(entries, origin="fuzz")
    except ValueError as exc:
        assert type(exc) is ValueError
        assert len(str(exc).splitlines()) == 1
        return
    assert len(rules) == len(entries)
    said, unsaid = make_usos(rules)
    assert not unsaid
    assert parse_usos(said, origin="fuzz") == rules


def entries_of(choices: Choices) -> list[Usos]:
    """Return the entries that an input is: each one flags, and three texts with their lengths."""
    entries: list[Usos] = []
    while not choices.ended and len(entries) < _MAX_ENTRIES:
        (flags,) = _FLAGS.unpack(choices.take(_FLAGS.size).ljust(_FLAGS.size, b"\0"))
        name, path, interface = (text_of(choices.take(choices.byte())) for _ in range(3))
        entries.append((flags, name, path, interface))
    return entries


def make_input(*entries: Usos) -> bytes:
    """Return the input that is these entries."""
    out = bytearray()
    for flags, *texts in entries:
        out += _FLAGS.pack(flags)
        for text in texts:
            out += bytes((len(text),)) + text.encode()
    return bytes(out)


def seeds() -> list[bytes]:
    """Return entries with every flag."""
    return [
        make_input((0x7, "org.a", "/a", "org.i"), (0x89, "org.a", "", "")),
        make_input((0x32, "org.a", "/a", "org.i"), (0x72, "org.a", "/", "org.i.M")),
        make_input((0x106, "org.a", "/", ""), (0x202, ":1.7", "", "")),
        make_input((0x402, "io.snap/foo#bar", "/a/b", ""), (0x401, "io.snap/", "", "")),
    ]
