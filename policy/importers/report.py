"""The result of an importer: rules, and a report of input that no rule expresses.

An importer never allows more than the input. An allow rule that cannot be expressed is left out. A
deny rule that cannot be expressed becomes wider. Both are listed in the report. Text that the
original program would refuse raises ImportFileError, and nothing is imported.
"""

from typing import Final

import msgspec

from policy.rules import AccessList

_SHOWN: Final = 120  # characters of a quoted text


class Source(msgspec.Struct, frozen=True):
    """A file: name and text."""

    name: str
    text: str


class Unsaid(msgspec.Struct, frozen=True, kw_only=True):
    """An item of the input that the rules do not express, or not exactly."""

    file: str
    line: int  # from 1; the number of the argument where there are no lines
    text: str  # the input, shortened
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}: {self.reason}"


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of a sandbox, and the items that the rules leave out."""

    access: AccessList
    unsaid: tuple[Unsaid, ...] = ()


class ImportFileError(ValueError):
    """A text that the original program would refuse, or that exceeds a limit of this importer."""

    def __init__(self, file: str, line: int, problem: str) -> None:
        super().__init__(f"{file}:{line}: {problem}")
        self.file: Final = file
        self.line: Final = line
        self.problem: Final = problem


def cut(text: str) -> str:
    """Return the text in one printable line, shortened."""
    # The text is cut before the blanks are joined, because a rule may be megabytes long.
    line = " ".join(text[: 4 * _SHOWN].split())
    line = line if line.isprintable() else ascii(line)[1:-1]
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
