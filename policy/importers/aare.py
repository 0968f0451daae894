r"""AppArmor's globs, and how ours say them.

Theirs: `*` and `?` stop at `/`, `**` does not, `[a-z]` and `[^a-z]`, `{a,b}` which nest, and `\` before a
character that shall mean itself, or before the number of one. A pattern is read into the list of its
alternatives, without braces; each is then said in our way (policy.globs) if that has exactly the
same meaning. How many alternatives there may be is bounded for a whole import (Budget).
"""

import re
import string
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import msgspec

from policy.globs import (
    MAX_ALTERNATIVES,
    MAX_PATTERN,
    PatternError,
    compile_interface,
    compile_member_glob,
    compile_path,
    is_literal,
    parse_name_pattern,
)

MAX_TEXT: Final = 8192  # characters of one pattern, its variables replaced
MAX_EXPANDED: Final = 2**18  # characters of all alternatives of one pattern
MAX_SETS: Final = 1024  # alternatives that `[...]` of one pattern become where ours have none
MAX_DEPTH: Final = 50  # braces in braces; AppArmor's own limit

_ALNUM: Final = frozenset(string.ascii_letters + string.digits + "_")
_TOKEN: Final = re.compile(
    r"(?P<lit>[^\\*?\[\]{},]+)|(?P<dstar>\*\*+)|(?P<star>\*)|(?P<any>\?)"
    r"|\\(?:(?P<octal>[0-7]{1,3})|x(?P<hex>[0-9A-Fa-f]{1,2})|d(?P<dec>[0-9]{3})|(?P<esc>.))"
    r"|\[(?P<neg>\^?)(?P<cls>(?:[^\]\\]|\\.)*)\]|(?P<one>.)",
    re.DOTALL,
)
_BRACES: Final = frozenset("{,}")
_CONTROL: Final = {"a": "\a", "e": "\x1b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class AareError(ValueError):
    """A pattern that AppArmor refuses."""


class UnsayableError(ValueError):
    """A pattern that means something, which our patterns cannot say."""


class Wild(msgspec.Struct, frozen=True):
    """`?`, `*` or `**`; whether it must match something is marked for a star that is a whole path element."""

    text: str
    filled: bool = False


class CharSet(msgspec.Struct, frozen=True):
    """`[...]`."""

    chars: frozenset[str]
    negated: bool


Piece = str | Wild | CharSet
Alternative = tuple[Piece, ...]


class BudgetError(ValueError):
    """The patterns of one import are too long when they are written out."""


class Budget:
    """How many characters the alternatives of all patterns of an import may have."""

    def __init__(self, characters: int) -> None:
        self._left = characters

    def spend(self, characters: int) -> None:
        """Count them. Raises BudgetError."""
        self._left -= characters
        if self._left < 0:
            raise BudgetError("its alternatives in braces are too many to be written out")


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """What a pattern is of: which characters there are, and what checks the pattern that we make."""

    what: str
    plain: frozenset[str]  # characters that our `[...]` may have
    special: frozenset[str] = frozenset()  # other characters
    classes: bool = True  # our patterns of this kind have `[...]`
    compile: Callable[[str], object]


PATH: Final = Kind(
    what="object path", plain=_ALNUM, special=frozenset("/"), compile=compile_path
)
INTERFACE: Final = Kind(
    what="interface", plain=_ALNUM, special=frozenset("."), compile=compile_interface
)
MEMBER: Final = Kind(what="member", plain=_ALNUM, compile=compile_member_glob)
NAME: Final = Kind(
    what="bus name",
    plain=_ALNUM | {"-"},
    special=frozenset(".:"),
    classes=False,
    compile=parse_name_pattern,
)


def alternatives(text: str, budget: Budget) -> list[Alternative]:
    """Return what the pattern is the union of. Raises AareError, UnsayableError and BudgetError."""
    if len(text) > MAX_TEXT:
        raise UnsayableError(f"it is longer than {MAX_TEXT} characters")
    tokens = list(_tokens(text))
    found, at = _sequence(tokens, 0, MAX_EXPANDED // (len(text) + 1))
    assert at == len(tokens)
    budget.spend(len(found) * (len(text) + 1))
    return found


def check_aare(text: str) -> None:
    """Accept a pattern whose brackets pair. Raises AareError."""
    for _ in _tokens(text):
        pass


def say(text: str, kind: Kind, budget: Budget) -> list[str] | None:
    """Return our patterns for one of AppArmor's: none at all if nothing can match, None if everything does.

    Raises AareError, UnsayableError and BudgetError.
    """
    said: dict[str, None] = {}
    for each in alternatives(text, budget):
        for pieces in expand_sets(each, kind, budget):
            if _matches_all(pieces, kind):
                return None
            if not pieces and kind is not PATH and kind is not MEMBER:
                raise UnsayableError(f"it is about having no {kind.what}")
            pattern = _pattern(pieces, kind)
            if pattern is not None:
                said[pattern] = None
    return list(_subtrees(said)) if kind is NAME else list(said)


def join(patterns: list[str]) -> list[str]:
    """Return fewer patterns of the same meaning, by putting several in braces."""
    below = {each.removesuffix("/**") for each in patterns if each.endswith("/**")}
    known = set(patterns)
    subtrees = {each for each in below & known if len(each) <= MAX_PATTERN - len("{,/**}")}
    units = [
        (f"{each}{{,/**}}", 2) if each in subtrees else (each, 1)
        for each in patterns
        if not (each.endswith("/**") and each.removesuffix("/**") in subtrees)
    ]
    return list(_in_braces(units))


def _in_braces(units: list[tuple[str, int]]) -> Iterator[str]:
    chunk: list[str] = []
    count = length = 0
    for text, number in units:
        full = count + number > MAX_ALTERNATIVES or length + len(text) + 2 > MAX_PATTERN
        if chunk and full:
            yield _braced(chunk)
            chunk, count, length = [], 0, 0
        chunk.append(text)
        count += number
        length += len(text) + 1
    if chunk:
        yield _braced(chunk)


def _braced(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{{{','.join(texts)}}}"


def _tokens(text: str) -> Iterator[Piece]:
    """Give the pieces, and braces and the commas in them as Wild. Raises AareError."""
    opened: list[int] = []  # how many commas each open brace has
    for found in _TOKEN.finditer(text):
        kind = found.lastgroup or ""
        value = found[0]
        match kind:
            case "lit":
                yield value
            case "star" | "dstar":
                before = text[found.start() - 1 : found.start()]
                after = text[found.end() : found.end() + 1]
                yield Wild(value[:2], before == "/" and after in {"", "/"})
            case "any":
                yield Wild("?")
            case "cls":
                yield _char_set(found["cls"], negated=bool(found["neg"]))
            case "one":
                yield from _brace(value, opened)
            case _:
                yield _escaped(found)
    if opened:
        raise AareError("'{' without '}'")


def _brace(value: str, opened: list[int]) -> Iterator[Piece]:
    match value:
        case "{":
            if len(opened) == MAX_DEPTH:
                raise AareError(f"more than {MAX_DEPTH} braces in each other")
            opened.append(0)
        case "," if opened:
            opened[-1] += 1
        case "}" if not opened:
            raise AareError("'}' without '{'")
        case "}":
            if not opened.pop():
                raise AareError("braces without ','")
        case "[":
            raise AareError("'[' without ']'")
        case "]":
            raise AareError("']' without '['")
        case "\\":
            raise AareError("'\\' at the end")
        case _:  # a comma that means itself
            yield value
            return
    yield Wild(value)


def _escaped(found: re.Match[str]) -> str:
    if (octal := found["octal"]) is not None:
        return chr(int(octal, 8) % 256)
    if (hexadecimal := found["hex"]) is not None:
        return chr(int(hexadecimal, 16))
    if (decimal := found["dec"]) is not None:
        return chr(int(decimal) % 256)
    char = found["esc"]
    return _CONTROL.get(char, char)


def _char_set(text: str, *, negated: bool) -> CharSet:
    if not text:
        raise AareError("'[]' has no characters")
    chars: set[str] = set()
    plain = re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL) if "\\" in text else text
    at = 0
    while at < len(plain):
        if plain[at + 1 : at + 2] == "-" and at + 2 < len(plain):
            first, last = ord(plain[at]), ord(plain[at + 2])
            if first > last:
                raise AareError(f"bad range {plain[at : at + 3]!r}")
            # D-Bus and labels are ASCII: a range into the rest of Unicode need not be spelt out.
            chars.update(chr(code) for code in range(first, min(last, 0x7F) + 1))
            at += 3
        else:
            chars.add(plain[at])
            at += 1
    return CharSet(frozenset(chars), negated)


def _sequence(tokens: list[Piece], at: int, most: int) -> tuple[list[Alternative], int]:
    """Return at most so many alternatives, up to the `,` or `}` that ends them."""
    found: list[Alternative] = [()]
    start = at  # of the pieces that are in no inner braces
    while at < len(tokens):
        token = tokens[at]
        if isinstance(token, Wild) and token.text in _BRACES:
            found = [left + tuple(tokens[start:at]) for left in found]
            if token.text != "{":
                return found, at
            more, at = _group(tokens, at + 1, most)
            if len(found) * len(more) > most:
                raise UnsayableError("it has too many alternatives")
            found = [left + right for left in found for right in more]
            start = at
        else:
            at += 1
    return [left + tuple(tokens[start:at]) for left in found], at


def _group(tokens: list[Piece], at: int, most: int) -> tuple[list[Alternative], int]:
    found: list[Alternative] = []
    while True:
        more, at = _sequence(tokens, at, most)
        found += more
        end = tokens[at]
        assert isinstance(end, Wild)
        at += 1
        if end.text == "}":
            return found, at


def expand_sets(pieces: Alternative, kind: Kind, budget: Budget) -> Iterable[Alternative]:
    """Give the alternatives that have no `[...]` which we could not write."""
    if not any(isinstance(piece, CharSet) for piece in pieces):
        return [pieces]
    found: list[Alternative] = [()]
    for piece in pieces:
        choices: list[Piece] = _choices(piece, kind) if isinstance(piece, CharSet) else [piece]
        if len(found) * len(choices) > MAX_SETS:
            raise UnsayableError(f"its [...] stand for too many {kind.what}s")
        budget.spend(len(found) * len(choices) * len(pieces))
        found = [(*left, choice) for left in found for choice in choices]
    return found


def _choices(piece: CharSet, kind: Kind) -> list[Piece]:
    everything = kind.plain | kind.special
    chars = everything - piece.chars if piece.negated else everything & piece.chars
    plain = chars & kind.plain
    special: list[Piece] = list(sorted(chars & kind.special))
    if not kind.classes or len(plain) <= 1:
        return [*sorted(plain), *special]
    return [CharSet(frozenset(plain), negated=False), *special]


def _matches_all(pieces: Alternative, kind: Kind) -> bool:
    stars = bool(pieces) and all(isinstance(piece, Wild) and piece.text != "?" for piece in pieces)
    return stars and (kind is not PATH or Wild("**") in pieces)


def _pattern(pieces: Alternative, kind: Kind) -> str | None:
    """Return our pattern, or None if nothing that D-Bus has can match. Raises UnsayableError."""
    # The root has no elements; everywhere else a path element is never empty for us either.
    if len(pieces) == 2 and pieces[0] == "/" and isinstance(pieces[1], Wild) and pieces[1].filled:
        return f"/?{pieces[1].text}"
    parts: list[str] = []
    for piece in pieces:
        match piece:
            case str():
                if not kind.plain | kind.special >= set(piece):
                    return None
                parts.append(piece)
            case CharSet():
                parts.append(_class_text(piece.chars))
            case Wild():
                text = "*" if kind is NAME and piece.text == "**" else piece.text
                if text == "?" or not (parts and parts[-1] in {"*", "**"}):
                    parts.append(text)
                elif kind is not NAME:  # two stars side by side are not `**`
                    parts[-1] = max(parts[-1], text)
    return _checked("".join(parts), kind)


def _checked(text: str, kind: Kind) -> str | None:
    literal = is_literal(text)
    if kind is NAME and not literal:
        if ":" in text:
            raise UnsayableError("it is a pattern of unique names")
        if text.endswith(".*"):
            text = f"{text[:-1]}?*"  # `.*` alone is a subtree for us, with its top
    if not literal and len(text) > MAX_PATTERN:
        raise UnsayableError(f"it is longer than {MAX_PATTERN} characters")
    try:
        kind.compile(text)
    except PatternError:
        return None
    return text


def _class_text(chars: frozenset[str]) -> str:
    """Return `[...]`; runs of at least three become ranges."""
    ordered = sorted(chars)
    text, at = "", 0
    while at < len(ordered):
        end = at
        while end + 1 < len(ordered) and ord(ordered[end + 1]) == ord(ordered[end]) + 1:
            end += 1
        run = "".join(ordered[at : end + 1])
        text += run if len(run) < 3 else f"{run[0]}-{run[-1]}"
        at = end + 1
    return f"[{text}]"


def _subtrees(names: dict[str, None]) -> Iterator[str]:
    """Say `org.example` and `org.example.?*` as the subtree that they are."""
    for name in names:
        base = name.removesuffix(".?*")
        if base == name and f"{name}.?*" in names and is_literal(name):
            yield f"{name}.*"
        elif base == name or base not in names:
            yield name
