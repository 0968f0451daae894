"""Matching of patterns in time linear in pattern and text, whatever the wildcards. Pure.

Theory of operation. A set of places is an integer: bit i means that the first i characters of the
text are used up. Each piece of a pattern maps the set before the piece to the set behind the piece,
for all places at once, in a few integer operations:

- A character moves every place in front of that character by one.
- `*` fills each place up to the next `/`.
- `**` fills everything behind the first place.
- The alternatives of a brace start from the same set, and the results are united.

For example, `/a*` on the text `/ab/`:

    places at the start    {0}
    behind `/`             {1}
    behind `a`             {2}
    behind `*`             {2, 3}      place 4 is behind a `/`, so there is no match at the end

So a pattern takes as many steps as pieces, and never more pieces than characters. A step takes time
linear in the text, at 30 characters an instruction. Nothing is tried twice, and nothing backtracks.

`Subject.steps` counts the actual steps, and `Pattern.cost` is an upper bound.
"""

import enum
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Final

import msgspec

# Finding a character reads the whole text. A step reads this many characters.
READ_A_STEP: Final = 128


class Chars(msgspec.Struct, frozen=True):
    """A character class: any of `chars` or, if negated, any character outside `chars`."""

    chars: str
    negated: bool = False


class Star(enum.Enum):
    """Any number of characters."""

    WITHIN = enum.auto()  # no `/`
    DEEP = enum.auto()


ANY: Final = Chars("/", negated=True)

# Literal text, or an instance of the classes above, or alternatives.
Piece = str | Chars | Star | tuple["Program", ...]
Program = tuple[Piece, ...]


def reading_cost(length: int) -> int:
    """Return the number of steps for finding a character in a text of a length."""
    return 1 + length // READ_A_STEP


class Subject:
    """A text to match. Results are kept for later patterns."""

    __slots__ = ("_known", "_places", "_reversed", "_whole", "steps", "text")

    _known: "dict[Pattern, bool]"
    _places: "dict[Chars | str, int]"
    _reversed: bytes

    def __init__(self, text: str) -> None:
        self.text: Final = text
        self.steps = 0
        # all places; 0 until the first match needs the places, and then the other fields are set,
        # too
        self._whole = 0

    def lay(self, pattern: "Tree") -> bool:
        """Return whether a pattern covers the text."""
        if not self._whole:
            self._whole = (2 << len(self.text)) - 1
            # The lowest bit is for the first character, so the text is reversed. No piece has
            # characters outside ASCII, so "?" may stand for all of them.
            self._reversed = self.text.encode("ascii", "replace")[::-1]
            self._places, self._known = {}, {}
        known = self._known.get(pattern)
        if known is None:
            begin = 1 << len(pattern.stem)
            if pattern.stars_meet:
                places, _ = self._run_meeting(pattern.program, begin, 0)
            else:
                places = self._run(pattern.program, begin)
            end = len(self.text) - len(pattern.tail)
            known = self._known[pattern] = end >= 0 and bool(places >> end & 1)
        return known

    def _run(self, program: Program, places: int) -> int:
        """Return the places behind a program that starts at `places`."""
        for piece in program:
            if not places:
                return 0
            if type(piece) is str:
                for char in piece:
                    places = (places & self._where(char)) << 1
                self.steps += len(piece)
                continue
            self.steps += 1
            if piece is Star.DEEP:
                places = self._whole & -(places & -places)
            elif piece is Star.WITHIN:
                # The carry runs from each place through all skippable characters.
                free = self._where(ANY)
                places |= ((places & free) + free) ^ free
            elif type(piece) is Chars:
                places = (places & self._where(piece)) << 1
            else:
                assert type(piece) is tuple
                before, places = places, 0
                for branch in piece:
                    places |= self._run(branch, before)
        return places

    def _run_meeting(self, program: Program, places: int, starred: int) -> tuple[int, int]:
        """Run a program in which two `*` of two braces may meet and make `**`.

        `starred` are the places whose last piece was a star. Returns places and starred places.
        """
        for piece in program:
            if not places:
                break
            if type(piece) is tuple:
                self.steps += 1
                before, places, starred = (places, starred), 0, 0
                for branch in piece:
                    more, more_starred = self._run_meeting(branch, *before)
                    places |= more
                    starred |= more_starred
            elif piece is Star.WITHIN:
                deep = self._run((Star.DEEP,), starred)
                places = starred = self._run((piece,), places) | deep
            else:
                places = self._run((piece,), places)
                starred = places if piece is Star.DEEP else 0
        return places, starred

    def _where(self, chars: Chars | str) -> int:
        """Return the places behind characters of a class."""
        found = self._places.get(chars)
        if found is None:
            self.steps += reading_cost(len(self.text))
            table = _table(chars)
            found = int(self._reversed.translate(table), 2) if self._reversed else 0
            self._places[chars] = found
        return found


