r"""Regular expressions mean the same to every supported Python, and those of the AppArmor importer what they say.

The first half reads every expression of the source text and refuses what versions of Python differ in: possessive
repeats (wrong over groups before 3.11.5), groups that are kept within atomic ones (wrong before 3.13), what asks
the tables of Unicode (`\w`, `\b`, IGNORECASE on text), and what is to change its meaning (a FutureWarning). The
second half compares expressions with plain code on all short texts.
"""

import ast
import importlib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from broker.wire.names import is_object_path
from policy.importers import apparmor_dbus, apparmor_lexer
from tests.test_house_rules import SOURCES, name_of

# The standard library's own reader of expressions; 3.11 to 3.13 have the same.
PARSER: Final[Any] = importlib.import_module("re._parser")
FUNCTIONS: Final = frozenset(
    {"compile", "findall", "finditer", "fullmatch", "match", "search", "split", "sub", "subn"}
)


class Expression(NamedTuple):
    """A regular expression of the source text."""

    line: int
    text: str | bytes
    flags: int


# -- what versions differ in ---------------------------------------------------------------------------


def nodes(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the arguments of each node of a parsed expression."""
    for op, arguments in tree.data:
        yield str(op), arguments
        if str(op) == "IN":
            yield from ((str(inner), values) for inner, values in arguments)
        else:
            for inner in inner_trees(arguments):
                yield from nodes(inner)


def inner_trees(arguments: Any) -> Iterator[Any]:
    if hasattr(arguments, "data"):
        yield arguments
    elif isinstance(arguments, list | tuple):
        for argument in arguments:
            yield from inner_trees(argument)


def doubts(text: str | bytes, flags: int = 0) -> set[str]:
    """Return what versions of Python may read differently in an expression."""
    tree = PARSER.parse(text, flags)
    asks_unicode = isinstance(text, str) and not tree.state.flags & re.ASCII
    found = {"IGNORECASE"} if asks_unicode and tree.state.flags & re.IGNORECASE else set()
    for op, arguments in nodes(tree):
        if op == "POSSESSIVE_REPEAT":
            found.add("possessive repeat")
        elif op == "ATOMIC_GROUP":
            inside = nodes(arguments)
            if any(name == "SUBPATTERN" and values[0] is not None for name, values in inside):
                found.add("a group that is kept within an atomic one")
        elif op == "SUBPATTERN" and arguments[1] & re.IGNORECASE:
            found.add("IGNORECASE")
        elif asks_unicode and (op == "CATEGORY" or (op == "AT" and "BOUNDARY" in str(arguments))):
            found.add(str(arguments))
    return found


@pytest.mark.parametrize(
    ("text", "flags", "doubt"),
    [
        ("(?:ab?c)?+", 0, "possessive repeat"),
        ("x(?:y|[ab]*+)", 0, "possessive repeat"),
        ("(?=a++)", 0, "possessive repeat"),
        ("(?>(a)b)", 0, "a group that is kept within an atomic one"),
        (r"[^\w@]", 0, "CATEGORY_WORD"),
        (r"(a|\d)", 0, "CATEGORY_DIGIT"),
        (r"\bx", 0, "AT_BOUNDARY"),
        ("x", re.IGNORECASE, "IGNORECASE"),
        ("(?i)x", 0, "IGNORECASE"),
        ("a(?i:x)", 0, "IGNORECASE"),
        (r"(?>(?:a|b)+)c*?", 0, None),
        (r"\w\b", re.ASCII | re.IGNORECASE, None),
        (rb"(?i)\w\b", 0, None),
    ],
)
def test_what_versions_differ_in_is_found(text: str, flags: int, doubt: str | None) -> None:
    assert doubts(text, flags) == ({doubt} if doubt else set())


def test_what_is_to_change_its_meaning_is_found() -> None:
    with pytest.warns(FutureWarning, match="nested set"):
        doubts("[[a]")


# -- the expressions of the source text ----------------------------------------------------------------


def value_of(node: ast.expr, names: dict[str, Any]) -> Any:
    """Return what an expression of the source comes to; text that only the running program knows is an `x`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return value_of(node.left, names) + value_of(node.right, names)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(value_of(part, names)) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        node = node.value
    try:
        return eval(compile(ast.Expression(node), "source", "eval"), names)
    except NameError:
        return "x"


def expressions(path: Path) -> list[Expression]:
    """Return all expressions that a module gives to `re`."""
    names = vars(importlib.import_module(name_of(path)))
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        module = node.func.value
        if isinstance(module, ast.Name) and module.id == "re" and node.func.attr in FUNCTIONS:
            by_name = [key.value for key in node.keywords if key.arg == "flags"]
            by_place = node.args[1:2] if node.func.attr == "compile" else []
            flags = [int(value_of(one, names)) for one in (*by_name, *by_place)]
            found.append(Expression(node.lineno, value_of(node.args[0], names), sum(flags)))
    return found


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if "re." in path.read_text()], ids=name_of
)
def test_expressions_are_read_alike_by_every_version(path: Path) -> None:
    for line, text, flags in expressions(path):
        assert not doubts(text, flags), f"line {line}: {text!r}"
        assert text != "x", f"line {line}: what is given to re cannot be looked at"


def test_no_module_takes_functions_out_of_re() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.module == "re"), path
            if isinstance(node, ast.Import):
                assert all(alias.asname is None for alias in node.names if alias.name == "re"), path


# -- the AppArmor importer's, on all short texts ---------------------------------------------------------

BLANK: Final = " \t\r\n"


def run_of(text: str, at: int, takes: Callable[[str], bool]) -> int:
    while at < len(text) and takes(text[at]):
        at += 1
    return at


