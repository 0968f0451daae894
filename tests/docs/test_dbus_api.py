"""docs/dbus-api.md and the interface files say what the tables of broker.api say: no more, and no less."""

import ast
import re
import tomllib
from collections.abc import Sequence
from typing import Any, Final
from xml.etree import ElementTree as ET

import pytest

from broker.api import management
from broker.api.arguments import (
    MAX_METADATA_NESTING,
    MAX_PLUGS,
    MAX_TEXT,
    MAX_TIME_LIMIT,
    NAMED,
)
from broker.api.dispatch import MAX_ARGUMENTS, Arg, Interface, Objects
from broker.api.subscribers import MAX_SUBSCRIBERS, MAX_SUBSCRIBERS_OF_USER, SIGNALS_PER_SECOND
from broker.bus import callers
from broker.bus.codec import MAX_BODY, MAX_STEPS
from broker.bus.connection import MAX_CALL_FDS
from broker.bus.message_intake import MAX_HEAD
from broker.control_protocol.messages import MAX_DENIAL_TEXT
from broker.daemon import MAX_BACKLOG
from broker.engines.gate_engine import GAP_TIMEOUT
from broker.supervisor.sandboxes.lifecycle import TRANSITIONS
from broker.supervisor.sandboxes.registry import MAX_DENIALS
from broker.supervisor.sandboxes.rule_limits import MAX_RULES, MAX_RULES_BYTES
from broker.wire import errors
from broker.wire.interfaces import BROKER, CONTAINERS1
from tests.helpers.dbus_interfaces import FOLDER, PROJECT, fill_page, interfaces, make_file
from tests.helpers.dbus_page import PAGE, SECTIONS, Row, method_section, section
from tests.helpers.fakes import FakeBus, make_call

INTERFACES: Final = interfaces()
STANDARD: Final = tuple(
    f"org.freedesktop.DBus.{name}" for name in ("Peer", "Introspectable", "Properties")
)
MEMBERS: Final = [
    (table, kind, member)
    for _, table in INTERFACES.values()
    for kind, members in (
        ("Method", table.methods),
        ("Signal", table.signals),
        ("Property", table.properties),
    )
    for member in members
]
each_member: Final = pytest.mark.parametrize(
    ("table", "kind", "member"),
    MEMBERS,
    ids=[f"{table.name}.{member.name}" for table, _, member in MEMBERS],
)


async def introspect(path: str, tables: Sequence[Interface]) -> dict[str, ET.Element]:
    """Return what an object says of its interfaces, by their names."""
    bus = FakeBus()
    call = make_call("Introspect", path=path, interface="org.freedesktop.DBus.Introspectable")
    await Objects({path: tables}).serve(bus, call)
    ((_, (xml,)),) = bus.answers
    return {str(one.get("name")): one for one in ET.fromstring(str(xml)).iter("interface")}


# -- the interface files ----------------------------------------------------------------------------


def test_there_is_a_file_for_each_interface() -> None:
    files = {path.name: path.read_text() for path in FOLDER.glob("*.xml")}
    made = {f"{name}.xml": make_file(table) for name, (_, table) in INTERFACES.items()}
    assert files == made, "run python -m tests.helpers.dbus_interfaces"


@pytest.mark.parametrize("name", INTERFACES)
async def test_a_file_is_what_the_service_says_of_itself(name: str) -> None:
    path, table = INTERFACES[name]
    described = await introspect(path, [table])
    (in_file,) = ET.parse(FOLDER / f"{name}.xml").getroot()
    assert ET.canonicalize(ET.tostring(in_file).strip()) == ET.canonicalize(
        ET.tostring(described[name]).strip()
    )


@pytest.mark.parametrize("name", INTERFACES)
def test_every_argument_has_a_name_of_its_own(name: str) -> None:
    for member in ET.parse(FOLDER / f"{name}.xml").getroot().iter():
        if member.tag in {"method", "signal"}:
            names = [arg.get("name") for arg in member.iter("arg")]
            assert all(names), member.get("name")
            assert len(set(names)) == len(names), member.get("name")


def test_the_files_are_installed() -> None:
    setuptools = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]
    (pattern,) = setuptools["data-files"]["share/dbus-1/interfaces"]
    assert {path.stem for path in PROJECT.glob(pattern)} == set(INTERFACES)
    assert "*.xml" in setuptools["package-data"]["*"]


# -- members --------------------------------------------------------------------------------------------


