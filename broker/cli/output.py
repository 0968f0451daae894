"""Output of the commands: JSON, tables, and one line for an error."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import click

# Bus names and paths come from the broker, but types, apps and metadata come from the creator of a
# sandbox. No control character of a creator may reach the terminal.
_UNPRINTABLE: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


def print_json(value: object) -> None:
    """Print a value for programs. Bytes become lists of numbers, as in busctl."""
    click.echo(json.dumps(value, indent=2, default=_plain))


def print_line(text: str) -> None:
    """Print one line for people."""
    click.echo(safe(text))


def print_error(text: str) -> None:
    """Print an error on standard error, as one line."""
    click.echo(f"buswarden: {' '.join(safe(line) for line in text.splitlines())}", err=True)


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Print each pair as a line `key: value`, aligned."""
    width = max((len(key) for key in pairs), default=0) + 2
    for key, value in pairs.items():
        print_line(f"{key + ':':<{width}}{value}".rstrip())


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. Without a terminal the width is not limited."""
    # The import of rich takes 60 ms, so only a command that draws a table waits for rich.
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # As Text, because rich takes brackets in a str for markup.
        table.add_row(*(Text(safe(cell)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=10_000)
    console.print(table, crop=False)


def safe(text: str) -> str:
    """Return the text with control characters made visible."""
    return text.translate(_UNPRINTABLE)


def app_name(sandbox: Mapping[str, Any]) -> str:
    """Return TYPE/ID or TYPE/ID#COMPONENT from the broker's facts about a sandbox."""
    component = sandbox.get("component", "")
    return f"{sandbox['type']}/{sandbox['app']}" + (f"#{component}" if component else "")


def format_access(access: Sequence[Sequence[Any]]) -> list[str]:
    """Return a line for each rule, which is a pair of (deny, text)."""
    return [f"{'deny' if deny else 'allow'} {text}" for deny, text in access]


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return list(value)
    raise TypeError(f"{type(value).__name__} in an answer")
