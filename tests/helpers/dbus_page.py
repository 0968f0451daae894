"""Reads docs/dbus-api.md, and other pages of the same form: sections, tables and examples."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = PROJECT / "docs" / "dbus-api.md"
Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its info string, as `console dbus-broker`, and its text."""

    info: str
    text: str

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def bus(self) -> str:
        """The kind of bus that the block is about; empty: every one."""
        return self.info.partition(" ")[2]

    @property
    def command(self) -> str:
        """The command of an example: the line after `$ `, and those that belong to it."""
        lines = self.text.removeprefix("$ ").splitlines(keepends=True)
        return "".join(lines[: self._command_length(lines)])

    @property
    def plain_command(self) -> str:
        """The same in one line."""
        return " ".join(self.command.replace("\\\n", " ").split())

    @property
    def output(self) -> str:
        """The output of the example, as the page shows it."""
        lines = self.text.removeprefix("$ ").splitlines(keepends=True)
        return "".join(lines[self._command_length(lines) :])

    @staticmethod
    def _command_length(lines: list[str]) -> int:
        # A line goes on after a backslash, and in a quoted argument.
        quote = ""
        for count, line in enumerate(lines, 1):
            for char in line:
                if not quote and char in "'\"":
                    quote = char
                elif char == quote:
                    quote = ""
            if not quote and not line.endswith("\\\n"):
                return count
        raise AssertionError(f"the command does not end: {lines[0]!r}")


@dataclass(slots=True)
class Section:
    """A heading and what stands below it, up to the next heading of any level."""

    title: str
    level: int
    above: str = ""  # the title of the section that this one is a part of
    text: str = ""  # all of it, as it stands there
    tables: list[list[Row]] = field(default_factory=list)  # each with its head
    blocks: list[Block] = field(default_factory=list)

    @property
    def words(self) -> str:
        """The text with one space in place of each line break."""
        return " ".join(self.text.split())

    def table(self, *head: str) -> list[Row]:
        """Return the rows of the table whose head begins with these cells."""
        found = [table for table in self.tables if table[0][: len(head)] == head]
        assert len(found) == 1, f"{self.title}: {len(found)} tables {head}"
        return found[0][1:]

    def rows(self, *head: str) -> list[Row]:
        """Return the same; no rows if there is no such table."""
        return [row for table in self.tables if table[0][: len(head)] == head for row in table[1:]]


def read_sections(page: Path = PAGE) -> list[Section]:
    """Return all sections of a page, in order."""
    sections: list[Section] = []
    above: list[str] = []
    lines = iter(page.read_text().splitlines())
    in_table = False
    for line in lines:
        if line.startswith("#"):
            hashes, _, title = line.partition(" ")
            above[len(hashes) - 1 :] = [title]
            parent = above[-2] if len(hashes) > 1 else ""
            sections.append(Section(title=title, level=len(hashes), above=parent))
        elif line.startswith("```"):
            sections[-1].blocks.append(Block(line[3:], "".join(_fenced(lines))))
        else:
            sections[-1].text += line + "\n"
        if line.startswith("|"):
            if not in_table:
                sections[-1].tables.append([])
            cells = split_row(line)
            if not all(set(cell) == {"-"} for cell in cells):
                sections[-1].tables[-1].append(cells)
        in_table = line.startswith("|")
    return sections


def split_row(line: str) -> Row:
    """Return the cells of a row without the marks of code."""
    return tuple(cell.strip().replace("`", "") for cell in line.strip("|").split("|"))


def _fenced(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if line == "```":
            return
        yield line + "\n"


SECTIONS: Final = read_sections()
TITLE: Final = SECTIONS[0].title


def section(title: str, above: str = TITLE) -> Section:
    """Return a section of docs/dbus-api.md."""
    found = [one for one in SECTIONS if (one.title, one.above) == (title, above)]
    assert len(found) == 1, f"{len(found)} sections {title!r} in {above!r}"
    return found[0]


def method_section(interface: str, method: str) -> Section:
    return section(f"Method {method}", interface)


def keys(part: Section, argument: str) -> dict[str, str]:
    """Return the keys of a dictionary and their types."""
    return {row[0]: row[1] for row in part.table(f"key of {argument}", "type")}