def test_the_page_has_every_member_and_no_other() -> None:
    on_page = {(one.above, one.title) for one in SECTIONS if one.above in INTERFACES}
    assert on_page == {(table.name, f"{kind} {member.name}") for table, kind, member in MEMBERS}
    at_the_top = {row[:2] for row in SECTIONS[0].table("object", "interface")}
    assert at_the_top == {
        (path, f"[{name}][{number}]")
        for number, (name, (path, _)) in enumerate(INTERFACES.items(), 1)
    }


def test_synopses_are_those_of_the_tables() -> None:
    page = PAGE.read_text()
    assert fill_page(page) == page, "run python -m tests.helpers.dbus_interfaces"


def typed(arguments: Sequence[Arg], *direction: str) -> list[Row]:
    return [(arg.name, *direction, arg.type) for arg in arguments]


@each_member
def test_arguments_are_those_of_the_table(table: Interface, kind: str, member: Any) -> None:
    part = section(f"{kind} {member.name}", table.name)
    match kind:
        case "Method":
            rows = [row[:3] for row in part.rows("argument", "", "type", "meaning")]
            assert rows == [*typed(member.takes, "in"), *typed(member.gives, "out")]
        case "Signal":
            rows = [row[:2] for row in part.table("argument", "type", "meaning")]
            assert rows == typed(member.args)
        case _:
            assert f"of type `{member.type}`" in part.words


@each_member
def test_every_member_has_an_example(table: Interface, kind: str, member: Any) -> None:
    part = section(f"{kind} {member.name}", table.name)
    if member is management.DENIED:  # gdbus has no connection that can both ask for it and get it
        assert [block.language for block in part.blocks] == ["python", "console", "text"]
        return
    path, _ = INTERFACES[table.name]
    to = f"--session --dest {BROKER} --object-path {path}"
    by_property = f"--method {STANDARD[2]}.Get {table.name} {member.name}"
    wanted = {
        "Method": ("gdbus call", f"--method {table.name}.{member.name}"),
        "Signal": ("gdbus monitor", ""),
        "Property": ("gdbus call", by_property),
    }
    begin, end = wanted[kind]
    found = [
        block
        for block in part.blocks
        if block.plain_command.startswith(f"{begin} {to}")
        and f"{end} " in f"{block.plain_command} "
    ]
    assert found
    if kind == "Signal":
        assert all(f"{path}: {table.name}.{member.name} (" in block.output for block in found)


@pytest.mark.parametrize("name", STANDARD)
async def test_standard_interfaces_are_those_of_every_object(name: str) -> None:
    path, table = INTERFACES[CONTAINERS1]
    described = await introspect(path, [table])
    assert set(described) == {CONTAINERS1, *STANDARD}
    part = section(name, "Standard interfaces")
    rows = part.table("method", "in", "out")
    for method, row in zip(described[name].iter("method"), rows, strict=True):
        into, out = (
            ", ".join(
                f"{arg.get('type')} {arg.get('name')}"
                for arg in method.iter("arg")
                if arg.get("direction") == direction
            )
            for direction in ("in", "out")
        )
        assert row[:3] == (method.get("name"), into, out)
        end = f"--method {name}.{method.get('name')} "
        assert any(end in f"{block.plain_command} " for block in part.blocks)


# -- arguments, numbers, reasons ------------------------------------------------------------------------


def test_named_arguments_are_those_that_add_server_takes() -> None:
    part = method_section(CONTAINERS1, "AddServer")
    rows = part.table("named argument", "type", "default", "meaning")
    assert {row[0]: row[1] for row in rows} == NAMED
    assert all(len(row) == 4 and all(row) for row in rows)
    for name in NAMED:
        assert f"\n- **{name}.** " in part.text, f"no paragraph about {name}"
    for number in (MAX_TEXT, MAX_PLUGS, MAX_METADATA_NESTING, MAX_TIME_LIMIT):
        assert re.search(rf"\b{number}\b", part.text)
    used = section("Property SupportedArguments", CONTAINERS1).blocks[0].output
    assert re.findall(r"'(\w+)'", used) == sorted(NAMED)


def test_numbers_about_refusals_are_those_of_the_code() -> None:
    text = section("Signal Denied", BROKER).text
    for number in (SIGNALS_PER_SECOND, MAX_BACKLOG, MAX_DENIAL_TEXT):
        assert re.search(rf"\b{number}\b", text)
    assert f"the last {MAX_DENIALS} refusals" in method_section(BROKER, "Show").words
    of_user, of_all = MAX_SUBSCRIBERS_OF_USER, MAX_SUBSCRIBERS
    subscribe = method_section(BROKER, "Subscribe").words
    assert f"{of_user} subscribers of one user and {of_all} in all" in subscribe