def word_end(text: str, at: int, not_in: str = '"!', *, escapes: bool = True) -> int:
    """Return where a word ends that may go on at `at`."""
    while at < len(text):
        if text[at] == ",":
            if at + 1 == len(text) or text[at + 1] in f'{BLANK}"!,':
                return at
        elif text[at] == "\\":
            if not escapes or at + 1 == len(text):
                return at
            at += 1
        elif text[at] in BLANK or text[at] in not_in:
            return at
        at += 1
    return at


def word(text: str) -> int:
    return word_end(text, 0)


def peer_word(text: str) -> int:
    at = 0
    while at < len(text) and text[at] not in f'{BLANK}"!,()':
        if text[at] == "\\":
            if at + 1 == len(text):
                return at
            at += 1
        at += 1
    return at


def quoted(text: str) -> int:
    if text[:1] != '"':
        return 0
    at = 1
    while at < len(text):
        if text[at] == '"':
            return at + 1
        at += 2 if text[at] == "\\" else 1
    return 0


def comment_end(text: str, at: int) -> int:
    return run_of(text, at, lambda char: char != "\n")


def blanks(text: str) -> int:
    at = 0
    while at < len(text):
        if text[at] in BLANK:
            at += 1
        elif text[at] == "#" and not text.startswith(
            ("#include ", "#include\t", "#include<", '#include"'), at
        ):
            at = comment_end(text, at)
        else:
            return at
    return at


def gap(text: str) -> int:
    at = 0
    while at < len(text):
        if text[at] in f"{BLANK},":
            at += 1
        elif text[at] == "#":
            at = comment_end(text, at)
        else:
            return at
    return at


def plain_rule(text: str) -> int:
    if text[:1] != "/":
        return 0
    path = run_of(text, 1, lambda char: char not in f'{BLANK}"!,\\#{{}}[]@()')
    space = run_of(text, path, lambda char: char in " \t")
    access = run_of(text, space, lambda char: char in "rwaklmixPpCcUu")
    end = run_of(text, access, lambda char: char in " \t")
    is_whole = path < space < access and text[end : end + 1] == ","
    return end + 1 if is_whole else 0


def other(text: str) -> tuple[str | None, int]:  # noqa: PLR0911 - one a kind
    first = text[:1]
    if not first:
        return None, 0
    if first in BLANK:
        return "blank", run_of(text, 0, lambda char: char in BLANK)
    if first == "#":
        return "blank", comment_end(text, 0)
    if end := quoted(text):
        return "quoted", end
    if first in ",{}(":
        return {",": "end", "(": "open"}.get(first, "brace"), 1
    if first == "=":
        end = run_of(text, 1, lambda char: char in " \t")
        begins_word = end < len(text) and text[end] not in f'({BLANK}"!,\\'
        return "word", word_end(text, end + 1) if begins_word else end
    if first in "/@&:^":
        return "word", word_end(text, 1)
    if first in '"!\\)':
        return "wrong", 1
    return "word", word_end(text, 1, '"!()=', escapes=False)


def in_parentheses(text: str) -> tuple[str | None, int]:
    if text[:1] in ("(", ")"):
        return "open" if text[0] == "(" else "close", 1
    if end := quoted(text):
        return "skip", end
    end = run_of(text, 0, lambda char: char not in '()"')
    return ("skip" if end else None), end


ALONE: Final = {
    "BLANKS": (apparmor_lexer.BLANKS, blanks, ("a", " ", "\n", "#", "#include ", "#include<")),
    "QUOTED": (apparmor_lexer.QUOTED, quoted, ("a", " ", '"', "\\", "\n")),
    "WORD": (apparmor_lexer.WORD, word, ("a", ",", " ", '"', "\\", "!", "\n")),
    "PEER_WORD": (apparmor_lexer.PEER_WORD, peer_word, ("a", ",", " ", "(", "\\", "\n")),
    "PLAIN_RULE": (apparmor_lexer.PLAIN_RULE, plain_rule, ("/", "r", " ", ",", "#", "m x")),
    "GAP": (apparmor_dbus._GAP, gap, ("a", ",", " ", "\n", "#")),
}
KINDS: Final = {
    "OTHER": (
        apparmor_lexer.OTHER,
        other,
        ("a", "/", ",", " ", "=", '"', "\\", "(", "#", "{"),
    ),
    "IN_PARENTHESES": (apparmor_lexer.IN_PARENTHESES, in_parentheses, ("a", "(", ")", '"', "\\")),
}


def short_texts(alphabet: tuple[str, ...], longest: int) -> Iterator[str]:
    for length in range(longest + 1):
        for parts in itertools.product(alphabet, repeat=length):
            yield "".join(parts)


@pytest.mark.parametrize("name", ALONE)
def test_expression_takes_what_plain_code_takes(name: str) -> None:
    expression, plain, alphabet = ALONE[name]
    for text in short_texts(alphabet, 6):
        found = expression.match(text)
        assert (found.end() if found is not None else 0) == plain(text), repr(text)


@pytest.mark.parametrize("name", KINDS)
def test_expression_says_what_kind_plain_code_says(name: str) -> None:
    expression, plain, alphabet = KINDS[name]
    for text in short_texts(alphabet, 5 if len(alphabet) < 10 else 4):
        found = expression.match(text)
        said = (found.lastgroup, found.end()) if found is not None else (None, 0)
        assert said == plain(text), repr(text)


def test_object_path_is_what_the_specification_says() -> None:
    for text in short_texts(("/", "a", "_", "9", "-", "\n"), 6):
        elements = text[1:].split("/")
        is_path = text == "/" or (
            text[:1] == "/"
            and all(element.replace("9", "_").isidentifier() for element in elements)
        )
        assert is_object_path(text) == is_path, repr(text)
