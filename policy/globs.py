"""Patterns for bus names, object paths, interfaces and members: grammar and predicates.

A pattern is checked when compiled. PatternError gives the problem and the position. The text to
match is not checked later, because the caller has parsed the text.

Compiling takes time linear in the pattern and in the alternatives written out, which are at most
64. Matching (policy.matcher) takes as many steps as the pattern has pieces, whatever the text.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final, Literal

import msgspec

from policy.matcher import ANY, Chars, Pattern, Piece, Program, Shape, Shapes, Star, Tree

MAX_NAME: Final = 255  # bytes; of names, interfaces and members, by the D-Bus specification
MAX_PATTERN: Final = 1024  # characters
MAX_ALTERNATIVES: Final = 64  # of one pattern, after all its braces are expanded
# Many sandboxes have the same rules, so compiled patterns are remembered. With this number, and
# this limit on the length of a remembered pattern, the cache takes some MiB.
_COMPILED: Final = 4096
_WORTH_IT: Final = 128  # characters
# The limit on the alternatives of a pattern that are compared by beginning and end only. A pattern
# with more alternatives is compiled to a Tree.
_MAX_SHAPES: Final = 8

_WILDCARDS: Final = re.compile(r"[*?\[{]")
_CLASS: Final = re.compile(r"\[[!^]?[A-Za-z0-9_-]+\]")
_PIECE: Final = re.compile(r"\*+|\?|\[[^\]]*\]|[^*?\[]+")
_BRACES: Final = re.compile(r"[{},]")
# Characters that must not occur in a text or pattern.
_NO_NAME: Final = re.compile(r"[^A-Za-z0-9_.-]")
_NO_NAME_PATTERN: Final = re.compile(r"[^A-Za-z0-9_.*?-]")
_NO_PATH: Final = re.compile(r"[^A-Za-z0-9_/]")
_NO_PATH_PATTERN: Final = re.compile(r"[^A-Za-z0-9_/*?{,}]")
_NO_INTERFACE: Final = re.compile(r"[^A-Za-z0-9_.]")
_NO_INTERFACE_PATTERN: Final = re.compile(r"[^A-Za-z0-9_.*?{,}]")
_NO_MEMBER: Final = re.compile(r"[^A-Za-z0-9_]")
_NO_MEMBER_PATTERN: Final = re.compile(r"[^A-Za-z0-9_*?{,}]")
# An element that is empty or begins with a digit.
_BAD_ELEMENT: Final = re.compile(r"(?:\A|\.)(?:[0-9.]|\Z)")

# Text with wildcards, interleaved with the branches of braces.
_Sequence = list["str | list[_Sequence]"]


class PatternError(ValueError):
    """A pattern or name is against the grammar. `position` counts from 0 in the pattern."""

    def __init__(self, problem: str, position: int) -> None:
        super().__init__(problem)
        self.problem: Final = problem
        self.position: Final = position


class NamePattern(msgspec.Struct, frozen=True, kw_only=True):
    """A bus name, a subtree (`org.example.*`: `org.example` and all names below), or a glob."""

    kind: Literal["exact", "subtree", "glob"]
    text: str

    @property
    def base(self) -> str:
        """Return the name at the top of a subtree; for other kinds, the text."""
        return self.text[:-2] if self.kind == "subtree" else self.text

    def matches(self, name: str) -> bool:
        """Return whether the pattern covers a name."""
        return compile_name(self.text)(name)


@lru_cache(_COMPILED)
def parse_name_pattern(text: str) -> NamePattern:
    """Return the pattern. Raises PatternError."""
    if is_literal(text):
        check_bus_name(text)
        return NamePattern(kind="exact", text=text)
    if text.endswith(".*") and not _WILDCARDS.search(text, 0, len(text) - 1):
        _check_dotted(text[:-2], "bus name", _NO_NAME, least=1)
        return NamePattern(kind="subtree", text=text)
    _check_classes(text)
    plain = _CLASS.sub(lambda found: "?" * len(found[0]), text)
    _check_dotted(plain, "bus name", _NO_NAME_PATTERN, least=1)
    return NamePattern(kind="glob", text=text)


def _remembering(compile_pattern: Callable[[str], Pattern]) -> Callable[[str], Pattern]:
    remembered = lru_cache(_COMPILED)(compile_pattern)

    def compile_once(pattern: str) -> Pattern:
        return (remembered if len(pattern) <= _WORTH_IT else compile_pattern)(pattern)

    compile_once.__doc__ = compile_pattern.__doc__
    return compile_once


@_remembering
def compile_name(pattern: str) -> Pattern:
    """Return the predicate of a bus name pattern. Raises PatternError."""
    parsed = parse_name_pattern(pattern)
    match parsed.kind:
        case "exact":
            return _literal(pattern)
        case "subtree":
            return Shapes(parsed.base, [parsed.base], [(pattern[:-1], "", True)])
        case "glob":
            # Names have no `/`, so all stars in a name pattern mean the same.
            return _union([re.sub(r"\*+", "**", pattern)], None)


@_remembering
def compile_path(pattern: str) -> Pattern:
    """Return the predicate of an object path or a glob of them. Raises PatternError."""
    if is_literal(pattern):
        check_path(pattern)
        return _literal(pattern)
    sequence = _parse(pattern, "path", _NO_PATH_PATTERN)
    alternatives = _texts(sequence)
    for alternative in alternatives:
        _check_path_elements(alternative)
    return _union(alternatives, sequence)


@_remembering
def compile_interface(pattern: str) -> Pattern:
    """Return the predicate of an interface or a glob of them. Raises PatternError."""
    return _compile_dotted(pattern, "interface", check_interface)


@_remembering
def compile_member_glob(pattern: str) -> Pattern:
    """Return the predicate of a member or a glob of them. Raises PatternError."""
    return _compile_dotted(pattern, "member", check_member)


def expand_braces(pattern: str) -> list[str]:
    """Return patterns without braces whose union is a pattern. The pattern must be valid."""
    return _texts(_split(pattern))


def stem(pattern: str) -> str:
    """Return the fixed text at the start of every match."""
    return _WILDCARDS.split(pattern, maxsplit=1)[0]


def is_literal(pattern: str) -> bool:
    """Return whether a pattern has no wildcard, and so matches only itself."""
    return not _WILDCARDS.search(pattern)


def check_bus_name(text: str) -> None:
    """Accept a well-known or unique bus name. Raises PatternError."""
    if text.startswith(":"):
        _check_dotted(text, "bus name", _NO_NAME, start=1, digits=True)
    else:
        _check_dotted(text, "bus name", _NO_NAME)


def check_path(text: str) -> None:
    """Accept an object path. Raises PatternError."""
    _check_letters(text, "path", _NO_PATH)
    _check_path_elements(text)


def check_interface(text: str) -> None:
    """Accept an interface name. Raises PatternError."""
    _check_dotted(text, "interface", _NO_INTERFACE)


def check_member(text: str) -> None:
    """Accept a member name. Raises PatternError."""
    _check_letters(text, "member", _NO_MEMBER)
    _check_dotted(text, "member", _NO_MEMBER, least=1)


# -- checking --------------------------------------------------------------------------------------


def _compile_dotted(pattern: str, what: str, check: Callable[[str], None]) -> Pattern:
    if is_literal(pattern):
        check(pattern)
        return _literal(pattern)
    others = _NO_MEMBER_PATTERN if what == "member" else _NO_INTERFACE_PATTERN
    sequence = _parse(pattern, what, others)
    alternatives = _texts(sequence)
    for alternative in alternatives:
        if is_literal(alternative):
            check(alternative)
        else:
            _check_elements(alternative, what)
    return _union(alternatives, sequence)


def _check_letters(text: str, what: str, others: re.Pattern[str]) -> None:
    if (found := others.search(text)) is not None:
        raise PatternError(f"{found[0]!r} cannot stand in a {what}", found.start())


def _check_dotted(
    text: str,
    what: str,
    others: re.Pattern[str],
    *,
    start: int = 0,
    least: int = 2,
    digits: bool = False,
) -> None:
    if len(text) > MAX_NAME:
        raise PatternError(f"{what} longer than {MAX_NAME} characters", MAX_NAME)
    rest = text[start:]
    try:
        _check_letters(rest, what, others)
        _check_elements(rest, what, digits=digits)
    except PatternError as exc:
        raise PatternError(exc.problem, exc.position + start) from None
    if rest.count(".") + 1 < least:
        raise PatternError(f"{what} of a single element", start)


def _check_elements(text: str, what: str, *, digits: bool = False) -> None:
    if not _BAD_ELEMENT.search(text):
        return
    at = 0
    for element in text.split("."):
        if not element:
            # The problem is at the dot beside the empty element.
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


def _check_braces(pattern: str) -> None:
    opened: list[int] = []
    for found in _BRACES.finditer(pattern):
        at = found.start()
        match found[0]:
            case "{":
                opened.append(at)
            case "}" if not opened:
                raise PatternError("'}' without '{'", at)
            case "}":
                opened.pop()
            case _ if not opened:
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
            _read_class(found[0])
        except ValueError:
            raise PatternError(f"bad range in {found[0]!r}", at) from None
        at = pattern.find("[", found.end())


# -- braces ----------------------------------------------------------------------------------------


def _parse(pattern: str, what: str, others: re.Pattern[str]) -> _Sequence:
    """Check a pattern with wildcards except for the alternatives, and return the parts."""
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"{what} pattern longer than {MAX_PATTERN} characters", MAX_PATTERN)
    _check_classes(pattern)
    _check_braces(pattern)
    outside = _CLASS.sub(lambda found: "?" * len(found[0]), pattern) if "[" in pattern else pattern
    _check_letters(outside, what, others)
    return _split(pattern)


class _Open:
    """A brace being read, or the whole pattern, with the number of alternatives so far."""

    def __init__(self) -> None:
        self.branches: Final[list[_Sequence]] = [[]]
        self.before = 0  # alternatives of all branches but the last
        self.last = 1

    def add(self, text: str) -> None:
        """Append text to the current branch."""
        sequence = self.branches[-1]
        if text and sequence and isinstance(last := sequence[-1], str):
            sequence[-1] = last + text
        elif text:
            sequence.append(text)

    def add_brace(self, brace: "_Open") -> None:
        """Append a closed brace.

        A brace with a single branch is dissolved into the current branch.
        """
        self.last = min(self.last * (brace.before + brace.last), MAX_ALTERNATIVES + 1)
        if len(brace.branches) > 1:
            self.branches[-1].append(brace.branches)
            return
        for item in brace.branches[0]:
            if isinstance(item, str):
                self.add(item)
            else:
                self.branches[-1].append(item)

    def next_branch(self) -> None:
        """Begin another branch."""
        self.before = min(self.before + self.last, MAX_ALTERNATIVES + 1)
        self.last = 1
        self.branches.append([])


def _split(pattern: str) -> _Sequence:
    """Return the parts of a pattern with checked braces. Raises PatternError."""
    whole = _Open()
    opened = [whole]
    at = 0
    for found in _BRACES.finditer(pattern):
        opened[-1].add(pattern[at : found.start()])
        at = found.end()
        match found[0]:
            case "{":
                opened.append(_Open())
            case ",":
                opened[-1].next_branch()
            case _:
                brace = opened.pop()
                opened[-1].add_brace(brace)
    whole.add(pattern[at:])
    if whole.last > MAX_ALTERNATIVES:
        raise PatternError(f"more than {MAX_ALTERNATIVES} alternatives", pattern.index("{"))
    return whole.branches[0]


def _texts(sequence: _Sequence) -> list[str]:
    """Return the alternatives written out. The number of alternatives is checked before."""
    found = [""]
    for item in sequence:
        more = [item] if isinstance(item, str) else [t for each in item for t in _texts(each)]
        found = [left + right for left in found for right in more]
    return found


# -- compiling -------------------------------------------------------------------------------------


def _literal(text: str) -> Pattern:
    return Shapes(text, [text], [])


def _union(alternatives: list[str], sequence: _Sequence | None) -> Pattern:
    """Return the predicate of alternatives.

    `sequence` has several alternatives in short form.
    """
    wild = [text for text in dict.fromkeys(alternatives) if not is_literal(text)]
    if len(wild) <= _MAX_SHAPES and None not in (shapes := [_shape(text) for text in wild]):
        exact = [text for text in alternatives if is_literal(text)]
        return Shapes(_common(alternatives), exact, [shape for shape in shapes if shape])
    if sequence is None or len(alternatives) == 1:
        return Tree(tuple(_pieces(alternatives[0])))
    return Tree(_program(sequence), stars_meet=_has_stars_that_meet(sequence))


def _common(texts: list[str]) -> str:
    """Return the fixed text at the start of all texts."""
    low, high = min(stems := [stem(text) for text in texts]), max(stems)
    at = next((at for at, char in enumerate(low) if char != high[at]), len(low))
    return low[:at]


def _shape(glob: str) -> Shape | None:
    """Return the beginning and end of a glob with a single star and no other wildcard."""
    before, star, after = glob.partition("*")
    deep = after.startswith("*")
    after = after.lstrip("*")
    return (before, after, deep) if star and is_literal(before) and is_literal(after) else None


def _program(sequence: _Sequence) -> Program:
    pieces: list[Piece] = []
    for item in sequence:
        if isinstance(item, str):
            pieces += _pieces(item)
        else:
            pieces.append(tuple(_program(branch) for branch in item))
    return tuple(pieces)


def _pieces(glob: str) -> Iterator[Piece]:
    for piece in _PIECE.findall(glob):
        match piece[0]:
            case "*":
                yield Star.WITHIN if len(piece) == 1 else Star.DEEP
            case "?":
                yield ANY
            case "[":
                yield _read_class(piece)
            case _:
                yield piece


# Snap rules use few character classes, in thousands of patterns.
@lru_cache(maxsize=256)
def _read_class(text: str) -> Chars:
    """Return a character class `[...]`. Raises ValueError for a reversed range."""
    negated = text[1] in "!^"
    inner = text[1 + negated : -1]
    chars = {"/"} if negated else set()
    at = 0
    while at < len(inner):
        first, last, at = inner[at], inner[at], at + 1
        if inner[at : at + 1] == "-" and at + 1 < len(inner):
            last, at = inner[at + 1], at + 2
        if first > last:
            raise ValueError(text)
        chars.update(map(chr, range(ord(first), ord(last) + 1)))
    return Chars("".join(sorted(chars)), negated)


class _Edges(msgspec.Struct, frozen=True):
    """Flags of a sequence: may begin with a star, may end with a star, may be empty."""

    first: bool
    last: bool
    empty: bool


def _has_stars_that_meet(sequence: _Sequence) -> bool:
    try:
        _edges(sequence)
    except _StarsMeet:
        return True
    return False


class _StarsMeet(Exception):  # noqa: N818 - an answer, no error
    """Two stars can be side by side."""


def _edges(sequence: _Sequence) -> _Edges:
    so_far = _Edges(first=False, last=False, empty=True)
    for item in sequence:
        if isinstance(item, str):
            here = _Edges(first=item[0] == "*", last=item[-1] == "*", empty=False)
        else:
            branches = [_edges(branch) for branch in item]
            here = _Edges(
                first=any(each.first for each in branches),
                last=any(each.last for each in branches),
                empty=any(each.empty for each in branches),
            )
        if so_far.last and here.first:
            raise _StarsMeet
        so_far = _Edges(
            first=so_far.first or (so_far.empty and here.first),
            last=here.last or (here.empty and so_far.last),
            empty=so_far.empty and here.empty,
        )
    return so_far
