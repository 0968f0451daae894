"""Values are read strictly and within bounds, whatever a peer wrote."""

import contextlib
import struct

import pytest
from hypothesis import given, strategies as st

from broker.wire.errors import PeerProtocolError
from broker.wire.reader import MAX_ARRAY, MAX_STEPS, Reader, skip_value


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def text(value: str) -> bytes:
    return u32(len(value.encode())) + value.encode() + b"\0"


def skip(signature: str, data: bytes, *, depth: int = 0) -> None:
    reader = Reader(data, little=True)
    skip_value(reader, signature, depth=depth)
    reader.finish()


def variants(count: int) -> bytes:
    """Return a variant of a variant of ... of a byte; `count` of them."""
    return b"\x01v\0" * (count - 1) + b"\x01y\0" + b"\x07"


@pytest.mark.parametrize(
    ("signature", "data"),
    [
        ("y", b"\xff"),
        ("b", u32(1)),
        ("n", b"\1\2"),
        ("h", u32(5)),
        ("d", bytes(8)),
        ("s", text("grüß")),
        ("o", text("/a/b")),
        ("g", b"\2as\0"),
        ("v", b"\1s\0\0" + text("x")),
        ("v", b"\2as\0" + u32(0)),
        ("ay", u32(3) + b"abc"),
        ("ax", u32(8) + bytes(4) + bytes(8)),
        ("ax", u32(0) + bytes(4)),
        ("ab", u32(8) + u32(0) + u32(1)),
        ("as", u32(6) + text("a")),
        ("as", u32(14) + text("a") + bytes(2) + text("b")),
        ("a(ys)", u32(0) + bytes(4)),
        ("a(yy)", u32(10) + bytes(4) + b"\1\2" + bytes(6) + b"\3\4"),
        ("a{yv}", u32(5) + bytes(4) + b"\1\1y\0\2"),
        ("aay", u32(13) + u32(1) + b"a" + bytes(3) + u32(1) + b"b"),
        ("(y(s))", b"\1" + bytes(7) + text("a")),
        ("v", variants(62)),
    ],
)
def test_good_values_are_skipped_whole(signature: str, data: bytes) -> None:
    skip(signature, data)
    for length in range(len(data)):
        with pytest.raises(PeerProtocolError):
            skip(signature, data[:length])


@pytest.mark.parametrize(
    ("signature", "data", "problem"),
    [
        ("b", u32(2), "boolean of 2"),
        ("s", u32(1) + b"ab", "wrong NUL"),
        ("s", u32(3) + b"a\0b\0", "wrong NUL"),
        ("s", u32(2) + b"\xc3\x28\0", "not UTF-8"),
        ("s", u32(3) + b"\xed\xa0\x80\0", "not UTF-8"),
        ("s", text("\ufdd0"), "non-character"),
        ("s", text("\U0010ffff"), "non-character"),
        ("s", u32(0xFFFFFFFF) + b"a\0", "past the end"),
        ("o", text("//"), "not an object path"),
        ("g", b"\1a\0", "not a signature"),
        ("v", b"\0\0", "a variant of ''"),
        ("v", b"\2yy\0\1\2", "a variant of 'yy'"),
        ("ai", u32(3) + bytes(3), "no multiple of its 4"),
        ("ay", u32(MAX_ARRAY + 1), "array of"),
        ("ay", u32(2) + b"a", "array runs past the end"),
        ("as", u32(5) + text("a"), "element runs past"),
        ("as", u32(3) + text("a"), "element runs past"),
        ("(yi)", b"\1\0\0\1" + u32(0), "padding at byte 1"),
        ("ax", u32(0) + b"\0\0\0\1", "padding at byte 4"),
        ("v", variants(70), "too deep"),
    ],
)
def test_bad_values_are_refused(signature: str, data: bytes, problem: str) -> None:
    with pytest.raises(PeerProtocolError, match=problem):
        skip(signature, data)


def test_nesting_is_bounded_by_what_is_around_the_value_too() -> None:
    skip("v", variants(61), depth=2)
    with pytest.raises(PeerProtocolError, match="too deep"):
        skip("v", variants(62), depth=2)


def test_work_is_bounded() -> None:
    count = MAX_STEPS
    with pytest.raises(PeerProtocolError, match="too many values"):
        skip("ag", u32(2 * count) + b"\0\0" * count)
    long = b"\xff" + b"y" * 255 + b"\0"
    with pytest.raises(PeerProtocolError, match="too many values"):
        skip("ag", u32(257 * 65) + long * 65)
    # Types count by what it takes to look at them.
    deep = "a(" + "y" * 200 + ")"
    with pytest.raises(PeerProtocolError, match="too many values"):
        skip(deep, u32(208 * 100 - 8) + bytes(4) + bytes(208 * 100 - 8))
    # But plain numbers cost nothing, however many they are.
    skip("ay", u32(2**20) + bytes(2**20))


def test_bytes_left_over_are_refused() -> None:
    with pytest.raises(PeerProtocolError, match="1 bytes too many"):
        skip("y", b"ab")


@pytest.mark.parametrize(("little", "value"), [(True, 1), (False, 0x01000000)])
def test_numbers_are_read_in_the_byte_order_of_the_message(little: bool, value: int) -> None:
    assert Reader(u32(1), little=little).uint32() == value


def test_an_array_of_variants_ends_where_it_says() -> None:
    skip("av", u32(8) + b"\1y\0\1" + b"\1y\0\2")


def test_a_reader_stops_at_its_end_not_at_that_of_the_bytes() -> None:
    data = b"\1y\0\7"
    with pytest.raises(PeerProtocolError, match="past the end"):
        Reader(data, little=True, end=2).variant_type()
    reader = Reader(data, little=True, end=3)
    assert reader.variant_type() == "y"
    with pytest.raises(PeerProtocolError, match="past the end"):
        reader.byte()


@given(
    st.binary(max_size=60), st.sampled_from(["v", "a{sv}", "a(yv)", "aas", "(sgb)", "aab", "a(ay)"])
)
def test_any_bytes_are_skipped_or_refused(data: bytes, signature: str) -> None:
    reader = Reader(data, little=True)
    with contextlib.suppress(PeerProtocolError):
        skip_value(reader, signature)
    assert reader.at <= len(data)
