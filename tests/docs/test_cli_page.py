"""docs/cli.md has every command and option, and its commands and those of the README can be parsed."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import pytest

from broker.cli.commands import cli

PROJECT: Final = Path(__file__).parents[2]
PAGE: Final = (PROJECT / "docs" / "cli.md").read_text(encoding="utf-8")
CONTEXT: Final = click.Context(cli)
PROXY: Final = "proxy"  # has a parser of its own: docs/proxy.md
TABLE: Final = PAGE.partition("| --- |")[2].partition("\n\n")[0]


def walk(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name in group.list_commands(CONTEXT):
        command = group.get_command(CONTEXT, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from walk(command, *path, name)
        else:
            yield (*path, name), command


ALL: Final = dict(walk(cli))


def options(command: click.Command) -> set[str]:
    return {name for one in command.params if isinstance(one, click.Option) for name in one.opts}


def synopses() -> Iterator[str]:
    for row in TABLE.splitlines():
        yield from re.findall(r"`([^`]+)`", re.split(r"(?<!\\)\|", row)[1] if "|" in row else "")


def command_lines(text: str) -> Iterator[str]:
    """Yield the commands in blocks of code."""
    blocks = re.findall(r"```(?:sh)?\n(.*?)```|((?:^    .*\n)+)", text, re.DOTALL | re.MULTILINE)
    for block in blocks:
        for line in "".join(block).replace("\\\n", " ").splitlines():
            command = line.strip().removeprefix("$ ")
            if command.startswith("buswarden "):
                yield re.sub(r"\$\(.*?\)", "1", command)


LINES: Final = [
    line
    for page in ("README.md", "docs/cli.md")
    for line in command_lines((PROJECT / page).read_text(encoding="utf-8"))
]


def test_every_command_is_in_the_table() -> None:
    assert {synopsis.split()[0] for synopsis in synopses()} == {path[0] for path in ALL}


@pytest.mark.parametrize("synopsis", [one for one in synopses() if not one.startswith(PROXY)])
def test_options_of_the_table_are_those_of_the_command(synopsis: str) -> None:
    name = synopsis.split(maxsplit=1)[0]
    found = {option for path, one in ALL.items() if path[0] == name for option in options(one)}
    assert set(re.findall(r"--[a-z][\w-]*", synopsis)) <= found


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_option_is_on_the_page(path: tuple[str, ...]) -> None:
    for name in options(ALL[path]):
        assert re.search(rf"{name}\b", PAGE), name


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_can_be_parsed(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("snaps.toml", "metadata"):
        (tmp_path / name).touch()
    words = shlex.split(line, comments=True)[1:]
    if words[0] == PROXY:
        return
    context: click.Context = CONTEXT
    command: click.Command = cli
    while isinstance(command, click.Group):
        found = command.get_command(context, words.pop(0))
        assert found is not None, line
        command = found
    answer = PAGE.partition(f"$ {line}\n")[2].partition("\n")[0]
    if answer.startswith("buswarden: "):  # an example of an error
        with pytest.raises(click.UsageError) as caught:
            command.make_context(line, words, parent=CONTEXT)
        assert answer == f"buswarden: {caught.value.format_message()}"
    else:
        command.make_context(line, words, parent=CONTEXT)


def test_there_are_command_lines() -> None:
    assert len(LINES) > 25
