r"""AppArmor's globs (AARE): text -> the pieces of the glob's alternatives.

The grammar: `*` and `?` stop at `/`, and `**` does not. `[a-z]` and `[^a-z]` are character classes.
`{a,b}` are alternatives, which nest. `\` stands before a character to be taken literally, or before
the number of a character.

The alternatives of an import are limited (Budget). policy.importers.aare_patterns translates them
to the patterns of policy.globs.
"""

import re
from collections.abc import Iterator
from typing import Final

import msgspec

MAX_TEXT: Final = 4096  # characters of a pattern, with variables replaced
MAX_EXPANDED: Final = 2**18  # characters of all alternatives of a pattern
MAX_DEPTH: Final = 50  # nesting of braces; AppArmor's own limit

_TOKEN: Final = re.compile(
    r"(?P<lit>[^\\*?\[\]{},]+)|(?P<dstar>\*\*+)|(?P<star>\*)|(?P<any>\?)"
    r"|\\(?:(?P<octal>[0-7]{1,3})|x(?P<hex>[0-9A-Fa-f]{1,2})|d(?P<dec>[0-9]{3})|(?P<esc>.))"
    r"|\[(?P<neg>\^?)(?P<cls>(?:[^\]\\]|\\.)*)\]|(?P<one>.)",
    re.DOTALL,
)
_BRACES: Final = frozenset("{,}")
_CONTROL: Final = {"a": "\a", "e": "\x1b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class AareError(ValueError):
    """AppArmor refuses the pattern."""


class UnsayableError(ValueError):
    """A pattern has a meaning that the patterns of policy.globs cannot express."""


class Wild(msgspec.Struct, frozen=True):
    """`?`, `*` or `**`.

    `filled` marks a star that is a whole path element, and so matches no empty text.
    """

    text: str
    filled: bool = False


class CharSet(msgspec.Struct, frozen=True):
    """`[...]`."""

    chars: frozenset[str]
    negated: bool


Piece = str | Wild | CharSet
Alternative = tuple[Piece, ...]


class BudgetError(ValueError):
    """The patterns of an import are too long when written out."""


class Budget:
    """A limit on the characters of all alternatives of an import's patterns."""

    def __init__(self, characters: int) -> None:
        self._left = characters

    def spend(self, characters: int) -> None:
        """Count characters. Raises BudgetError."""
        self._left -= characters
        if self._left < 0:
            raise BudgetError("its alternatives in braces are too many to be written out")


def alternatives(text: str, budget: Budget) -> list[Alternative]:
    """Return alternatives whose union is the pattern.

    Raises AareError, UnsayableError and BudgetError.
    """
    if len(text) > MAX_TEXT:
        raise UnsayableError(f"it is longer than {MAX_TEXT} characters")
    budget.spend(len(text))
    tokens = list(_tokens(text))
    found, at = _sequence(tokens, 0, MAX_EXPANDED // (len(text) + 1))
    assert at == len(tokens)
    budget.spend(len(found) * (len(text) + 1))
    return found


def check_aare(text: str) -> None:
    """Accept a pattern with balanced brackets. Raises AareError."""
    for _ in _tokens(text):
        pass


def _tokens(text: str) -> Iterator[Piece]:
    """Yield the pieces, with braces and their commas as Wild. Raises AareError."""
    opened: list[int] = []  # number of commas in each open brace
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
        case _:  # a literal comma
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
            # D-Bus names and labels are ASCII, so a range into the rest of Unicode need not be
            # spelt out.
            chars.update(chr(code) for code in range(first, min(last, 0x7F) + 1))
            at += 3
        else:
            chars.add(plain[at])
            at += 1
    return CharSet(frozenset(chars), negated)


def _sequence(tokens: list[Piece], at: int, most: int) -> tuple[list[Alternative], int]:
    """Return the alternatives, at most `most`, up to the `,` or `}` that ends the sequence."""
    found: list[Alternative] = [()]
    start = at  # of the pieces outside inner braces
    while at < len(tokens):
        token = tokens[at]
        if isinstance(token, Wild) and token.text in _BRACES:
            found = [left + tuple(tokens[start:at]) for left in found]
            if token.text != "{":
                return found, at
            more, at = _group(tokens, at + 1, most)
            if len(found) * len(more) > most:
                raise UnsayableError("it has too many alternatives")
            # `{,x}{,x}` has `x` twice. snapd writes "up to eight digits" in that way.
            found = list(dict.fromkeys(left + right for left in found for right in more))
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
