import contextlib
from typing import Any

import pytest
from hypothesis import given, strategies as st

from broker.bus.codec import MAX_SIGNATURES, parse_kind, parse_kinds
from broker.bus.values import Variant, holds_descriptor, nesting, pack, plain, unpack

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
SIMPLE = st.one_of(
    st.builds(Variant, st.just("s"), TEXT),
    st.builds(Variant, st.just("b"), st.booleans()),
    st.builds(Variant, st.just("t"), st.integers(0, 2**64 - 1)),
    st.builds(Variant, st.just("i"), st.integers(-(2**31), 2**31 - 1)),
    st.builds(Variant, st.just("ay"), st.binary(max_size=8)),
    st.builds(Variant, st.just("as"), st.lists(TEXT, max_size=3)),
    st.builds(Variant, st.just("(sb)"), st.tuples(TEXT, st.booleans())),
)
VARIANTS = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.builds(Variant, st.just("v"), inner),
        st.builds(Variant, st.just("av"), st.lists(inner, max_size=3)),
        st.builds(Variant, st.just("a{sv}"), st.dictionaries(TEXT, inner, max_size=3)),
    ),
    max_leaves=8,
)


@given(st.dictionaries(TEXT, VARIANTS, max_size=4))
def test_what_was_packed_is_unpacked(metadata: dict[str, Variant]) -> None:
    assert unpack("a{sv}", pack("a{sv}", [metadata])) == [metadata]


@given(st.binary(max_size=64), st.sampled_from(["a{sv}", "s", "av", "(sb)", "a(usos)", "g"]))
def test_any_bytes_are_read_or_refused(data: bytes, signature: str) -> None:
    with contextlib.suppress(ValueError):
        unpack(signature, data)


def test_big_endian_is_read() -> None:
    assert unpack("u", b"\0\0\1\0", little=False) == [256]


@pytest.mark.parametrize(
    ("signature", "value"),
    [("s", 1), ("u", -1), ("(ss)", ("a",)), ("s", None), ("o", "no"), ("s", "\ud800"), ("!", 1)],
)
def test_what_does_not_fit_is_refused(signature: str, value: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any text
        pack(signature, [value])
    with pytest.raises(ValueError):  # noqa: PT011
        pack("v", [Variant(signature, value)])


def test_plain_values_have_no_variants() -> None:
    value = {"a": Variant("av", [Variant("s", "x")]), "b": (Variant("u", 1),)}
    assert plain(value) == {"a": ["x"], "b": (1,)}


@pytest.mark.parametrize(
    ("value", "holds"),
    [
        ({"a": Variant("h", 0)}, True),
        ({"a": Variant("v", Variant("ah", [0]))}, True),
        ({"a": Variant("(sh)", ("x", 0))}, True),
        ([("x", Variant("s", "h"))], False),
        (3, False),
    ],
)
def test_descriptors_are_found(value: Any, holds: bool) -> None:
    assert holds_descriptor(value) is holds


def test_remembered_signatures_are_bounded() -> None:
    for number in range(2 * MAX_SIGNATURES):
        signature = "(" + "".join("iu"[number >> bit & 1] for bit in range(12)) + ")"
        unpack("v", pack("v", [Variant(signature, (1,) * 12)]))
    assert parse_kinds.cache_info().currsize <= MAX_SIGNATURES
    assert parse_kind.cache_info().currsize <= MAX_SIGNATURES


@pytest.mark.parametrize(
    ("value", "depth"),
    [
        ("x", 0),
        ({}, 2),
        ([], 1),
        (("a", ["b"]), 2),
        ({"k": Variant("s", "x")}, 3),
        ({"a": Variant("u", 1), "b": Variant("v", Variant("as", ["x"]))}, 5),
    ],
)
def test_nesting_counts_every_container(value: object, depth: int) -> None:
    assert nesting(value) == depth
