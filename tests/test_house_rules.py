"""The layers and sizes that docs/design.md promises, checked on the source text."""

import ast
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

from tests.helpers.house_report import (
    class_names,
    count_levels,
    docstrings,
    find_circle,
    import_graph,
    imported_modules,
    inside,
)

PROJECT: Final = Path(__file__).resolve().parent.parent
PACKAGES: Final = ("broker", "policy")
SOURCES: Final = sorted(path for name in PACKAGES for path in (PROJECT / name).rglob("*.py"))
TESTS: Final = sorted(
    path for name in ("integration", "tests") for path in (PROJECT / name).rglob("*.py")
)
MAX_LINES: Final = 600
MAX_FUNCTION_LINES: Final = 50  # docstring and comments left out
MAX_LEVELS: Final = 7  # of modules of one package that import each other

# Whatever is in one of these may import what stands behind it, and itself; the first match counts.
# The arrows: cli, api -> supervisor -> engines -> (bus | control protocol); gate -> control protocol, wire, policy.
MAY_IMPORT: Final = {
    "policy": {"policy"},
    "broker.wire": {"broker.wire"},
    "broker.systemd": {"broker.systemd"},
    "broker.posix": {"broker.posix"},
    "broker.control_protocol": {
        "broker.control_protocol",
        "broker.posix",
        "broker.wire",
        "policy",
    },
    "broker.gate.filter": {
        "broker.gate.filter",
        "broker.gate.dumps",
        "broker.gate.output",
        "broker.control_protocol.messages",
        "broker.wire",
        "policy",
    },
    "broker.gate": {
        "broker.gate",
        "broker.control_protocol",
        "broker.posix",
        "broker.systemd.notify",
        "broker.wire",
        "policy",
    },
    "broker.proxy": {
        "broker.proxy",
        "broker.gate",
        "broker.control_protocol",
        "broker.posix",
        "broker.wire",
        "policy",
    },
    "broker.bus": {"broker.bus", "broker.posix", "broker.wire"},
    "broker.engines": {
        "broker.engines",
        "broker.bus",
        "broker.control_protocol",
        "broker.posix",
        "broker.wire",
        "policy",
    },
    "broker.launcher": {"broker.launcher", "broker.wire", "policy"},
    "broker.daemon": {"broker", "policy"},  # puts the processes' parts together
    "broker.supervisor": {
        "broker.supervisor",
        "broker.engines",
        "broker.bus",
        "broker.control_protocol",
        "broker.posix",
        "broker.wire",
        "policy",
    },
    "broker.api": {
        "broker.api",
        "broker.supervisor",
        "broker.engines",
        "broker.bus",
        "broker.control_protocol",
        "broker.posix",
        "broker.wire",
        "policy",
    },
}

# First words of a docstring that stand in for a noun or a verb.
NAMELESS: Final = re.compile(
    r"(It|Its|They|There|This|That|These|Those|One|None|What|Whatever|Which|Who|Whoever|Whom|Whether|How"
    r"|Somebody|Something|Anybody|Everybody|Nobody|Nothing|Be|Have|Know|Go on|See to)\b"
)

