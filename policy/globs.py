"""Patterns for bus names, object paths, interfaces and members: their grammar and their predicates.

A pattern is checked when it is compiled: PatternError says what is wrong and where. The text it
is later matched against is not checked: whoever has it has parsed it.

A glob of three wildcards, tried naively against a long path, takes cubic time, and the app chooses the path.
So braces are expanded first, and each alternative becomes a regular expression whose wildcards
commit (atomic groups): a piece of fixed text between two wildcards is taken where it is found
first. That is right because whatever a later place could reach, the next wildcard can reach from the
first place, too. Only a `*` after a `**` cannot (it stops at `/`): hence `**` commits with
all of the text up to the next `**`. What is left is quadratic, and `match.MAX_PATH` bounds it.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Final, Literal

import msgspec

MAX_NAME: Final = 255  # bytes; names, interfaces and members, by the D-Bus specification
MAX_PATTERN: Final = 1024  # characters
MAX_ALTERNATIVES: Final = 64  # of one pattern, after all its braces are expanded
# Many sandboxes have the same rules; compiling a regular expression takes 0.1 ms.
_COMPILED: Final = 4096

Predicate = Callable[[str], object]  # true or false by its truth

_ALNUM: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")
_WILDCARDS: Final = re.compile(r"[*?\[{]")
_CLASS: Final = re.compile(r"\[[!^]?[A-Za-z0-9_-]+\]")
_PIECE: Final = re.compile(r"\*\*+|\*|\?|\[[^\]]*\]|[^*?\[]+")


class PatternError(ValueError):
    """A pattern or name against its grammar. `position` counts from 0 in the pattern."""

    def __init__(self, problem: str, position: int) -> None:
        super().__init__(problem)
        self.problem: Final = problem
        self.position: Final = position


class NamePattern(msgspec.Struct, frozen=True, kw_only=True):
    """A bus name; all of `org.example` and below it (`org.example.*`); or a glob."""

    kind: Literal["exact", "subtree", "glob"]
    text: str

    @property
    def base(self) -> str:
        """Return the name at the top of a subtree; otherwise the text."""
        return self.text[:-2] if self.kind == "subtree" else self.text

    def matches(self, name: str) -> bool:
        """Say whether the pattern covers this name."""
        return bool(compile_name(self.text)(name))


@lru_cache(_COMPILED)
def parse_name_pattern(text: str) -> NamePattern:
    """Return the pattern. Raises PatternError."""
    if is_literal(text):
        check_bus_name(text)
        return NamePattern(kind="exact", text=text)
    if text.endswith(".*") and not _WILDCARDS.search(text, 0, len(text) - 1):
        _check_dotted(text[:-2], "bus name", _ALNUM | {"-"}, least=1)
        return NamePattern(kind="subtree", text=text)
    _check_classes(text)
    plain = _CLASS.sub(lambda found: "?" * len(found[0]), text)
    _check_dotted(plain, "bus name", _ALNUM | set("-*?"), least=1)
    return NamePattern(kind="glob", text=text)


@lru_cache(_COMPILED)
def compile_name(pattern: str) -> Predicate:
    """Return the predicate of a bus name pattern. Raises PatternError."""
    parsed = parse_name_pattern(pattern)
    match parsed.kind:
        case "exact":
            return pattern.__eq__
        case "subtree":
            base, below = parsed.base, pattern[:-1]
            return lambda name: name == base or name.startswith(below)
        case "glob":
            return re.compile(_regex(re.sub(r"\*+", "**", pattern)) + r"\Z").match


@lru_cache(_COMPILED)
def compile_path(pattern: str) -> Predicate:
    """Return the predicate of an object path or a glob of them. Raises PatternError."""
    if is_literal(pattern):
        check_path(pattern)
        return pattern.__eq__
    alternatives = _expand(pattern, "path", _ALNUM | {"/"})
    for alternative in alternatives:
        _check_path_elements(alternative)
    return _union(alternatives)


@lru_cache(_COMPILED)
def compile_interface(pattern: str) -> Predicate:
    """Return the predicate of an interface or a glob of them. Raises PatternError."""
    return _compile_dotted(pattern, "interface", check_interface)


@lru_cache(_COMPILED)
def compile_member_glob(pattern: str) -> Predicate:
    """Return the predicate of a member or a glob of them. Raises PatternError."""
    return _compile_dotted(pattern, "member", check_member)


def expand_braces(pattern: str) -> list[str]:
    """Return the patterns without braces that a pattern (which was checked) is the union of."""
    work, done = [pattern], []
    while work:
        text = work.pop()
        opening = text.find("{")
        if opening < 0:
            done.append(text)
            continue
        alternatives, end = _alternatives(text, opening)
        work.extend(text[:opening] + alternative + text[end:] for alternative in alternatives)
        if len(work) + len(done) > MAX_ALTERNATIVES:
            raise PatternError(f"more than {MAX_ALTERNATIVES} alternatives", pattern.index("{"))
    return done


def stem(pattern: str) -> str:
    """Return the fixed text that everything that matches begins with."""
    return _WILDCARDS.split(pattern, maxsplit=1)[0]


def is_literal(pattern: str) -> bool:
    """Say whether it has no wildcard, so that it is equal to what it matches."""
    return not _WILDCARDS.search(pattern)


def check_bus_name(text: str) -> None:
    """Accept a well-known or unique bus name. Raises PatternError."""
    if text.startswith(":"):
        _check_dotted(text, "bus name", _ALNUM | {"-"}, start=1, digits=True)
    else:
        _check_dotted(text, "bus name", _ALNUM | {"-"})


def check_path(text: str) -> None:
    """Accept an object path. Raises PatternError."""
    _check_letters(text, "path", _ALNUM | {"/"})
    _check_path_elements(text)


def check_interface(text: str) -> None:
    """Accept an interface name. Raises PatternError."""
    _check_dotted(text, "interface", _ALNUM)


def check_member(text: str) -> None:
    """Accept a member name. Raises PatternError."""
    _check_letters(text, "member", _ALNUM)
    _check_dotted(text, "member", _ALNUM, least=1)


def _compile_dotted(pattern: str, what: str, check: Callable[[str], None]) -> Predicate:
    if is_literal(pattern):
        check(pattern)
        return pattern.__eq__
    letters = _ALNUM if what == "member" else _ALNUM | {"."}
    alternatives = _expand(pattern, what, letters)
    for alternative in alternatives:
        if is_literal(alternative):
            check(alternative)
        else:
            _check_elements(alternative, what)
    return _union(alternatives)


def _check_letters(text: str, what: str, letters: frozenset[str]) -> None:
    for at, char in enumerate(text):
        if char not in letters:
            raise PatternError(f"{char!r} cannot stand in a {what}", at)


def _check_dotted(
    text: str,
    what: str,
    letters: frozenset[str],
    *,
    start: int = 0,
    least: int = 2,
    digits: bool = False,
) -> None:
    if len(text) > MAX_NAME:
        raise PatternError(f"{what} longer than {MAX_NAME} characters", MAX_NAME)
    rest = text[start:]
    try:
        _check_letters(rest, what, letters | {"."})
        _check_elements(rest, what, digits=digits)
    except PatternError as exc:
        raise PatternError(exc.problem, exc.position + start) from None
    if rest.count(".") + 1 < least:
        raise PatternError(f"{what} of a single element", start)


def _check_elements(text: str, what: str, *, digits: bool = False) -> None:
    at = 0
    for element in text.split("."):
        if not element:
            # The dot that has nothing on one side of it.
            raise PatternError(f"empty {what} element", max(at - 1, 0))
        if element[0].isdigit() and not digits:
            raise PatternError(f"{what} element begins with a digit", at)
        at += len(element) + 1


def _check_path_elements(text: str) -> None:
    if not text.startswith(("/", "**")):
        raise PatternError("a path begins with '/'", 0)
    if (at := text.find("//")) >= 0:
        raise PatternError("empty path element", at + 1)
    if text.endswith("/") and text != "/":
        raise PatternError("a path does not end with '/'", len(text) - 1)


def _expand(pattern: str, what: str, letters: frozenset[str]) -> list[str]:
    """Return the patterns without braces that the pattern is the union of."""
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"{what} pattern longer than {MAX_PATTERN} characters", MAX_PATTERN)
    _check_brackets(pattern)
    outside = _CLASS.sub(lambda found: "?" * len(found[0]), pattern)
    _check_letters(outside, what, letters | set("*?{,}"))
    return expand_braces(pattern)


def _check_brackets(pattern: str) -> None:
    opened: list[int] = []
    _check_classes(pattern)
    for at, char in enumerate(pattern):
        match char:
            case "{":
                opened.append(at)
            case "}" if not opened:
                raise PatternError("'}' without '{'", at)
            case "}":
                opened.pop()
            case "," if not opened:
                raise PatternError("',' outside braces", at)
            case _:
                pass
    if opened:
        raise PatternError("'{' without '}'", opened[-1])


def _check_classes(pattern: str) -> None:
    at = pattern.find("[")
    while at >= 0:
        found = _CLASS.match(pattern, at)
        if found is None:
            raise PatternError("'[' without a list of characters and ']'", at)
        try:
            re.compile(_class_regex(found[0]))
        except re.error:
            raise PatternError(f"bad range in {found[0]!r}", at) from None
        at = pattern.find("[", found.end())


def _alternatives(text: str, opening: int) -> tuple[list[str], int]:
    """Return what stands between the commas, and where the text goes on."""
    depth, start, found = 0, opening + 1, []
    for at in range(opening, len(text)):
        match text[at]:
            case "{":
                depth += 1
            case "," if depth == 1:
                found.append(text[start:at])
                start = at + 1
            case "}" if depth == 1:
                return [*found, text[start:at]], at + 1
            case "}":
                depth -= 1
            case _:
                pass
    raise AssertionError(text)  # _check_brackets has seen to it


def _union(alternatives: list[str]) -> Predicate:
    # A `|` of branches with atomic groups still tries each branch: \Z is outside of the groups.
    return re.compile(f"(?:{'|'.join(map(_regex, alternatives))})\\Z").match


def _regex(glob: str) -> str:
    """Return the regular expression, to be followed by `\\Z`, of a glob without braces."""
    # stretches: between two `**`; each a list of the fixed texts between two `*`.
    stretches = [[""]]
    for piece in _PIECE.findall(glob):
        if piece.startswith("**"):
            stretches.append([""])
        elif piece == "*":
            stretches[-1].append("")
        else:
            stretches[-1][-1] += _fixed(piece)
    *front, last = stretches
    regex = "".join(f"(?>.*?{_leftmost(texts)})" for texts in front[1:])
    if front:
        regex = _leftmost(front[0]) + regex + ".*"
    if len(last) == 1:
        return regex + last[0]
    return f"{regex}{_leftmost(last[:-1])}[^/]*{last[-1]}"


def _leftmost(texts: list[str]) -> str:
    # A text that begins with the next `/` can be in one place only: nothing to commit to, and faster.
    return texts[0] + "".join(
        f"[^/]*{text}" if text.startswith("/") else f"(?>[^/]*?{text})" for text in texts[1:]
    )


def _fixed(piece: str) -> str:
    if piece == "?":
        return "[^/]"
    if piece.startswith("["):
        return _class_regex(piece)
    return re.escape(piece)


def _class_regex(text: str) -> str:
    inner = text[1:-1]
    if inner[0] in "!^":
        return f"[^/{inner[1:]}]"
    return f"[{inner}]"
