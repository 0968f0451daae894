"""Every example of docs/dbus-api.md does on a real bus what the page says.

The examples of one interface are one session with a new broker, in the order of the page. Those that run until
they are interrupted (`gdbus monitor`, and the program for the signal Denied) are started before the others,
and what they printed is looked at in the end.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from integration.harness.buses import Bus
from integration.harness.clients import run
from integration.harness.processes import PYTHON, running, wait_until
from integration.harness.supervised import Sandbox, Warden, open_warden, wait_for
from tests.helpers.dbus_page import SECTIONS, Block

ANY: Final = "..."
TITLES: Final = [one.title for one in SECTIONS if one.level == 2]
EXAMPLES: Final = {
    title: [
        block
        for one in SECTIONS
        if title in (one.title, one.above)
        for block in one.blocks
        if block.language in {"console", "python", "text"}
    ]
    for title in TITLES
}


def squeeze(text: str) -> str:
    """Return a text with one space in place of each line break and its indentation."""
    return " ".join(text.split())


def matches(wanted: str, printed: str) -> bool:
    """Say whether a program printed what the page has: `...` stands for any text."""
    pattern = ".*".join(map(re.escape, squeeze(wanted).split(ANY)))
    return re.fullmatch(pattern, squeeze(printed)) is not None


def has_lines(wanted: str, printed: str) -> bool:
    """Say whether a program printed these lines, perhaps with others between them. Further lines of one are indented."""
    lines = re.split(r"\n(?! )", wanted.strip())
    return matches(ANY.join(["", *lines, ""]), printed)


@dataclass(slots=True)
class Session:
    """A broker, a shell, and an app in the sandbox c0 once there is one."""

    warden: Warden
    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    _background: list[tuple[str, Path]] = field(
        default_factory=list
    )  # what is to be printed, and where it is

    @property
    def env(self) -> Mapping[str, str]:
        return {
            "DBUS_SESSION_BUS_ADDRESS": self.warden.bus.address,
            "XDG_RUNTIME_DIR": str(self.warden.runtime),
            "HOME": str(self.warden.runtime),
            "PATH": f"{Path(PYTHON).parent}:/usr/local/bin:/usr/bin:/bin",
            **self.variables,
        }

    def start(self, stack: ExitStack, argv: list[str], wanted: str, ready: str) -> None:
        """Start a program that goes on until it is ended, and wait for a line that says that it is ready."""
        log = self.folder / f"background-{len(self._background)}"
        shell = ["sh", "-c", 'exec "$@" >&2', "sh", *argv]  # standard error goes to a file
        stack.enter_context(running(shell, env=self.env, log=log))
        self._background.append((wanted, log))
        wait_for(lambda: ready in log.read_text(), timeout=20)

    def do(self, example: Block) -> None:
        """Run an example, and compare."""
        done = run("bash", "-c", example.command, env=dict(self.env), timeout=120)
        printed = done.out + done.err
        assert matches(example.output, printed), f"{example.command}\nprinted\n{printed}"
        self._enter()

    def check_background(self) -> None:
        """Wait until those in the background have printed what they are to print."""
        for wanted, log in self._background:
            if not wait_until(partial(_has_printed, log, wanted)):
                raise AssertionError(f"wanted\n{wanted}\nprinted\n{log.read_text()}")

    def _enter(self) -> None:
        """Start an app in sandbox c0, as soon as the sandbox exists."""
        if "APP" in self.variables:
            return
        for shown in self.warden.list_sandboxes():
            if shown["id"] == "c0":
                path, address = shown["sockets"]["session"], shown["addresses"]["session"]
                sandbox = Sandbox(path=shown["path"], socket=Path(path), address=address)
                app = self.warden.connect(sandbox)
                self.variables |= {"ADDRESS": address, "APP": app.unique_name}


def _has_printed(log: Path, wanted: str) -> bool:
    return has_lines(wanted, log.read_text())


@contextmanager
def open_session(bus: Bus, folder: Path) -> Iterator[Session]:
    with open_warden(bus, folder / "run") as warden:
        yield Session(warden, folder)


def test_examples_are_found() -> None:
    with_examples = {title: len(blocks) for title, blocks in EXAMPLES.items() if blocks}
    assert list(with_examples) == [
        "org.freedesktop.DBus.Containers1",
        "org.buswarden.Broker1",
        "org.buswarden.Broker1.Policy",
        "Standard interfaces",
    ]
    assert sum(with_examples.values()) > 35


@pytest.mark.parametrize("title", [title for title in TITLES if EXAMPLES[title]])
def test_examples_do_as_the_page_says(bus: Bus, folder: Path, title: str) -> None:
    examples = [one for one in EXAMPLES[title] if one.bus in {"", bus.kind}]
    with open_session(bus, folder) as session, ExitStack() as stack:
        for index, example in enumerate(examples):
            if example.language == "python":
                program = folder / "example.py"
                program.write_text(example.text)
                (printed, *_) = [one for one in examples[index:] if one.language == "text"]
                session.start(stack, [sys.executable, str(program)], printed.text, "subscribed")
            elif example.plain_command.startswith("gdbus monitor"):
                argv = ["bash", "-c", f"exec {example.command}"]
                session.start(stack, argv, example.output, " is owned by ")
        for example in examples:
            if example.language == "console" and "gdbus monitor" not in example.command:
                session.do(example)
        session.check_background()