# Modules that only compute: they touch no file, socket, clock or log.
PURE: Final = [
    path
    for path in SOURCES
    if path.is_relative_to(PROJECT / "policy")
    or path.is_relative_to(PROJECT / "broker" / "wire")
    or path.is_relative_to(PROJECT / "broker" / "gate" / "filter")
    or path.relative_to(PROJECT).as_posix()
    in {
        "broker/engines/containers1_dialect.py",
        "broker/control_protocol/framing.py",
        "broker/control_protocol/messages.py",
        "broker/gate/dumps.py",
        "broker/gate/event_journal.py",
        "broker/gate/output.py",
        "broker/proxy/arguments.py",
        "broker/proxy/judge.py",
        "broker/proxy/passthrough.py",
        "broker/launcher/mounts.py",
        "broker/launcher/plan.py",
        "broker/launcher/seccomp.py",
        "broker/supervisor/sandboxes/lifecycle.py",
        "broker/supervisor/sandboxes/registry.py",
    }
]
NEEDS_THE_WORLD: Final = {
    "asyncio",
    "logging",
    "os",
    "pathlib.Path",  # PurePath only computes
    "random",
    "select",
    "selectors",
    "signal",
    "socket",
    "sqlite3",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "trio",
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


def top_level(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def wrong_imports(path: Path) -> set[str]:
    """Return what a file imports of ours against the arrows."""
    layer = next((layer for layer in MAY_IMPORT if is_within(name_of(path), layer)), None)
    if layer is None:
        return set()
    allowed = MAY_IMPORT[layer]
    return {
        module
        for module in imported_modules(path.read_text())
        if any(is_within(module, package) for package in PACKAGES)
        and not any(is_within(module, other) for other in allowed)
        # `from broker import control_protocol` names the package, too: what it takes of it is judged.
        and not any(is_within(other, module) for other in allowed)
    }


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_follow_the_arrows(path: Path) -> None:
    assert not wrong_imports(path)


# Imports under TYPE_CHECKING count as all others do. The files of packages are empty, and left out.
GRAPH: Final = import_graph(
    {name_of(path): path.read_text() for path in SOURCES if path.name != "__init__.py"}
)
FOLDERS: Final = sorted({module.rpartition(".")[0] for module in GRAPH if "." in module})


def test_no_modules_import_each_other() -> None:
    assert not find_circle(GRAPH)


@pytest.mark.parametrize("folder", FOLDERS)
def test_package_has_few_levels(folder: str) -> None:
    assert count_levels(inside(folder, GRAPH)) <= MAX_LEVELS


@pytest.mark.parametrize("folder", FOLDERS)
def test_packages_of_one_folder_do_not_import_each_other(folder: str) -> None:
    graph: dict[str, set[str]] = {}
    depth = folder.count(".") + 1
    for name, imports in GRAPH.items():
        parts = name.split(".")
        if is_within(name, folder) and len(parts) > depth + 1:
            others = {".".join(other.split(".")[: depth + 1]) for other in imports}
            graph.setdefault(".".join(parts[: depth + 1]), set()).update(others)
    siblings = {
        name: {one for one in imports if one in graph} - {name} for name, imports in graph.items()
    }
    assert not find_circle(siblings)


def test_a_circle_and_a_chain_are_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert not find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    assert count_levels({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == 3


def test_a_class_name_stands_for_one_class() -> None:
    paths = [path for path in SOURCES if is_within(name_of(path), "broker")]
    names = Counter(name for path in paths for name in class_names(path.read_text()))
    assert not {name for name, count in names.items() if count > 1}


@pytest.mark.parametrize("path", PURE, ids=name_of)
def test_pure_module_does_no_io(path: Path) -> None:
    imported = imported_modules(path.read_text())
    assert not {module for module in NEEDS_THE_WORLD if any(is_within(i, module) for i in imported)}


@pytest.mark.parametrize(
    "path", [p for p in PURE if is_within(name_of(p), "broker.gate")], ids=name_of
)
def test_pure_module_of_the_gate_imports_pure_ones_alone(path: Path) -> None:
    ours = GRAPH.get(name_of(path), set())
    assert ours <= {name_of(pure) for pure in PURE}


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in SOURCES
        if is_within(name_of(p), "broker.gate") or is_within(name_of(p), "broker.proxy")
    ],
    ids=name_of,
)
def test_gate_stays_lean(path: Path) -> None:
    # One gate a session, and its memory is measured: msgspec and the standard library, no event
    # loop but its own on epoll (docs/decisions/0001).
    outside = (
        top_level(imported_modules(path.read_text())) - set(sys.stdlib_module_names) - set(PACKAGES)
    )
    assert outside <= {"msgspec"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_the_bus_bridge_knows_asyncio(path: Path) -> None:
    if not is_within(name_of(path), "broker.bus"):
        assert not top_level(imported_modules(path.read_text())) & {
            "asyncio",
            "trio_asyncio",
            "dbus_next",
        }


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name_of)
def test_file_is_not_too_long(path: Path) -> None:
    assert path.read_text().count("\n") <= MAX_LINES


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_are_not_too_long(path: Path) -> None:
    lines = path.read_text().splitlines()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            code = lines[body[0].lineno - 1 : node.end_lineno] if body else []
            written = [line for line in code if line.strip() and not line.lstrip().startswith("#")]
            assert len(written) <= MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_docstrings_name_their_subject(path: Path) -> None:
    assert not [text for text in docstrings(path.read_text()) if NAMELESS.match(text)]


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.name == "__init__.py"], ids=name_of
)
def test_package_file_is_a_docstring_and_nothing_else(path: Path) -> None:
    (only,) = ast.parse(path.read_text()).body
    assert isinstance(only, ast.Expr)
    assert isinstance(only.value, ast.Constant)


def test_an_import_against_the_arrows_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.PROJECT", tmp_path)
    path = tmp_path / "broker" / "engines" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text("from broker import control_protocol, gate\nimport policy.rules\nimport trio\n")
    assert wrong_imports(path) == {"broker.gate"}


def test_everything_names_the_supported_pythons() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    least, limit = re.findall(r"3\.([0-9]+)", project["requires-python"])
    *others, last = [f"3.{minor}" for minor in range(int(least), int(limit))]
    people_read = f"Python {', '.join(others)} or {last}"
    code = f"(3, {least}) <= sys.version_info < (3, {limit})"
    for name, texts in {
        "README.md": (people_read,),
        "Makefile": (people_read, code),
        ".ci/other-python": (code, " ".join(reversed([*others, last]))),
    }.items():
        for text in texts:
            assert text in (PROJECT / name).read_text(), f"{name} does not say: {text}"


def test_there_is_one_list_of_debian_packages() -> None:
    installs = [
        line
        for line in (PROJECT / "Dockerfile").read_text().splitlines()
        if "install" in line and "apt-get" in line
    ]
    # What a bare machine has: `make setup` does the rest, as everywhere.
    assert [line.rpartition("recommends ")[2] for line in installs] == ["make python3 \\"]
