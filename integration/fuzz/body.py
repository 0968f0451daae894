"""A body is refused with PeerProtocolError, or has values that make the same bytes; skipping takes as many.

The first bytes of an input say the byte order and the signature; the body is the rest.
"""

from typing import Final

from broker.wire.errors import PeerProtocolError
from broker.wire.marshal import make_body, read_body
from broker.wire.reader import Reader, skip_value
from integration.fuzz.pieces import Choices

_KINDS: Final = ("s", "o", "g", "u", "b", "as", "y", "v")
_MAX_VALUES: Final = 7


def check(data: bytes) -> None:
    """Hold the invariant."""
    choices = Choices(data)
    first = choices.byte()
    little = not first & 1
    kinds = [_KINDS[choices.byte() % len(_KINDS)] for _ in range((first >> 1) % _MAX_VALUES)]
    body = choices.rest()
    skipped = skips(kinds, body, little=little)
    try:
        values = read_body("".join(kinds), body, little=little)
    except PeerProtocolError:
        assert not skipped or {"y", "v"} & set(kinds)
        return
    assert skipped
    made = make_body("".join(kinds), values)
    assert made == body or not little
    assert read_body("".join(kinds), made, little=True) == values


def skips(kinds: list[str], body: bytes, *, little: bool) -> bool:
    """Say whether the values are there and nothing else, by the way that does not keep them."""
    reader = Reader(body, little=little)
    try:
        for kind in kinds:
            skip_value(reader, kind)
        reader.finish()
    except PeerProtocolError:
        return False
    return True


def seeds() -> list[bytes]:
    """Return bodies of all types."""
    kinds = ("s", "u", "b", "as", "o", "g")
    body = make_body("".join(kinds), ("text", 7, True, ("a", "", "\u00e9"), "/a/b", "a{sv}"))
    picked = bytes(_KINDS.index(kind) for kind in kinds)
    return [bytes((len(kinds) << 1,)) + picked + body, b"\2\5\0\0\0\0", b"\3\3\0\0\0\1", b""]