@lru_cache(1024)
def _table(chars: Chars | str) -> bytes:
    wanted, negated = (chars, False) if isinstance(chars, str) else (chars.chars, chars.negated)
    codes = frozenset(wanted.encode("ascii", "replace"))
    return bytes(ord("1") if (code in codes) is not negated else ord("0") for code in range(256))


class Pattern:
    """A predicate of texts. Two patterns are equal only if they are the same object."""

    __slots__ = ("length", "letters", "pieces", "sets", "stem")

    def __init__(
        self, stem: str, pieces: int, sets: int = 0, letters: str = "", length: int | None = None
    ) -> None:
        self.length: Final = length  # length of all matching texts, if all have the same length
        self.stem: Final = stem  # fixed text at the start of all matching texts
        self.pieces: Final = pieces  # upper bound of steps, without finding characters
        self.sets: Final = sets  # number of character classes to be found
        self.letters: Final = (
            letters  # single characters to be found, each once; `?` is any but `/`
        )

    def cost(self, length: int) -> int:
        """Return the upper bound of steps for a text of a length, without other patterns."""
        return self.pieces + (self.sets + len(self.letters)) * reading_cost(length)

    def __call__(self, text: str) -> bool:
        """Return whether the pattern covers a text that is matched only once."""
        return self.fits(Subject(text))

    def fits(self, subject: Subject) -> bool:
        """Return whether the pattern covers the text of a subject."""
        raise NotImplementedError


class Shapes(Pattern):
    """Fixed texts and shapes. A shape is a fixed beginning, a star, and a fixed end."""

    __slots__ = ("_exact", "_shapes")

    def __init__(self, stem: str, exact: Iterable[str], shapes: Iterable["Shape"]) -> None:
        self._exact: Final = frozenset(exact)
        self._shapes: Final = tuple(shapes)
        super().__init__(stem, 1 + len(self._shapes))

    def fits(self, subject: Subject) -> bool:
        """Compare beginnings and ends."""
        text = subject.text
        subject.steps += 1 + len(self._shapes)
        if text in self._exact:
            return True
        for shape in self._shapes:
            beginning, end, deep = shape
            room = len(text) - len(end)
            if (
                room >= len(beginning)
                and text.startswith(beginning)
                and text.endswith(end)
                and (deep or text.find("/", len(beginning), room) < 0)
            ):
                return True
        return False


# Beginning, end, and whether `/` may be in between.
Shape = tuple[str, str, bool]


class Tree(Pattern):
    """Any pattern. The fixed beginning and end are compared first."""

    __slots__ = ("program", "stars_meet", "tail")

    def __init__(self, program: Program, *, stars_meet: bool = False) -> None:
        self.stars_meet: Final = stars_meet
        stem = program[0] if program and type(program[0]) is str else ""
        rest = program[1:] if stem else program
        tail = rest[-1] if rest and type(rest[-1]) is str else ""
        self.tail: Final = tail
        self.program: Final = rest[:-1] if tail else rest
        found = list(_all_pieces(self.program))
        classes = {each for each in found if type(each) is Chars and each != ANY}
        texts = [each for each in found if type(each) is str]
        number = len(found) - len(texts) + sum(map(len, texts))
        super().__init__(
            stem,
            1 + number * (1 + stars_meet),
            len(classes),
            "".join({*"".join(texts), *("?" if ANY in found or Star.WITHIN in found else "")}),
            None if _varies(found) else len(stem) + number + len(tail),
        )

    def fits(self, subject: Subject) -> bool:
        """Compare the ends, and match the rest."""
        subject.steps += 1
        text = subject.text
        return (
            (self.length is None or self.length == len(text))
            and text.startswith(self.stem)
            and text.endswith(self.tail)
            and subject.lay(self)
        )


def _varies(pieces: Iterable[Piece]) -> bool:
    return any(type(piece) is Star or type(piece) is tuple for piece in pieces)


def _all_pieces(program: Program) -> Iterator[Piece]:
    for piece in program:
        yield piece
        if type(piece) is tuple:
            for branch in piece:
                yield from _all_pieces(branch)
