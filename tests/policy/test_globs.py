from collections.abc import Callable
from functools import lru_cache

import pytest
from hypothesis import assume, given, reject, strategies as st

from policy.globs import (
    PatternError,
    check_bus_name,
    check_interface,
    check_member,
    check_path,
    compile_interface,
    compile_member_glob,
    compile_name,
    compile_path,
    parse_name_pattern,
    stem,
)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("org.x", ["org.x"], ["org.x.y", "org.xy", ""]),
        (":1.42", [":1.42"], [":1.4", ":1.42.1"]),
        ("org.x.*", ["org.x", "org.x.y", "org.x.y.z"], ["org.xy", "org", "a.org.x"]),
        ("org.*", ["org", "org.x"], ["organ.x", ":1.5"]),
        ("org.kde.Item-*", ["org.kde.Item-1-2", "org.kde.Item-", "org.kde.Item-a.b"], ["org.kde"]),
        ("org.x-?", ["org.x-1"], ["org.x-", "org.x-12"]),
        ("*.Helper", ["org.x.Helper", "a.Helper"], ["org.x.Helpers"]),
        ("org.*.*", ["org.a.b", "org.a.b.c"], ["org.a"]),
        ("*", ["org.x", ":1.5"], []),
        ("org.x-[1-9][0-9]*", ["org.x-10", "org.x-42.b"], ["org.x-01", "org.x-1", "org.x-a1"]),
        ("org.x.[^a]", ["org.x.b"], ["org.x.a", "org.x.bc"]),
    ],
)
def test_names(pattern: str, yes: list[str], no: list[str]) -> None:
    parsed = parse_name_pattern(pattern)
    assert [name for name in yes + no if parsed.matches(name)] == yes


@pytest.mark.parametrize(
    ("pattern", "kind", "base"),
    [
        ("org.x", "exact", "org.x"),
        ("org.x.*", "subtree", "org.x"),
        ("org.x*", "glob", "org.x*"),
        ("org.?.*", "glob", "org.?.*"),
        ("org.[ab].*", "glob", "org.[ab].*"),
        ("*", "glob", "*"),
    ],
)
def test_kinds_of_names(pattern: str, kind: str, base: str) -> None:
    parsed = parse_name_pattern(pattern)
    assert (parsed.kind, parsed.base) == (kind, base)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("/", ["/"], ["/a"]),
        ("/a/b", ["/a/b"], ["/a/bc", "/a", "/a/b/c"]),
        ("/a/*", ["/a/b"], ["/a", "/a/b/c", "/ab"]),
        ("/a/**", ["/a/b", "/a/b/c"], ["/a", "/ab"]),
        ("/a{,/**}", ["/a", "/a/b", "/a/b/c"], ["/ab"]),
        ("/**", ["/", "/a", "/a/b"], []),
        ("**", ["/", "/a/b"], []),
        ("/a/***", ["/a/b/c"], ["/a"]),
        ("/a?c", ["/abc"], ["/a/c", "/ac"]),
        ("/User[0-9]*", ["/User1", "/User12", "/User1x"], ["/User", "/Userx", "/User1/x"]),
        ("/a[^b]c", ["/axc"], ["/abc", "/a/c"]),
        ("/a[!b-d]", ["/ax"], ["/ac", "/a"]),
        ("/{a,b{c,d}}/e", ["/a/e", "/bc/e", "/bd/e"], ["/b/e", "/a"]),
        ("/*/b/*", ["/a/b/c"], ["/a/a/b/c", "/a/b"]),
        ("/**/b", ["/a/b", "/a/a/b", "/b/b"], ["/b/c", "/a/bb"]),
        ("/**a*b", ["/a/ab", "/ab", "/a/b/axb"], ["/a/b"]),
        ("/*a*b", ["/aab", "/axaxb"], ["/a/b"]),
    ],
)
def test_paths(pattern: str, yes: list[str], no: list[str]) -> None:
    predicate = compile_path(pattern)
    assert [path for path in yes + no if predicate(path)] == yes


def test_interfaces() -> None:
    assert compile_interface("org.x.*")("org.x.y.z")
    assert not compile_interface("org.x.*")("org.x")
    assert compile_interface("org.x{,.y}")("org.x")
    assert compile_interface("{org.a,org.b}.c")("org.b.c")
    assert compile_interface("org.x")("org.x")


def test_members() -> None:
    assert compile_member_glob("Get*")("GetAll")
    assert not compile_member_glob("{Get,Set}")("GetAll")
    assert compile_member_glob("Get")("Get")


