"""What an importer gives: rules, and whatever it read that no rule says.

An importer never says more than it read. What has no rule is left out of what is allowed, and what is denied
becomes wider if need be; either way it is listed. Text that its own program would refuse is an
ImportFileError, and nothing is imported.
"""

from typing import Final

import msgspec

from policy.rules import AccessList

_SHOWN: Final = 120  # characters of a quoted text


class Source(msgspec.Struct, frozen=True):
    """A file: its name, and its text."""

    name: str
    text: str


class Unsaid(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that the rules do not say, or not exactly."""

    file: str
    line: int  # from 1; the number of the argument where there are no lines
    text: str  # what stands there, cut short
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}: {self.reason}"


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of one sandbox, and what they leave out."""

    access: AccessList
    unsaid: tuple[Unsaid, ...] = ()


class ImportFileError(ValueError):
    """A text that the program it was written for would refuse, or that is beyond a limit of ours."""

    def __init__(self, file: str, line: int, problem: str) -> None:
        super().__init__(f"{file}:{line}: {problem}")
        self.file: Final = file
        self.line: Final = line
        self.problem: Final = problem


def cut(text: str) -> str:
    """Return the text in one printable line, cut short."""
    # Cut before the blanks are joined: a rule may be megabytes long.
    line = " ".join(text[: 4 * _SHOWN].split())
    line = line if line.isprintable() else ascii(line)[1:-1]
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
