"""The matcher agrees with a search that tries everything, in no more steps than it says."""

import pytest
from hypothesis import given, reject, strategies as st

from policy.globs import PatternError, compile_interface, compile_path
from policy.matcher import Pattern, Subject, Tree, reading_cost
from policy.tables import MAX_PATH

PIECES = st.sampled_from(
    ["/a", "/b", "a", "b", "*", "**", "?", "[ab]", "[!a]", "{", ",", "}", "{a*,*b}", "{,/**}"]
)


def expanded(pattern: str) -> list[str]:
    """Write the first of the innermost braces out, until there are none."""
    end = pattern.find("}")
    if end < 0:
        return [pattern]
    start = pattern.rindex("{", 0, end)
    before, after = pattern[:start], pattern[end + 1 :]
    choices = pattern[start + 1 : end].split(",")
    return [text for each in choices for text in expanded(before + each + after)]


def searched(pattern: str, text: str) -> bool:
    """Match one alternative by trying everything."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        rest = pattern.lstrip("*")
        deep = len(pattern) - len(rest) > 1
        ends = [at for at in range(len(text) + 1) if deep or "/" not in text[:at]]
        return any(searched(rest, text[at:]) for at in ends)
    if not text:
        return False
    if pattern[0] == "[":
        inner, _, rest = pattern[1:].partition("]")
        wanted = inner.lstrip("!")
        fits = (text[0] not in wanted + "/") if inner[0] == "!" else text[0] in wanted
        return fits and searched(rest, text[1:])
    fits = text[0] != "/" if pattern[0] == "?" else text[0] == pattern[0]
    return fits and searched(pattern[1:], text[1:])


@given(st.lists(PIECES, max_size=8), st.lists(st.text("ab/", max_size=9), min_size=1, max_size=4))
def test_patterns_match_what_a_search_matches_within_their_cost(
    pieces: list[str], texts: list[str]
) -> None:
    try:
        pattern = compile_path("/" + "".join(pieces))
    except PatternError:
        reject()
    for text in texts:
        subject = Subject("/" + text)
        alternatives = expanded("/" + "".join(pieces))
        assert pattern.fits(subject) == any(searched(each, "/" + text) for each in alternatives)
        assert subject.steps <= pattern.cost(len(subject.text))
        assert subject.text.startswith(pattern.stem) or not pattern.fits(subject)


@pytest.mark.parametrize(
    "pattern",
    [
        "/**{?,??,???,????,?????,??????}*bN",
        "/{" + ",".join(["**a*a0x"] * 60) + "}",
        "/{" + ",".join(["**a*a0x"] * 60) + "}*",
        "/**a**a**a**a**b",
        "/" + "*a" * 500 + "b*",
        "/" + "".join("{a*,*b}" for _ in range(6)) + "*c" * 400,
        "/" + "{a*,b" * 62 + "}" * 62 + "*c" * 300,
        "/" + "[ab]*" * 200,
    ],
    ids=range(8),
)
@pytest.mark.parametrize("text", ["a" * 2047, "/a" * 1024, "ab" * 1020 + "bN"])
def test_attack_c4_no_path_takes_more_steps_than_the_pattern_has_pieces(
    pattern: str, text: str
) -> None:
    compiled = compile_path(pattern[:1024])
    subject = Subject(f"/{text}"[:MAX_PATH])
    compiled.fits(subject)
    assert subject.steps <= compiled.cost(MAX_PATH) < 2 * 1024 + 40 * reading_cost(MAX_PATH)


def test_steps_do_not_depend_on_the_length_of_the_text() -> None:
    pattern = compile_path("/**a*b?c**d*")

    def steps(length: int) -> int:
        subject = Subject("/" + "abxcd" * length)
        pattern.fits(subject)
        return subject.steps - subject.steps // reading_cost(len(subject.text))

    costs = [pattern.pieces + pattern.sets + len(pattern.letters) for _ in (1, 2)]
    assert costs[0] == costs[1]
    assert steps(1) <= pattern.cost(6)
    assert steps(400) <= pattern.cost(2001)


def test_what_was_found_out_about_a_text_is_kept() -> None:
    pattern: Pattern = compile_path("/a*b*c?")
    assert isinstance(pattern, Tree)
    subject = Subject("/aXbYcZ")
    assert pattern.fits(subject)
    before = subject.steps
    assert pattern.fits(subject)
    assert subject.steps == before + 1


def test_what_is_no_ascii_fits_wildcards_alone() -> None:
    pattern = compile_interface("a.?*x?")
    assert pattern("a.\u00e9x\u00e9")
    assert not compile_interface("a.?*[a-z]?")("a.\u00e9\u00e9\u00e9")


@pytest.mark.parametrize("text", ["", "/", "a"])
def test_texts_that_are_shorter_than_the_ends(text: str) -> None:
    assert not compile_path("/a*b*/c")(text)
    assert not compile_path("/a**/c")(text)