@pytest.mark.parametrize(
    ("check", "text", "position", "problem"),
    [
        (check_bus_name, "", 0, "empty bus name element"),
        (check_bus_name, "org", 0, "single element"),
        (check_bus_name, "org..x", 3, "empty bus name element"),
        (check_bus_name, ".org", 0, "empty"),
        (check_bus_name, "org.", 3, "empty"),
        (check_bus_name, "org.1x", 4, "begins with a digit"),
        (check_bus_name, "org.x/y", 5, "cannot stand"),
        (check_bus_name, "org." + "x" * 252, 255, "longer than 255"),
        (check_bus_name, ":1..5", 2, "empty"),
        (check_bus_name, ":1", 1, "single element"),
        (check_path, "", 0, "begins with '/'"),
        (check_path, "a/b", 0, "begins with '/'"),
        (check_path, "/a//b", 3, "empty path element"),
        (check_path, "/a/", 2, "does not end"),
        (check_path, "/a-b", 2, "cannot stand"),
        (check_interface, "x", 0, "single element"),
        (check_interface, "org.x-y", 5, "cannot stand"),
        (check_interface, "org.2", 4, "digit"),
        (check_member, "a.b", 1, "cannot stand"),
        (check_member, "", 0, "empty member"),
        (check_member, "9", 0, "digit"),
        (parse_name_pattern, "org.*.[a", 6, "without a list"),
        (parse_name_pattern, "org.*.[z-a]", 6, "bad range"),
        (parse_name_pattern, "org.{a,b}", 4, "cannot stand"),
        (parse_name_pattern, ":1.*", 0, "cannot stand"),
        (parse_name_pattern, ".*", 0, "empty"),
        (parse_name_pattern, "org..*x", 3, "empty"),
        (parse_name_pattern, "1org.*", 0, "digit"),
        (parse_name_pattern, "*" * 256, 255, "longer"),
        (compile_path, "*/a", 0, "begins with '/'"),
        (compile_path, "/a/*/", 4, "does not end"),
        (compile_path, "/a.*", 2, "cannot stand"),
        (compile_path, "/a[", 2, "'[' without"),
        (compile_path, "/a[]", 2, "'[' without"),
        (compile_path, "/a[z-a]", 2, "bad range"),
        (compile_path, "/a*]", 3, "cannot stand"),
        (compile_path, "/a{b", 2, "'{' without '}'"),
        (compile_path, "/a*}", 3, "'}' without '{'"),
        (compile_path, "/a*,b", 3, "',' outside braces"),
        (compile_path, "/" + "{a,b}" * 7, 1, "more than 64"),
        (compile_path, "/*" + "a" * 1024, 1024, "longer than 1024"),
        (compile_interface, "org..*", 3, "empty"),
        (compile_interface, "{org,net}", 0, "single element"),
        (compile_member_glob, "Get.*", 3, "cannot stand"),
    ],
)
def test_errors_point_at_the_character(
    check: Callable[[str], object], text: str, position: int, problem: str
) -> None:
    with pytest.raises(PatternError) as caught:
        check(text)
    assert problem in caught.value.problem
    assert caught.value.position == position


def test_alternatives_up_to_the_limit_are_taken() -> None:
    assert compile_path("/" + "{a,b}" * 6)("/abbaab")


def test_the_stem_is_the_fixed_beginning() -> None:
    assert [stem(text) for text in ("/a/b", "/a/*", "/a{b,c}", "*", "/[a]")] == [
        "/a/b", "/a/", "/a", "", "/",
    ]  # fmt: skip


# What cubic time would turn into minutes.
@pytest.mark.parametrize(
    "pattern", ["/**a**a**a**a**b", "/*a*a*a*a*b", "/**a*a*b**a*c", "/**a*a*a*a*b", "/*" * 9]
)
@pytest.mark.parametrize("text", ["/" + "a" * 2047, "/a" * 1024])
def test_hostile_paths_take_no_time_to_speak_of(pattern: str, text: str) -> None:
    assert not compile_path(pattern)(text)


PIECES = st.sampled_from(["/a", "/b", "a", "b", "*", "**", "?", "[ab]", "[!a]", "{a,/b}", "{,/**}"])


@given(st.lists(PIECES, max_size=7), st.text("ab/", max_size=10))
def test_path_globs_match_what_a_plain_search_matches(pieces: list[str], rest: str) -> None:
    pattern = "/" + "".join(pieces)
    try:
        predicate = compile_path(pattern)
    except PatternError:
        reject()
    assert bool(predicate("/" + rest)) == searched(pattern, "/" + rest)


@given(st.text("ab.*?", max_size=8), st.text("ab.", max_size=10))
def test_name_globs_match_what_a_plain_search_matches(pattern: str, name: str) -> None:
    try:
        parsed = parse_name_pattern(pattern)
    except PatternError:
        reject()
    assume(parsed.kind == "glob")
    assert bool(compile_name(pattern)(name)) == searched(pattern.replace("*", "**"), name)


def searched(pattern: str, text: str) -> bool:
    """Match by trying everything."""
    opening = pattern.find("{")
    if opening >= 0:  # those above do not nest
        before, _, rest = pattern.partition("{")
        inner, _, after = rest.partition("}")
        return any(searched(before + each + after, text) for each in inner.split(","))

    @lru_cache(None)
    def at(i: int, j: int) -> bool:
        if i == len(pattern):
            return j == len(text)
        char = text[j : j + 1]
        if pattern[i] == "*":
            deep = pattern[i : i + 2] == "**"
            skip = char != "" and (deep or char != "/") and at(i, j + 1)
            return skip or at(i + (2 if deep else 1), j)
        if pattern[i] == "[":
            end = pattern.index("]", i)
            negated = pattern[i + 1] == "!"
            fits = char not in {"", "/"} and (char in pattern[i + 1 : end]) != negated
            return fits and at(end + 1, j + 1)
        fits = char not in {"", "/"} if pattern[i] == "?" else char == pattern[i]
        return fits and at(i + 1, j + 1)

    return at(0, 0)
