"""Pages name only files and modules that exist, and keep to 100 columns."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

PROJECT: Final = Path(__file__).parents[2]
PAGES: Final = sorted(
    [
        PROJECT / "README.md",
        PROJECT / "CHANGELOG.md",
        *(PROJECT / "docs").glob("*.md"),
        *(PROJECT / "docs" / "decisions").glob("*.md"),
    ]
)
WIDTH: Final = 100
# Folders of the repository. A path in one of them is checked; any other path is of a machine.
FOLDERS: Final = ("broker", "policy", "tests", "integration", "docs", ".ci")
FILES: Final = [
    f"/{path.relative_to(PROJECT).as_posix()}"
    for folder in FOLDERS
    for path in (PROJECT / folder).rglob("*.py")
]
SOURCES: Final = [
    path.read_text(encoding="utf-8")
    for folder in ("broker", "policy")
    for path in (PROJECT / folder).rglob("*.py")
]
TESTS: Final = [
    name
    for folder in ("tests", "integration")
    for path in (PROJECT / folder).rglob("test_*.py")
    for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
]
each_page: Final = pytest.mark.parametrize(
    "page", PAGES, ids=[path.relative_to(PROJECT).as_posix() for path in PAGES]
)


def code_spans(text: str) -> Iterator[str]:
    """Yield what stands between back quotes, outside of blocks of code."""
    for _, line in prose(text):
        yield from re.findall(r"`([^`]+)`", line)


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines outside of blocks of code, with their numbers."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield number, line


def too_long(text: str) -> list[int]:
    """Return the numbers of long lines that are no table and no single long word."""
    return [
        number
        for number, line in prose(text)
        if len(line) > WIDTH and line[0] != "|" and " " in line.strip(" -")
    ]


def modules(text: str) -> set[str]:
    """Return the dotted names of modules, and of what they contain."""
    spans = " ".join(code_spans(text))
    return set(re.findall(r"(?<![\w./@:-])(?:broker|policy|integration)(?:\.\w+)+", spans))


def exists(name: str) -> bool:
    """Tell if a dotted name is a module or a package, or is in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = PROJECT.joinpath(*parts[:length])
        if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
            found: object = importlib.import_module(".".join(parts[:length]))
            for part in parts[length:]:
                if not hasattr(found, part):
                    return False
                found = getattr(found, part)
            return True
    return False


@each_page
def test_a_page_keeps_to_its_width(page: Path) -> None:
    assert not too_long(page.read_text(encoding="utf-8"))


@each_page
def test_paths_that_are_named_exist(page: Path) -> None:
    for span in code_spans(page.read_text(encoding="utf-8")):
        for path in re.findall(rf"(?<![\w./~*-])(?:{'|'.join(FOLDERS)})/[\w./*-]*", span):
            if not re.search(r"[A-Z]{4,}", path):  # a name to be filled in
                assert list(PROJECT.glob(path.rstrip("/."))), path


@each_page
def test_files_without_a_folder_are_somewhere(page: Path) -> None:
    for span in code_spans(page.read_text(encoding="utf-8")):
        if re.fullmatch(r"[\w/]+\.py", span):  # `_name.py`: the end of a name, after a whole one
            end = span if span.startswith("_") else f"/{span}"
            assert any(path.endswith(end) for path in FILES), span


@each_page
def test_tests_that_are_named_exist(page: Path) -> None:
    for span in code_spans(page.read_text(encoding="utf-8")):
        if re.fullmatch(r"test_\w+\*?", span):  # `*` stands for the rest of a name
            begin = span.rstrip("*")
            assert any(name == span or (begin != span and name.startswith(begin)) for name in TESTS)


@each_page
def test_modules_and_classes_that_are_named_exist(page: Path) -> None:
    for name in modules(page.read_text(encoding="utf-8")):
        assert exists(name), name


@each_page
def test_members_of_classes_that_are_named_exist(page: Path) -> None:
    for span in code_spans(page.read_text(encoding="utf-8")):
        if found := re.fullmatch(r"([A-Z]\w*[a-z]\w*)\.([a-z]\w*)(?:\(.*\))?", span):
            owner, member = found.groups()
            defined = [
                text for text in SOURCES if re.search(rf"^class {owner}\b", text, re.MULTILINE)
            ]
            assert any(re.search(rf"\b{member}\b", text) for text in defined), span


@each_page
def test_lists_are_counted_from_one(page: Path) -> None:
    # A number that a break of a line puts first would begin a list.
    last = 0
    for number, line in prose(page.read_text(encoding="utf-8")):
        if line.startswith("#"):
            last = 0
        elif found := re.match(r" *([0-9]+)\. ", line):
            assert int(found[1]) in {1, last + 1}, number
            last = int(found[1])


@each_page
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    text = "\n".join(line for _, line in prose(page.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)|^\[\w+\]: (\S+)$", text, re.MULTILINE):
        link = "".join(target)
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), link
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), link


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings."""
    titles = [line.lstrip("#").strip() for _, line in prose(text) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a " * 51, [1]),
        ("| " + "a " * 51, []),
        ("```\n" + "a " * 51 + "\n```\n\n" + "b " * 51, [5]),
        ("- " + "a" * 120, []),
    ],
)
def test_long_lines_are_found(text: str, found: list[int]) -> None:
    assert too_long(text) == found


def test_names_that_do_not_exist_are_found() -> None:
    assert exists("policy.match.Judge") == exists("broker.gate.filter")
    assert not exists("broker.gate.filter.nothing")
    assert not exists("policy.match.Nothing")
    assert modules("`broker.wire.sasl` and `org.broker.wire`") == {"broker.wire.sasl"}
