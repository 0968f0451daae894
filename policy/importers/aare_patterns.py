"""AppArmor's globs -> patterns of policy.globs, where the meaning is exactly the same."""

import string
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import msgspec

from policy.globs import (
    MAX_ALTERNATIVES,
    MAX_NAME,
    MAX_PATTERN,
    PatternError,
    compile_interface,
    compile_member_glob,
    compile_path,
    is_literal,
    parse_name_pattern,
)
from policy.importers.aare import (
    Alternative,
    Budget,
    CharSet,
    Piece,
    UnsayableError,
    Wild,
    alternatives,
)

# alternatives that replace `[...]` of a pattern, for kinds whose patterns have no `[...]`
MAX_SETS: Final = 1024

_ALNUM: Final = frozenset(string.ascii_letters + string.digits + "_")


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of pattern, with the characters of the kind, and a check for resulting patterns."""

    what: str
    plain: frozenset[str]  # characters that may stand in `[...]` of a resulting pattern
    special: frozenset[str] = frozenset()  # other characters
    classes: bool = True  # resulting patterns of this kind may have `[...]`
    compile: Callable[[str], object]


PATH: Final = Kind(what="object path", plain=_ALNUM, special=frozenset("/"), compile=compile_path)
INTERFACE: Final = Kind(
    what="interface", plain=_ALNUM, special=frozenset("."), compile=compile_interface
)
MEMBER: Final = Kind(what="member", plain=_ALNUM, compile=compile_member_glob)
NAME: Final = Kind(
    what="bus name",
    plain=_ALNUM | {"-"},
    special=frozenset(".:"),
    compile=parse_name_pattern,
)


def say(text: str, kind: Kind, budget: Budget) -> tuple[list[str] | None, list[str]]:
    """Return the patterns for an AppArmor glob, and why alternatives were left out.

    An empty list means that no valid D-Bus text can match. None means that every text matches.
    Raises AareError, BudgetError, and UnsayableError if no alternative can be expressed.
    """
    said: dict[str, None] = {}
    left_out: dict[str, None] = {}
    for each in alternatives(text, budget):
        try:
            for pieces in expand_sets(each, kind, budget):
                if _matches_all(pieces, kind):
                    return None, []
                pattern = _pattern(pieces, kind)
                if pattern is not None:
                    said[pattern] = None
        except UnsayableError as exc:
            left_out[str(exc)] = None
    return list(_subtrees(said)) if kind is NAME else list(said), list(left_out)


def join(patterns: list[str]) -> list[str]:
    """Return fewer patterns of the same meaning, by joining patterns in braces."""
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


def expand_sets(pieces: Alternative, kind: Kind, budget: Budget) -> Iterable[Alternative]:
    """Return alternatives without `[...]` that the resulting pattern cannot have."""
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
    special: list[Piece] = []
    special += sorted(chars & kind.special)
    if not kind.classes or len(plain) <= 1:
        return [*sorted(plain), *special]
    return [CharSet(frozenset(plain), negated=False), *special]


def _matches_all(pieces: Alternative, kind: Kind) -> bool:
    stars = bool(pieces) and all(isinstance(piece, Wild) and piece.text != "?" for piece in pieces)
    return stars and (kind is not PATH or Wild("**") in pieces)


def _pattern(pieces: Alternative, kind: Kind) -> str | None:
    """Return the pattern, or None if no valid D-Bus text can match. Raises UnsayableError."""
    if not pieces and kind in {INTERFACE, NAME}:
        raise UnsayableError(f"it is about having no {kind.what}")
    if kind is PATH:
        pieces = _path_pieces(pieces)
    # The root is the only path with an empty element. Elsewhere the empty element needs no
    # exclusion.
    near_root = kind is PATH and [piece for piece in pieces if not _is_star(piece)] == ["/"]
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
                if piece.filled and near_root:
                    parts.append("?")
                _add_wild(parts, "*" if kind is NAME and piece.text == "**" else piece.text)
    return _checked("".join(parts), kind)


def _path_pieces(pieces: Alternative) -> Alternative:
    """Drop pieces that can match only an empty text.

    A path begins with `/`, and no path but the root ends with `/`.
    """
    while pieces and pieces[0] == Wild("*"):
        pieces = pieces[1:]
    if pieces[-1:] == ("/",) and all(piece == Wild("**") for piece in pieces[:-1]):
        return ("/",)
    return pieces


def _is_star(piece: Piece) -> bool:
    return isinstance(piece, Wild) and piece.text in {"*", "**"}


def _add_wild(parts: list[str], text: str) -> None:
    if text == "?" or not (parts and parts[-1] in {"*", "**"}):
        parts.append(text)
    else:  # two adjacent `*` are not `**`
        parts[-1] = max(parts[-1], text)


def _checked(text: str, kind: Kind) -> str | None:
    literal = is_literal(text)
    if kind is NAME and not literal:
        if ":" in text:
            raise UnsayableError("it is a pattern of unique names")
        if text.endswith(".*"):
            text = f"{text[:-1]}?*"  # `.*` alone would be a subtree, which includes the base
    most = MAX_NAME if kind is NAME else MAX_PATTERN
    if not literal and len(text) > most:
        raise UnsayableError(f"it is longer than {most} characters")
    try:
        kind.compile(text)
    except PatternError:
        return None
    return text


def _class_text(chars: frozenset[str]) -> str:
    """Return `[...]`. Runs of at least three characters become ranges."""
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
    """Replace `org.example` together with `org.example.?*` by the subtree `org.example.*`."""
    for name in names:
        base = name.removesuffix(".?*")
        if base == name and f"{name}.?*" in names and is_literal(name):
            yield f"{name}.*"
        elif base == name or base not in names:
            yield name
