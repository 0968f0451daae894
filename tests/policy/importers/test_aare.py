import re

import pytest
from hypothesis import given, strategies as st

from policy.globs import (
    compile_interface,
    compile_member_glob,
    compile_name,
    compile_path,
    parse_name_pattern,
)
from policy.importers.aare import (
    MAX_TEXT,
    AareError,
    Budget,
    BudgetError,
    UnsayableError,
    check_aare,
)
from policy.importers.aare_patterns import INTERFACE, MEMBER, NAME, PATH, Kind, join, say


def budget() -> Budget:
    return Budget(2**24)


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (PATH, "/a/b", ["/a/b"]),
        (PATH, "/a{,/**}", ["/a", "/a/**"]),
        (PATH, "/a/*", ["/a/*"]),
        (PATH, "/*", ["/?*"]),
        (PATH, "/**", ["/?**"]),
        (PATH, "/{,**}", ["/", "/**"]),
        (PATH, "**", None),
        (PATH, "*", []),
        (PATH, "/a/", []),
        (PATH, "*/", ["/"]),
        (PATH, "**/*", ["**/?*"]),
        (PATH, "**/", ["/"]),
        (PATH, "*/a", ["/a"]),
        (PATH, "?/a", []),
        (PATH, "/a-b", []),
        (PATH, "", []),
        (PATH, "/a***", ["/a**"]),
        (PATH, "/a*{*,x}", ["/a*", "/a*x"]),
        (PATH, "/a[0-9]", ["/a[0-9]"]),
        (PATH, "/a[x]", ["/ax"]),
        (PATH, "/a[^a-zA-Z]", ["/a[0-9_]"]),
        (PATH, "/a[/b]c", ["/abc", "/a/c"]),
        (PATH, r"/\141", ["/a"]),
        (PATH, r"/\x61\d098\c", ["/abc"]),
        (PATH, r"/a\*", []),
        (PATH, r"/a\n", []),
        (PATH, "/{a,{b,c}}", ["/a", "/b", "/c"]),
        (INTERFACE, "org.a.*", ["org.a.*"]),
        (INTERFACE, "org.a[.x]b.c", ["org.axb.c", "org.a.b.c"]),
        (INTERFACE, "*", None),
        (INTERFACE, "single", []),
        (MEMBER, "{Get,Set}*", ["Get*", "Set*"]),
        (MEMBER, "**", None),
        (MEMBER, "Get.All", []),
        (INTERFACE, "/*", []),
        (NAME, "org.a", ["org.a"]),
        (NAME, "org.a.*", ["org.a.?*"]),
        (NAME, "org.a{,.*}", ["org.a.*"]),
        (NAME, "org.a{.*,}", ["org.a.*"]),
        (NAME, "org.a.**", ["org.a.?*"]),
        (NAME, "org.a-[12]", ["org.a-[12]"]),
        (NAME, "org.a[1-]b", ["org.a[-1]b"]),
        (NAME, "org.a[b.]c", ["org.abc", "org.a.c"]),
        (NAME, "org.a{,[0-9]}{,[0-9]}", ["org.a", "org.a[0-9]", "org.a[0-9][0-9]"]),
        (NAME, ":1.5", [":1.5"]),
        (NAME, "*", None),
        (NAME, "unconfined", []),
        (NAME, "org.a{*,?}", ["org.a*", "org.a?"]),
    ],
)
def test_pattern_is_said(kind: Kind, text: str, said: list[str] | None) -> None:
    assert say(text, kind, budget()) == (said, [])


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (INTERFACE, "{,org.a}", ["org.a"]),
        (NAME, "{,org.a}", ["org.a"]),
        (NAME, ":1.*", []),
        (NAME, "org.a{1," + "[0-9]" * 51 + "}", ["org.a1"]),
        (NAME, "org.a{1," + "[a.]" * 11 + "}", ["org.a1"]),
        (PATH, "/" + "a" * 1200 + "*", []),
    ],
)
def test_what_is_left_out_has_a_reason(kind: Kind, text: str, said: list[str]) -> None:
    found, left_out = say(text, kind, budget())
    assert found == said
    assert left_out


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{a", "'{' without"),
        ("a}", "'}' without"),
        ("{a}", "without ','"),
        ("[a", "'\\[' without"),
        ("a]", "'\\]' without"),
        ("[]", "no characters"),
        ("[z-a]", "bad range"),
        ("a\\", "at the end"),
        ("{a," * 51 + "}" * 51, "more than 50"),
    ],
)
def test_pattern_is_refused(text: str, problem: str) -> None:
    with pytest.raises(AareError, match=problem):
        check_aare(text)


