"""Patterns laid over a text, in time linear in both, whatever the alternations and wildcards. Pure.

How it works. Bit i of a set of places means that the first i characters of the text are used up. Each piece of a
pattern turns the set before it into the set behind it, for all places at once, in a few operations on one integer:
a character moves those places on that stand before it; `*` fills up to the next `/`; `**` fills all that is behind
the first place; the alternatives of a brace are laid over the same set, and what they give is united. So a pattern takes
as many steps as it has pieces (never more than characters), and a step takes time linear in the text,
at 30 of its characters an instruction. Nothing is tried twice, and nothing backtracks.

`Subject.steps` counts the steps that were really taken; `Pattern.cost` is how many they are at the most.
"""

import enum
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Final

import msgspec

# Finding a character reads the whole text, so many characters in the time of a step.
READ_A_STEP: Final = 128


class Chars(msgspec.Struct, frozen=True):
    """A character class: one of `chars`, or, if negated, none of them."""

    chars: str
    negated: bool = False


class Star(enum.Enum):
    """Any number of characters."""

    WITHIN = enum.auto()  # but no `/`
    DEEP = enum.auto()


ANY: Final = Chars("/", negated=True)

# Literal text, or one of the above, or alternatives.
Piece = str | Chars | Star | tuple["Program", ...]
Program = tuple[Piece, ...]


def reading_cost(length: int) -> int:
    """Return how many steps it counts to find a character in a text of this length."""
    return 1 + length // READ_A_STEP


class Subject:
    """A text that patterns are laid over. What was found out about it is kept for the next one."""

    __slots__ = ("_known", "_places", "_reversed", "_whole", "steps", "text")

    _known: "dict[Pattern, bool]"
    _places: "dict[Chars | str, int]"
    _reversed: bytes

    def __init__(self, text: str) -> None:
        self.text: Final = text
        self.steps = 0
        self._whole = 0  # all places; until one is needed nothing else is there either

    def lay(self, pattern: "Tree") -> bool:
        """Say whether the pattern covers the text."""
        if not self._whole:
            self._whole = (2 << len(self.text)) - 1
            # The first character is to be the lowest bit. Others than ASCII are equal to no piece's.
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
        """Return the places behind the program, which is laid at these."""
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
                # The carry runs from each place through all that may be skipped.
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
        """Do `_run` where two `*` from two braces may meet: together they are a `**`.

        `starred`: the places that a star was the last piece to lead to.
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
        """Return the places that such a character stands behind."""
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
    """A predicate of texts. Two are equal only if they are the same object."""

    __slots__ = ("length", "letters", "pieces", "sets", "stem")

    def __init__(
        self, stem: str, pieces: int, sets: int = 0, letters: str = "", length: int | None = None
    ) -> None:
        self.length: Final = length  # all that matches is as long, if it is all of one length
        self.stem: Final = stem  # all that matches begins with it
        self.pieces: Final = pieces  # steps at the most, without those for finding characters
        self.sets: Final = sets  # classes of characters that have to be found
        self.letters: Final = (
            letters  # single characters that have to be, each once; `?` is any but `/`
        )

    def cost(self, length: int) -> int:
        """Return the steps that it takes alone of a text of this length, at the most."""
        return self.pieces + (self.sets + len(self.letters)) * reading_cost(length)

    def __call__(self, text: str) -> bool:
        """Say whether the pattern covers a text that no other is laid over."""
        return self.fits(Subject(text))

    def fits(self, subject: Subject) -> bool:
        """Say whether the pattern covers the text."""
        raise NotImplementedError


class Shapes(Pattern):
    """Fixed texts, and shapes: a fixed beginning, one star, and a fixed end."""

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
    """Any pattern. Its fixed beginning and end are compared first."""

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
        """Compare the ends, and lay the rest over the text."""
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
