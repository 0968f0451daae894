"""Figures of the source that no test enforces: `.venv/bin/python -m tests.helpers.house_report [--files] [FOLDER...]`.

A number that a test demands is a number that people write up to. So these figures are printed for a reader:

- pronouns in 100 words of docstrings and comments, and the docstrings of one line;
- lines of files and of functions: the median, the 90th percentile and the longest;
- modules, packages, import levels and circles, and class names that stand for more than one class.
"""

import argparse
import ast
import io
import re
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

# Words that stand for a noun. Plain technical English has one to three of them in a hundred words.
PRONOUNS: Final = frozenset(
    [
        "it",
        "its",
        "itself",
        "they",
        "them",
        "their",
        "theirs",
        "themselves",
        "he",
        "him",
        "his",
        "she",
        "her",
        "one",
        "ones",
        "who",
        "whom",
        "whose",
        "what",
        "whatever",
        "whoever",
        "we",
        "us",
        "our",
        "ours",
    ]
)
_WORD: Final = re.compile(r"[A-Za-z']+")
_NO_PROSE: Final = re.compile(r"#\s*(noqa|type:|!)")

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Function = ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(text: str) -> list[str]:
    """Return all docstrings of a file."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, Documented)]
    return [found for node in nodes if (found := ast.get_docstring(node)) is not None]


def comments(text: str) -> Iterator[str]:
    """Yield the comments of a file, without those that are for linters."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not _NO_PROSE.match(token.string):
            yield token.string[1:]


def words_of(text: str) -> list[str]:
    """Return the words of docstrings and comments, in lower case."""
    prose = [*docstrings(text), *comments(text)]
    return [word.lower() for piece in prose for word in _WORD.findall(piece)]


def pronouns_in_100(words: Sequence[str]) -> float:
    """Return how many of a hundred words are pronouns."""
    return 100 * sum(word in PRONOUNS for word in words) / max(1, len(words))


def function_sizes(text: str) -> list[int]:
    """Return the lines of each function, docstring left out."""
    sizes = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Function):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            sizes.append((node.end_lineno or 0) - body[0].lineno + 1 if body else 0)
    return sizes


def class_names(text: str) -> list[str]:
    """Return the classes of a file, without Protocols."""
    return [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef)
        and not any("Protocol" in ast.unparse(b) for b in node.bases)
    ]


def imported_modules(text: str) -> set[str]:
    """Return the full names of all that a file imports: `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def import_graph(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """Return which of these modules each module imports, from the texts by full name."""
    return {
        module: (imported_modules(text) & texts.keys()) - {module} for module, text in texts.items()
    }


def inside(folder: str, graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the part of a graph that is about the modules of one folder, by the folder's name."""
    names = {name for name in graph if name.rpartition(".")[0] == folder}
    return {name: graph[name] & names for name in names}


def find_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle, in order; [] if there is none."""
    finished: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in finished:
            for name in sorted(graph[module]):
                if circle := search(name, [*path, module]):
                    return circle
            finished.add(module)
        return []

    return next((circle for module in sorted(graph) if (circle := search(module, []))), [])


def count_levels(graph: Mapping[str, set[str]]) -> int:
    """Return the length of the longest chain of imports. There must be no circle."""
    levels: dict[str, int] = {}

    def level(module: str) -> int:
        if module not in levels:
            levels[module] = 1 + max(map(level, graph[module]), default=0)
        return levels[module]

    return max(map(level, graph), default=0)


def _spread(sizes: Sequence[int]) -> str:
    ordered = sorted(sizes)
    return f"{statistics.median(ordered):g}, {ordered[len(ordered) * 9 // 10]}, {ordered[-1]}"


def _describe_imports(paths: Sequence[Path]) -> str:
    modules = [path for path in paths if path.name != "__init__.py"]
    graph = import_graph({".".join(one.with_suffix("").parts): one.read_text() for one in modules})
    if circle := find_circle(graph):
        return f"a circle: {' -> '.join(circle)}"
    folders = sorted({name.rpartition(".")[0] for name in graph})
    levels, most = max((count_levels(inside(one, graph)), one) for one in folders)
    return f"no circle; at most {levels} levels in a folder ({most})"


def describe(folder: Path) -> str:
    """Return the figures of a folder, in a few lines."""
    paths = sorted(folder.rglob("*.py"))
    packages = sum(path.name == "__init__.py" for path in paths)
    texts = [path.read_text() for path in paths]
    words = [word for text in texts for word in words_of(text)]
    docs = [found for text in texts for found in docstrings(text)]
    single = sum("\n" not in found for found in docs)
    names = Counter(name for text in texts for name in class_names(text))
    again = sorted(name for name, count in names.items() if count > 1 and name[0] != "_")
    return "\n".join(
        (
            f"{folder}: {len(paths) - packages} modules, {packages} packages, {len(words)} words",
            f"  imports                       {_describe_imports(paths)}",
            f"  pronouns in 100 words         {pronouns_in_100(words):.1f}",
            f"  docstrings of a single line   {100 * single // max(1, len(docs))} % of {len(docs)}",
            f"  lines of a file               {_spread([text.count(chr(10)) for text in texts])}",
            f"  lines of a function           {_spread([s for text in texts for s in function_sizes(text)])}",
            f"  class names used twice        {', '.join(again) or 'none'}",
        )
    )


def describe_files(folder: Path) -> str:
    """Return the pronouns of each file, the most first."""
    rows = []
    for path in sorted(folder.rglob("*.py")):
        words = words_of(path.read_text())
        rows.append((pronouns_in_100(words), len(words), path))
    return "\n".join(
        f"{share:5.1f} {count:5} {path}" for share, count, path in sorted(rows, reverse=True)
    )


def main() -> None:
    """Print the figures of the folders that are given, or of the whole source."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.helpers.house_report", description=__doc__
    )
    parser.add_argument("--files", action="store_true", help="the pronouns of each file")
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("broker"), Path("policy")])
    args = parser.parse_args()
    for folder in args.folders:
        sys.stdout.write((describe_files if args.files else describe)(folder) + "\n")


if __name__ == "__main__":
    main()
