"""Which harnesses there are, by name. A harness is a module with `check(data)` and `seeds()`."""

import ast
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CORPUS: Final = Path(__file__).parent / "corpus"
# What each one gets of the time, in shares; those with more state need more of it.
SHARES: Final = {
    "header": 2,
    "sasl": 1,
    "matchrule": 1,
    "body": 1,
    "signature": 1,
    "address": 1,
    "intake": 1,
    "rules": 1,
    "globs": 1,
    "usos": 1,
    "control": 1,
    "callers": 2,
    "gate": 4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Harness:
    """What holds an invariant against inputs."""

    name: str
    check: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]

    def corpus(self) -> list[Path]:
        """Return the inputs that are kept."""
        return sorted(path for path in (CORPUS / self.name).glob("*") if path.is_file())


def load(name: str) -> Harness:
    """Import a harness."""
    module = importlib.import_module(f"integration.fuzz.{name}")
    return Harness(name=name, check=module.check, seeds=module.seeds)


def invariant_of(name: str) -> str:
    """Return the first line of a harness."""
    text = (CORPUS.parent / f"{name}.py").read_text()
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
