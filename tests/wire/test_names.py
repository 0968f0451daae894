"""Names are taken by the specification's grammar, to its limits and no further."""

import string

import pytest
from hypothesis import given, strategies as st

from broker.wire.names import (
    MAX_NAME,
    is_bus_name,
    is_error_name,
    is_interface,
    is_member,
    is_name_space,
    is_object_path,
    is_unique_name,
    is_well_known_name,
)

ALL_PREDICATES = (
    is_bus_name,
    is_error_name,
    is_interface,
    is_member,
    is_name_space,
    is_unique_name,
    is_well_known_name,
)
WORD = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=8)
ELEMENT = WORD.filter(lambda word: not word[0].isdigit())


@pytest.mark.parametrize("text", [":1.0", ":1.42", ":a.b.c", ":a-b._", ":0.0"])
def test_unique_names_are_taken(text: str) -> None:
    assert is_unique_name(text)
    assert is_bus_name(text)
    assert not is_well_known_name(text)


@pytest.mark.parametrize(
    "text", ["", ":", ":1", ":1.", ":.1", ":a..b", "1.0", ":1.0\n", ":1.é", "::1.2"]
)
def test_bad_unique_names_are_refused(text: str) -> None:
    assert not is_unique_name(text)
    assert not is_bus_name(text)


@pytest.mark.parametrize("text", ["a.b", "org.freedesktop.DBus", "_._", "a-b.c-", "-a.b", "com.a1"])
def test_well_known_names_are_taken(text: str) -> None:
    assert is_well_known_name(text)
    assert is_bus_name(text)
    assert not is_unique_name(text)


@pytest.mark.parametrize(
    "text", ["", "nodots", ".a.b", "a.b.", "a..b", "1a.b", "a.1b", "a b.c", "a.b\n", "a.b\0", "ä.b"]
)
def test_bad_well_known_names_are_refused(text: str) -> None:
    assert not is_well_known_name(text)
    assert not is_bus_name(text)


@pytest.mark.parametrize("text", ["a", "com", "org.example", "a-b"])
def test_name_spaces_may_have_one_element(text: str) -> None:
    assert is_name_space(text)


@pytest.mark.parametrize("text", ["", ".", "a.", "1", ":1.2", "a..b"])
def test_bad_name_spaces_are_refused(text: str) -> None:
    assert not is_name_space(text)


@pytest.mark.parametrize("text", ["/", "/a", "/a/b", "/1", "/_", "/a" * 4000])
def test_object_paths_are_taken(text: str) -> None:
    assert is_object_path(text)


@pytest.mark.parametrize(
    "text", ["", "a", "//", "//a", "/a/", "/a//b", "/a-b", "/a.b", "/a\n", "/é"]
)
def test_bad_object_paths_are_refused(text: str) -> None:
    assert not is_object_path(text)


@pytest.mark.parametrize("text", ["a.b", "org.freedesktop.DBus", "_a._1"])
def test_interfaces_and_error_names_are_taken(text: str) -> None:
    assert is_interface(text)
    assert is_error_name(text)


@pytest.mark.parametrize("text", ["", "a", "a-b.c", "a.", ".a", "a.1", "1.a", "a..b", "a.b "])
def test_bad_interfaces_and_error_names_are_refused(text: str) -> None:
    assert not is_interface(text)
    assert not is_error_name(text)


@pytest.mark.parametrize("text", ["a", "Get", "_1", "aB9"])
def test_members_are_taken(text: str) -> None:
    assert is_member(text)


@pytest.mark.parametrize("text", ["", "1a", "a.b", "a-b", "a\n", "é"])
def test_bad_members_are_refused(text: str) -> None:
    assert not is_member(text)


def test_names_have_at_most_255_characters() -> None:
    fits = {
        is_unique_name: ":1." + "a" * (MAX_NAME - 3),
        is_well_known_name: "a." + "a" * (MAX_NAME - 2),
        is_name_space: "a" * MAX_NAME,
        is_interface: "a." + "a" * (MAX_NAME - 2),
        is_member: "a" * MAX_NAME,
    }
    for predicate, text in fits.items():
        assert predicate(text)
        assert not predicate(text + "a")


@given(st.lists(ELEMENT, min_size=2, max_size=5))
def test_dotted_elements_are_every_kind_of_name(elements: list[str]) -> None:
    text = ".".join(elements)
    assert is_well_known_name(text)
    assert is_interface(text)
    assert is_unique_name(":" + text)
    assert is_object_path("/" + "/".join(elements))


@given(st.text(max_size=20))
def test_no_predicate_raises_or_takes_what_is_not_ascii(text: str) -> None:
    taken = [predicate for predicate in (*ALL_PREDICATES, is_object_path) if predicate(text)]
    assert not taken or text.isascii()
