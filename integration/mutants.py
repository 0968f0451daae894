"""Breaks the code on purpose and sees whether `tests/` notices: `make mutants ARGS="--count 20 --seed 7"`.

A mutant is one small change of one central module: a comparison turned round, a condition negated, a number one higher, a
call or an assignment left out. The sample is the same for the same seed and code. Each mutant is run in a copy of the
project against the tests beside its module, and if these pass, against all of `tests/`. A mutant that no test notices is
printed. The exit status is 1 if more than one in twenty lives.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

from integration.harness.processes import PROJECT

# The modules that the others rest on.
MODULES: Final = (
    "broker/gate/filter/access_change.py",
    "broker/gate/filter/bus_state.py",
    "broker/gate/filter/driver_calls.py",
    "broker/gate/filter/filter.py",
    "broker/gate/filter/from_app.py",
    "broker/gate/filter/from_bus.py",
    "broker/gate/filter/name_owners.py",
    "broker/gate/filter/pending_calls.py",
    "broker/gate/filter/receive_buffer.py",
    "broker/gate/filter/verdict_cache.py",
    "broker/gate/io/loop.py",
    "broker/gate/sandbox/connection.py",
    "broker/gate/sandbox/handshake.py",
    "broker/gate/sandbox/sandbox.py",
    "broker/supervisor/sandboxes/registry.py",
    "broker/wire/header.py",
    "broker/wire/sasl.py",
    "policy/globs.py",
    "policy/match.py",
    "policy/snaps/compiler.py",
)
# What a copy of the project does without: environments, caches, the history.
LEFT_OUT: Final = (".venv", ".git", ".cache", "*_cache", ".hypothesis", "__pycache__")
COUNT: Final = 100
MOST_ALIVE: Final = 0.05
TIMEOUT: Final = 600.0  # seconds: a mutant that hangs is noticed, too
_OTHER_WAY: Final[dict[type[ast.cmpop], str]] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Is: "is not",
    ast.IsNot: "is",
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change of a module: the place of a node's text, and the text that replaces it."""

    module: str
    line: int
    start: int  # characters, in the whole text
    end: int
    new: str

    def apply(self, text: str) -> str:
        """Return the text of the module with the change."""
        return text[: self.start] + self.new + text[self.end :]

    def describe(self, text: str) -> str:
        """Return where the change is, and the change, in one line."""
        old = " ".join(text[self.start : self.end].split())
        return f"{self.module}:{self.line}: {old[:60]} -> {self.new[:60]}"


def find_mutants(module: str, text: str) -> Iterator[Mutant]:
    """Yield all mutants of a module."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines = text.splitlines()

    def place(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    for node in _code_of(ast.parse(text)):
        if isinstance(node, ast.expr | ast.stmt) and (new := _change(node)) is not None:
            start = place(node.lineno, node.col_offset)
            end = place(node.end_lineno or node.lineno, node.end_col_offset or 0)
            yield Mutant(module, node.lineno, start, end, new)


def _change(node: ast.expr | ast.stmt) -> str | None:
    """Return what stands in the place of a node in a mutant; None: the node is left alone."""
    match node:
        case ast.Compare(ops=[op], left=left, comparators=[right]):
            new = f"({ast.unparse(left)} {_OTHER_WAY[type(op)]} {ast.unparse(right)})"
        case ast.BoolOp(op=op, values=values):
            other = " or " if isinstance(op, ast.And) else " and "
            new = f"({other.join(f'({ast.unparse(value)})' for value in values)})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            new = f"({ast.unparse(operand)})"
        case ast.Constant(value=bool(value)):
            new = str(not value)
        case ast.Constant(value=int(value)):
            new = str(value + 1)
        case ast.Expr(value=ast.Call()) | ast.Delete():
            new = "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            new = "pass"
        case _:
            return None
    return new


def _code_of(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes within functions: constants and tables of a module are data."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in function.body:
                for node in ast.walk(statement):
                    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                        yield node


def sample(count: int, seed: int) -> list[Mutant]:
    """Return so many mutants of all modules, in the order of the files."""
    every = {
        (one.module, one.start, one.end): one
        for module in MODULES
        for one in find_mutants(module, (PROJECT / module).read_text())
    }
    chosen = random.Random(seed).sample(sorted(every), min(count, len(every)))
    return [every[key] for key in sorted(chosen)]


def tests_beside(module: str) -> str:
    """Return the folder of the tests of a module. That of broker/ is tests/ itself."""
    return str(PurePath("tests", PurePath(module.removeprefix("broker/")).parent))


class Laboratory:
    """A copy of the project, in which one module at a time is another."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self._folder: Final = folder
        self._jobs: Final = jobs
        ignore = shutil.ignore_patterns(*LEFT_OUT)
        shutil.copytree(PROJECT, folder, ignore=ignore, dirs_exist_ok=True)

    def is_noticed(self, mutant: Mutant) -> bool:
        """Return whether a test fails, hangs or crashes with the mutant in place."""
        path = self._folder / mutant.module
        text = path.read_text()
        path.write_text(mutant.apply(text))
        try:
            return not (self._passes(tests_beside(mutant.module)) and self._passes("tests"))
        finally:
            path.write_text(text)

    def _passes(self, what: str) -> bool:
        argv = [sys.executable, "-m", "pytest", what, "-x", "-q", "-n", str(self._jobs)]
        argv += ["-p", "no:cacheprovider"]
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(self._folder)}
        try:
            done = subprocess.run(
                argv, cwd=self._folder, env=env, capture_output=True, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def run(mutants: Sequence[Mutant], jobs: int) -> list[Mutant]:
    """Try each mutant and return those that no test notices."""
    alive = []
    with tempfile.TemporaryDirectory(prefix="bw-mutants-") as name:
        laboratory = Laboratory(Path(name), jobs)
        for number, mutant in enumerate(mutants, 1):
            begun = time.monotonic()
            noticed = laboratory.is_noticed(mutant)
            what = mutant.describe((PROJECT / mutant.module).read_text())
            seconds = time.monotonic() - begun
            print(
                f"{number}/{len(mutants)} {'dies' if noticed else 'LIVES'} {seconds:.0f} s {what}",
                flush=True,
            )
            if not noticed:
                alive.append(mutant)
    return alive


def main() -> int:
    """Print each mutant and what became of it."""
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("--count", type=int, default=COUNT, help="so many mutants (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (%(default)s)")
    parser.add_argument("--only", metavar="MODULE", help="mutants of modules whose path has this")
    parser.add_argument("--jobs", type=int, default=(os.cpu_count() or 1) + 1)
    args = parser.parse_args()
    mutants = sample(args.count, args.seed)
    mutants = [one for one in mutants if not args.only or args.only in one.module]
    alive = run(mutants, args.jobs)
    print(f"mutants: {len(mutants) - len(alive)} of {len(mutants)} died")
    for mutant in alive:
        print(f"lives: {mutant.describe((PROJECT / mutant.module).read_text())}")
    return int(len(alive) > MOST_ALIVE * len(mutants))


if __name__ == "__main__":
    sys.exit(main())