def test_a_pattern_may_not_be_too_long_nor_have_too_many_alternatives() -> None:
    with pytest.raises(UnsayableError, match="longer"):
        say("/" + "a" * MAX_TEXT, PATH, budget())
    with pytest.raises(UnsayableError, match="too many alternatives"):
        say("/" + "{a,b}" * 100, PATH, budget())
    with pytest.raises(BudgetError):
        say("/{a,b}{a,b}", PATH, Budget(20))


@pytest.mark.parametrize(
    ("patterns", "joined"),
    [
        ([], []),
        (["/a"], ["/a"]),
        (["/a", "/b"], ["{/a,/b}"]),
        (["/a/**", "/a"], ["/a{,/**}"]),
        (["/a", "/a/**", "/b"], ["{/a{,/**},/b}"]),
        (["/b/**"], ["/b/**"]),
        (
            ["/" + "a" * 1018, "/" + "a" * 1018 + "/**"],
            ["/" + "a" * 1018, "/" + "a" * 1018 + "/**"],
        ),
    ],
)
def test_patterns_are_joined(patterns: list[str], joined: list[str]) -> None:
    assert join(patterns) == joined
    for pattern in joined:
        compile_path(pattern)


def test_joined_patterns_keep_to_the_limits() -> None:
    patterns = [f"/a{number}" for number in range(200)]
    joined = join(patterns)
    assert len(joined) == 4
    for path in patterns:
        assert any(compile_path(pattern)(path) for pattern in joined)


PIECES = st.sampled_from(
    ["a", "b", "1", ".", "/", "*", "**", "?", "[ab]", "[^a]", "{a,b}", "{,/**}", "{/*,b}", "org.a"]
)
PATTERNS = st.lists(PIECES, max_size=6).map("".join)


def plain_regex(pattern: str) -> re.Pattern[str]:
    """Translate piece by piece, as AppArmor's manual says it."""
    regex = ""
    for found in re.finditer(r"\*\*+|\*|\?|\[[^\]]*\]|[{},]|.", pattern):
        piece = found[0]
        element = pattern[: found.start()].endswith("/") and pattern[found.end() :][:1] in {"", "/"}
        if piece.startswith("**"):
            regex += "[^/].*" if element else ".*"
        elif piece == "*":
            regex += "[^/]+" if element else "[^/]*"
        elif piece == "?":
            regex += "[^/]"
        elif piece.startswith("["):
            regex += piece
        else:
            regex += {"{": "(?:", "}": ")", ",": "|"}.get(piece) or re.escape(piece)
    return re.compile(regex, re.DOTALL)


def agrees(pattern: str, kind: Kind, text: str) -> None:
    said, left_out = say(pattern, kind, budget())
    compile_one = {PATH: compile_path, INTERFACE: compile_interface, MEMBER: compile_member_glob}
    ours = said is None or any(compile_one.get(kind, compile_name)(each)(text) for each in said)
    theirs = plain_regex(pattern).fullmatch(text) is not None
    if left_out:
        assert theirs or not ours  # never more
    else:
        assert ours is theirs, (said, text)


@given(PATTERNS, st.lists(st.sampled_from(["a", "b", "1", "ab", "ba"]), max_size=3))
def test_path_pattern_means_the_same(pattern: str, elements: list[str]) -> None:
    agrees(pattern, PATH, "/" + "/".join(elements))


@given(PATTERNS, st.lists(st.sampled_from(["a", "b", "a1", "org"]), min_size=2, max_size=3))
def test_name_and_interface_pattern_mean_the_same(pattern: str, elements: list[str]) -> None:
    agrees(pattern, NAME, ".".join(elements))
    agrees(pattern, INTERFACE, ".".join(elements))


@given(PATTERNS, st.sampled_from(["a", "b", "a1", "org", "aa"]))
def test_member_pattern_means_the_same(pattern: str, member: str) -> None:
    agrees(pattern, MEMBER, member)


@given(st.text(st.sampled_from("ab/.-*?[]{},^\\0x:\n\x00é")))
def test_any_text_is_said_or_refused(text: str) -> None:
    for kind in (PATH, INTERFACE, MEMBER, NAME):
        try:
            said, _ = say(text, kind, budget())
        except (AareError, UnsayableError):
            continue
        for pattern in said or ():
            kind.compile(pattern)
        if kind is NAME:
            assert all(parse_name_pattern(pattern) for pattern in said or ())
