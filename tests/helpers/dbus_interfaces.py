"""Writes the interface files and the synopses of docs/dbus-api.md: `python -m tests.helpers.dbus_interfaces`.

Both are made from the tables that the service is made of (`broker.api`), so they say what the service says of itself.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from broker.api import containers1, management, policy
from broker.api.caller import BusContext
from broker.api.dispatch import DOCTYPE, Arg, Interface, describe_interface
from broker.wire.interfaces import BROKER_PATH, DRIVER_PATH
from tests.helpers.fakes import FakeBus

PROJECT: Final = Path(__file__).resolve().parents[2]
FOLDER: Final = PROJECT / "broker" / "api" / "interfaces"
PAGE: Final = PROJECT / "docs" / "dbus-api.md"
BEGIN: Final = "<!-- made by python -m tests.helpers.dbus_interfaces: {} -->\n"
END: Final = "<!-- end of what is made -->\n"


def interfaces() -> dict[str, tuple[str, Interface]]:
    """Return the object path and the table of each interface, by the interface's name."""
    anything: Any = None
    supervisor: Any = SimpleNamespace(registry=None, snaps=None, policy=None)
    door = BusContext(name="session", bus=FakeBus(), supervisor=supervisor, buses=("session",))
    manager = management.Management(door, anything, anything, anything, anything)
    tables = (
        (DRIVER_PATH, containers1.Containers1(door, anything).interface()),
        (BROKER_PATH, manager.interface()),
        (BROKER_PATH, policy.PolicyInterface(door).interface()),
    )
    return {table.name: (path, table) for path, table in tables}


def make_file(interface: Interface) -> str:
    """Return the text of an interface file."""
    return DOCTYPE + "\n".join(["<node>", *describe_interface(interface), "</node>", ""])


def make_synopsis(path: str, interface: Interface) -> str:
    """Return the members of an interface as `gdbus introspect` prints them, in a block of Markdown."""
    lines = ["```", f"node {path} {{", f"  interface {interface.name} {{"]
    lines += ["    methods:"]
    for method in interface.methods:
        lines += _call(method.name, [*_typed(method.takes, "in "), *_typed(method.gives, "out")])
    if interface.signals:
        lines += ["    signals:"]
    for signal in interface.signals:
        lines += _call(signal.name, [f"{arg.type} {arg.name}" for arg in signal.args])
    if interface.properties:
        lines += ["    properties:"]
    lines += [f"      readonly {one.type} {one.name};" for one in interface.properties]
    return "\n".join([*lines, "  };", "};", "```", ""])


def fill_page(page: str) -> str:
    """Return the page with its synopses made anew."""
    for name, (path, interface) in interfaces().items():
        before, begin, rest = page.partition(BEGIN.format(name))
        _, end, after = rest.partition(END)
        assert begin, f"no place for the synopsis of {name}"
        assert end, f"the synopsis of {name} has no end"
        page = before + begin + make_synopsis(path, interface) + end + after
    return page


def main() -> None:
    for name, (_, interface) in interfaces().items():
        (FOLDER / f"{name}.xml").write_text(make_file(interface))
    PAGE.write_text(fill_page(PAGE.read_text()))


def _typed(arguments: Sequence[Arg], direction: str) -> Iterator[str]:
    return (f"{direction} {arg.type} {arg.name}" for arg in arguments)


def _call(name: str, arguments: Sequence[str]) -> Iterator[str]:
    head = f"      {name}("
    if not arguments:
        yield f"{head});"
        return
    for index, argument in enumerate(arguments):
        lead = " " * len(head) if index else head
        yield f"{lead}{argument}{',' if index < len(arguments) - 1 else ');'}"


if __name__ == "__main__":
    main()
