"""Walks through the code, counted: `python -m integration.walk [--show WALK]`.

What a reader has to follow is a number: how many calls of ours one message, one change of rules or one AddServer takes, in
how many files, and how often the next call is in another file. A profile hook in all three processes writes each call
into broker/ and policy/ down with its time, and the walks are cut out by their times. A coroutine that is resumed
counts as a call in each frame of its stack. Comprehensions and module code are not counted.
"""

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from integration.harness.buses import open_dbus_daemon
from integration.harness.processes import PROJECT
from integration.harness.rawclient import CallError, RawClient
from integration.harness.service import running_service
from integration.harness.supervised import Sandbox, Warden, open_warden

ECHO: Final = "org.example.Echo"
PATH: Final = "/org/example/Echo"
# Seconds after an action for what it sets off in other processes.
SETTLE: Final = 0.4

# Loaded by each Python process whose PYTHONPATH has the folder; it does nothing without the variable.
HOOK: Final = """
import os, sys, threading, time
folder, root = os.environ.get("BUSWARDEN_WALK"), os.environ.get("BUSWARDEN_WALK_ROOT", "")
if folder:
    fd = os.open(os.path.join(folder, str(os.getpid())), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    ours = tuple(os.path.join(root, name) + os.sep for name in ("broker", "policy"))
    names = {}
    def hook(frame, event, arg):
        if event != "call":
            return
        code = frame.f_code
        name = names.get(code)
        if name is None:
            is_ours = code.co_filename.startswith(ours) and (code.co_name[0] != "<" or code.co_name == "<lambda>")
            name = names[code] = f"{code.co_filename[len(root) + 1:]} {code.co_qualname}" if is_ours else ""
        if name:
            os.write(fd, f"{time.monotonic_ns()} {name}\\n".encode())
    threading.setprofile(hook)
    sys.setprofile(hook)
"""


@dataclass(frozen=True, slots=True)
class Walk:
    """The calls that one action took, by process: "gate", "supervisor" or "command"."""

    title: str
    calls: dict[str, list[tuple[str, str]]]  # (file, function), in order

    def cells(self) -> Iterator[str]:
        """Yield the row of the table."""
        columns: list[list[int]] = [
            [len(calls) for calls in self.calls.values()],
            [len(set(calls)) for calls in self.calls.values()],
            [len({file for file, _ in calls}) for calls in self.calls.values()],
            [count_changes(calls) for calls in self.calls.values()],
        ]
        yield self.title
        yield " / ".join(self.calls)
        for numbers in columns:
            yield " / ".join(map(str, numbers))


def count_changes(calls: list[tuple[str, str]]) -> int:
    """Return how often the next call is in another file."""
    return sum(one[0] != next_[0] for one, next_ in itertools.pairwise(calls))


class Tracer:
    """The files of the hook, and who wrote which."""

    def __init__(self, folder: Path, roles: dict[int, str]) -> None:
        self._folder: Final = folder
        self._roles: Final = roles

    def walk(self, title: str, action: Callable[[], object]) -> Walk:
        """Do something and return the calls that it took."""
        time.sleep(SETTLE)
        start = time.monotonic_ns()
        action()
        time.sleep(SETTLE)
        end = time.monotonic_ns()
        calls: dict[str, list[tuple[str, str]]] = {}
        for path in self._folder.iterdir():
            found = list(_read(path, start, end))
            if found:
                calls[self._roles.get(int(path.name), "command")] = found
        order = ("command", "supervisor", "gate")
        return Walk(title, {role: calls[role] for role in order if role in calls})


def _read(path: Path, start: int, end: int) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines():
        when, file, function = line.split(" ", 2)
        if start <= int(when) <= end:
            yield file, function


@contextmanager
def open_stage() -> Iterator[tuple[Tracer, Warden]]:
    """Start a bus, a service and the broker, with the hook in the broker's processes."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bw-walk-")))
        traces = folder / "traces"
        traces.mkdir()
        (folder / "hook").mkdir()
        (folder / "hook" / "sitecustomize.py").write_text(HOOK)
        bus = stack.enter_context(open_dbus_daemon(folder))
        stack.enter_context(running_service(bus.address))
        env = {
            "PYTHONPATH": str(folder / "hook"),
            "BUSWARDEN_WALK": str(traces),
            "BUSWARDEN_WALK_ROOT": str(PROJECT),
        }
        warden = stack.enter_context(open_warden(bus, folder / "run", env=env))
        yield Tracer(traces, {warden.process.pid: "supervisor", warden.gate_pid: "gate"}), warden


def take_walks(tracer: Tracer, warden: Warden) -> Iterator[Walk]:
    """Yield one walk after the other."""
    sandbox = warden.add_server(rules=(f"send:{ECHO}",))
    app = warden.connect(sandbox)
    _call(app)
    yield tracer.walk("first call and reply of a new header", lambda: _call(app, "Second"))
    yield tracer.walk("known call and reply", lambda: _call(app, "Second"))
    yield tracer.walk("refused call to an unknown name", lambda: _call(app, to="org.example.Other"))
    yield tracer.walk("AddMatch", lambda: app.add_match("type='signal',member='Changed'"))
    yield tracer.walk("new connection, Hello, one refused call", lambda: _connect(warden, sandbox))
    yield tracer.walk(
        "AddServer (buswarden add)",
        lambda: _command(warden, "add", "--type", "org.example", "--app", "a"),
    )
    yield tracer.walk(
        "change of rules (buswarden access)",
        lambda: _command(warden, "access", sandbox.id, "--allow", "send:org.example.Third"),
    )
    yield tracer.walk("end (buswarden stop)", lambda: _command(warden, "stop", sandbox.id))


def _call(app: RawClient, member: str = "Echo", *, to: str = ECHO) -> None:
    with contextlib.suppress(CallError):
        app.ask(to, PATH, ECHO, member, "s", ("hello",))


def _connect(warden: Warden, sandbox: Sandbox) -> None:
    _call(warden.connect(sandbox), to="org.example.Fourth")


def _command(warden: Warden, *argv: str) -> None:
    done = warden.cli(*argv)
    if not done.ok:
        raise SystemExit(f"buswarden {argv[0]}: {done.err.strip()}")


def main() -> None:
    """Print the table, and with `--show` one walk file by file."""
    parser = argparse.ArgumentParser(prog="python -m integration.walk", description=__doc__)
    parser.add_argument("--show", metavar="WALK", help="print a walk whose title begins so")
    args = parser.parse_args()
    with open_stage() as (tracer, warden):
        walks = list(take_walks(tracer, warden))
    headings = ("walk", "process", "calls", "functions", "files", "changes of file")
    rows = [headings, ("---",) * len(headings), *(tuple(walk.cells()) for walk in walks)]
    sys.stdout.write("".join(f"| {' | '.join(row)} |\n" for row in rows))
    for walk in walks:
        if args.show and walk.title.startswith(args.show):
            for role, calls in walk.calls.items():
                steps = [f"{file} {function}" for file, function in calls]
                sys.stdout.write(f"\n{role}\n" + "".join(f"  {step}\n" for step in steps))


if __name__ == "__main__":
    main()
