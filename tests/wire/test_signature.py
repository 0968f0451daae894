"""Signatures are taken by grammar and limits, and their complete types found."""

import pytest
from hypothesis import given, strategies as st

from broker.wire.signature import (
    BASIC,
    MAX_NESTING,
    find_type_end,
    is_signature,
    is_single_type,
)

BASIC_TYPES = st.sampled_from(sorted(BASIC))
TYPES = st.recursive(
    BASIC_TYPES | st.just("v"),
    lambda inner: st.one_of(
        inner.map(lambda text: "a" + text),
        st.lists(inner, min_size=1, max_size=3).map(lambda texts: f"({''.join(texts)})"),
        st.tuples(BASIC_TYPES, inner).map(lambda pair: f"a{{{pair[0]}{pair[1]}}}"),
    ),
    max_leaves=6,
)


@pytest.mark.parametrize(
    "text", ["", "s", "as", "a{sv}", "(s)", "a(usos)", "aaa{sa{sv}}", "sv(ai)h", "((y)(n))"]
)
def test_signatures_are_taken(text: str) -> None:
    assert is_signature(text)


@pytest.mark.parametrize(
    "text",
    [
        "a", "(", ")", "()", "}", "{", "{sv}", "({sv})", "a{}", "a{s}", "a{svv}", "a{vs}", "a{(s)s}",
        "a{ass}", "a{s", "a{sv", "(s", "s)", "(s}", "a{sv)", "z", "m", "e", "r", "(a)", "a{sa}", "a{a}",
        "a{{s}s}", "a)", "é", "s\0", "as}", "a}",
    ],
)  # fmt: skip
def test_bad_signatures_are_refused(text: str) -> None:
    assert not is_signature(text)
    assert not is_single_type(text)


def test_a_signature_has_at_most_255_characters() -> None:
    assert is_signature("y" * 255)
    assert not is_signature("y" * 256)
    assert not is_single_type("(" + "y" * 254 + ")")


def test_arrays_and_structs_nest_32_deep_each() -> None:
    deepest = "a" * MAX_NESTING + "(" * MAX_NESTING + "y" + ")" * MAX_NESTING
    assert is_signature(deepest)
    assert not is_signature("a" + deepest)
    assert not is_signature(f"({deepest})")
    assert not is_signature("a{s" * 33 + "v" + "}" * 33)


@pytest.mark.parametrize("text", ["", "ss", "a{sv}s", "sa"])
def test_a_single_type_is_no_less_and_no_more(text: str) -> None:
    assert not is_single_type(text)


@given(st.lists(TYPES, max_size=4))
def test_complete_types_are_found_one_after_the_other(types: list[str]) -> None:
    text = "".join(types)
    at = 0
    for expected in types:
        end = find_type_end(text, at)
        assert text[at:end] == expected
        assert is_single_type(expected)
        at = end
    assert is_signature(text)


@given(TYPES, st.data())
def test_a_type_cut_short_is_none(text: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text) - 1))
    assert find_type_end(text[:cut], 0) == -1


@given(st.text("a(){}svyb", max_size=40))
def test_any_text_is_judged_as_a_recursive_parser_would(text: str) -> None:
    assert is_signature(text) == _accepts(text)


def _accepts(text: str) -> bool:
    """Parse by recursive descent: slower and plainer. Depth is bounded by the text's 40 characters."""
    rest = text
    try:
        while rest:
            rest = _rest(rest)
    except (IndexError, ValueError):
        return False
    # 40 characters cannot nest 33 structs, but 33 arrays.
    return "a" * 33 not in text


def _rest(text: str) -> str:
    if text[0] in "svyb":
        return text[1:]
    if text[:2] == "a{":
        if text[2] not in "syb":
            raise ValueError(text)
        rest = _rest(text[3:])
        if rest[0] != "}":
            raise ValueError(text)
        return rest[1:]
    if text[0] == "a":
        return _rest(text[1:])
    if text[0] == "(":
        rest = _rest(text[1:])
        while rest[0] != ")":
            rest = _rest(rest)
        return rest[1:]
    raise ValueError(text)