def test_reasons_are_those_of_the_table_of_ends() -> None:
    rows = section("Signal SandboxEnded", BROKER).table("reason")
    assert {row[0] for row in rows} == {row.reason for row in TRANSITIONS.values() if row.reason}


# -- errors and limits -----------------------------------------------------------------------------------

ERROR: Final = "org.freedesktop.DBus.Error."
# Errors of the gate towards apps, and of the bus towards callers: the service itself answers with none of them.
OF_OTHERS: Final = {"MatchRuleInvalid", "MatchRuleNotFound", "ServiceUnknown"}
CONSTANTS: Final = {name: str(getattr(errors, name)) for name in dir(errors) if name.isupper()}


def test_every_error_is_on_the_page() -> None:
    texts = [path.read_text() for path in (PROJECT / "broker").rglob("*.py")]
    known = {name for text in texts for name in re.findall(rf'"{re.escape(ERROR)}(\w+)"', text)}
    part = section("Errors")
    assert [row[0] for row in part.table("error", "when")] == sorted(known - OF_OTHERS)
    assert all(f"`{name}`" in part.text for name in OF_OTHERS)


def test_errors_of_others_are_not_the_services() -> None:
    # By the constants that stand in the packages of the service, but for the gate and the command line.
    used: set[str] = set()
    for package in ("api", "bus", "engines", "supervisor"):
        for path in (PROJECT / "broker" / package).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            used |= {node.id for node in nodes if isinstance(node, ast.Name)} & CONSTANTS.keys()
    assert len(used) > 5
    assert not {CONSTANTS[name].removeprefix(ERROR) for name in used} & OF_OTHERS


def show(number: int) -> str:
    """Return a number as the page writes it."""
    if number > 4096 and number % 1024 == 0:
        mebibytes, rest = divmod(number, 1024 * 1024)
        return f"{number // 1024} KiB" if rest else f"{mebibytes} MiB"
    return f"{number:,}".replace(",", " ") if number > 9999 else str(number)


# How each row of the table begins, and its numbers.
LIMITS: Final[dict[str, Sequence[int]]] = {
    "bytes of arguments": [MAX_ARGUMENTS],
    "the same for AddServer": [MAX_BODY],
    "values in the arguments": [MAX_STEPS],
    "file descriptors of a call": [MAX_CALL_FDS],
    "bytes of the header": [MAX_HEAD],
    "bytes of an answer": [MAX_BODY],
    "calls that wait": [callers.MAX_OF_CALLER, callers.MAX_OF_USER, callers.MAX_WAITING],
    "bytes of their arguments": [
        callers.MAX_BYTES_OF_CALLER,
        callers.MAX_BYTES_OF_USER,
        callers.MAX_BYTES,
    ],
    "file descriptors that come": [
        callers.MAX_FDS_OF_CALLER,
        callers.MAX_FDS_OF_USER,
        callers.MAX_FDS,
    ],
    "calls under way": [callers.RUNNING_OF_CALLER, callers.RUNNING_OF_USER, callers.RUNNING],
    f"those with arguments over {show(callers.LONG)}": [1, callers.RUNNING_LONG],
    "rules of a sandbox": [MAX_RULES],
    "bytes of the rules": [MAX_RULES_BYTES],
    "bytes of a container name": [MAX_TEXT],
    "plugs": [MAX_PLUGS],
    "depth of metadata": [MAX_METADATA_NESTING],
    "subscribers": [MAX_SUBSCRIBERS_OF_USER, MAX_SUBSCRIBERS],
    "signals Denied": [SIGNALS_PER_SECOND],
}


def test_limits_are_those_of_the_code() -> None:
    part = section("Limits")
    rows = part.table("limit", "value")
    for (name, value), (begin, numbers) in zip(rows, LIMITS.items(), strict=True):
        assert name.startswith(begin)
        text = ", ".join(map(show, numbers))
        assert f"{value}," == f"{text}," or value.startswith(f"{text}, of which")
    long_arguments = {
        method.name
        for _, table in INTERFACES.values()
        for method in table.methods
        if method.longest == MAX_BODY
    }
    assert set(re.findall(r"[A-Z]\w+", rows[1][0])) == long_arguments
    assert {method.longest for _, table in INTERFACES.values() for method in table.methods} == {
        MAX_ARGUMENTS,
        MAX_BODY,
    }
    assert f"up to {GAP_TIMEOUT:.0f} seconds" in part.words


def test_no_line_is_longer_than_a_hundred_columns() -> None:
    for name in ("dbus-api.md", "configuration.md"):
        lines = (PROJECT / "docs" / name).read_text().splitlines()
        assert not [line for line in lines if len(line) > 100], name
