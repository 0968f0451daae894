"""What a command prints: JSON, tables, and the one line that says what went wrong."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import click

# Bus names and paths come from the broker, but types, apps and metadata from whoever added a
# sandbox: no control character of theirs may reach the terminal.
_UNPRINTABLE: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


def print_json(value: object) -> None:
    """Print it for programs; bytes become lists of numbers, as in busctl."""
    click.echo(json.dumps(value, indent=2, default=_plain))


def print_line(text: str) -> None:
    """Print one line for people."""
    click.echo(safe(text))


def print_error(text: str) -> None:
    """Print the one line that says what went wrong."""
    click.echo(f"buswarden: {' '.join(safe(line) for line in text.splitlines())}", err=True)


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Print one `key: value` a line, aligned."""
    width = max((len(key) for key in pairs), default=0) + 2
    for key, value in pairs.items():
        print_line(f"{key + ':':<{width}}{value}".rstrip())


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; without a terminal as wide as it needs to be."""
    # rich takes 60 ms to import: only who draws a table pays for it.
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # Text: brackets in a cell are not markup.
        table.add_row(*(Text(safe(cell)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=10_000)
    console.print(table, crop=False)


def safe(text: str) -> str:
    """Return the text with its control characters made visible."""
    return text.translate(_UNPRINTABLE)


def app_name(sandbox: Mapping[str, Any]) -> str:
    """Return TYPE/ID or TYPE/ID#COMPONENT of a sandbox as the broker describes it."""
    component = sandbox.get("component", "")
    return f"{sandbox['type']}/{sandbox['app']}" + (f"#{component}" if component else "")


def format_access(access: Sequence[Sequence[Any]]) -> list[str]:
    """Return each rule, deny or not and text, as a line."""
    return [f"{'deny' if deny else 'allow'} {text}" for deny, text in access]


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return list(value)
    raise TypeError(f"{type(value).__name__} in an answer")
