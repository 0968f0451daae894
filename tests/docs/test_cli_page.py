"""docs/cli.md has every command and option, and its commands and those of the README can be parsed."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, cast

import click
import pytest

from broker.api.policy import describe, parse_question
from broker.bus.values import Variant
from broker.cli.commands import cli
from policy.snaps.compiler import Compiler
from policy.snaps.explain import explain
from policy.snaps.installed import parse_world
from tests.helpers.snapworlds import library

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


def test_the_example_of_explain_is_answered_as_shown() -> None:
    example = PAGE.partition("\n## explain\n")[2].split("```")[1].lstrip()
    line, _, answer = example.replace("\\\n", " ").partition("\n")
    app, _, bus, name, path, interface, member, _, peer = shlex.split(line)[3:]
    (file,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    world = parse_world(tomllib.loads(file) | {"connections": []})
    said = {"direction": "send", "bus": bus, "name": name, "path": path}
    said |= {"interface": interface, "member": member, "peer": peer}
    question = parse_question({key: Variant("s", value) for key, value in said.items()})
    found = describe(explain(Compiler(library(), world), f"snap.{app}", question))
    assert answer.splitlines() == [
        f"denied: {found['reason'].value}",
        "each of these would allow the message, least privilege first:",
        *(f"  {one}" for one in cast("list[str]", found["suggestions"].value)),
    ]


def test_there_are_command_lines() -> None:
    assert len(LINES) > 25
