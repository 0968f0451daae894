import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from policy.rules import Peer
from policy.snaps.catalogue_schema import EVERY_SNAP
from policy.snaps.compiler import Compiler
from policy.snaps.installed import Port, Snap, World, parse_connection
from policy.snaps.library import SECTIONS, CatalogueError, load_library, parse_interface
from policy.text import format_rule
from tests.helpers.snapworlds import library

GOOD = """\
summary = "A thing."
system-slot = ["classic"]
same = ["bus"]

[attributes.plug.bus]
type = "bus"

[attributes.slot.bus]
type = "bus"
default = "session"

[attributes.slot.name]
type = "name-element"
default = "<snap>"

[[plug.permanent]]
access = ["see"]
name = "org.example.<plug.bus>"

[[plug.connected]]
access = ["send"]
bus = "<plug.bus>"
path = [
    "/a",
    "/a/**",
]
interface = "org.example.A"
peer = "slot"
needs = ["plug.bus"]

[[plug.connected]]
access = ["send", "receive"]
member = "M*"
peer = { classic = ["host"], core = ["slot-app"] }

[[slot.permanent]]
access = ["own"]
name = "org.example.<slot.name>.*"
"""


def problem(text: str, *, name: str = "thing") -> str:
    with pytest.raises(CatalogueError) as caught:
        parse_interface(text, name=name, file="thing.toml")
    return str(caught.value)


def test_a_file_is_read() -> None:
    known = parse_interface(GOOD, name="thing", file="thing.toml")
    assert known.interface.summary == "A thing."
    numbers = {where: len(known.sections[where]) for where in SECTIONS}
    assert numbers == {
        "plug.permanent": 1,
        "plug.connected": 2,
        "slot.permanent": 1,
        "slot.connected": 0,
        "every-snap": 0,
    }


def test_the_shipped_files_say_what_they_are() -> None:
    known = library()
    assert len(known.interfaces) == 66
    assert EVERY_SNAP not in known.interfaces
    summaries = [each.interface.summary for each in known.interfaces.values()]
    assert all(text.endswith(".") and len(text) < 120 for text in summaries)
    assert len(set(summaries)) == len(summaries)


def test_the_host_has_the_slots_of_its_system() -> None:
    classic = library().system_snap("classic")
    core = library().system_snap("core", "core")
    assert (classic.name, core.name) == ("snapd", "core")
    assert "unity7" in classic.slots
    assert "unity7" not in core.slots
    assert "network" in core.slots


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('summary = "A thing."', "", "thing.toml:1: Object missing required field `summary`"),
        ("same =", "other =", "thing.toml:3: Object contains unknown field `other`"),
        ('same = ["bus"]', 'same = ["x"]', "thing.toml:3: plug has no attribute 'x'"),
        ('type = "bus"', 'type = "buss"', "thing.toml:6: Invalid enum value 'buss'"),
        ('"<snap>"', '"<tag>"', "thing.toml:14: unknown placeholder <tag>: a default may have"),
        ('"<snap>"', '"<snap"', "thing.toml:14: '<' and '>' stand around a placeholder, in pairs"),
        ('["see"]', "[]", "thing.toml:17: no access at all"),
        ('["see"]', '["say"]', "thing.toml:17: Invalid enum value 'say'"),
        ('["see"]', '["own", "see"]\npath = "/"', "thing.toml:17: own is about a name: no path"),
        ("<plug.bus>", "<slot.bus>", "thing.toml:18: unknown placeholder <slot.bus>: here there"),
        ("<plug.bus>", "<plug.bus", "thing.toml:18: 'org.example.<plug.bus': '<' and '>' stand"),
        (".<plug.bus>", "..x", "thing.toml:18: bad name 'org.example..x': empty bus name element"),
        ('"<plug.bus>"', '""', "thing.toml:22: an empty bus"),
        ('"/a",', '"a",', "thing.toml:24: bad path 'a': a path begins with '/'"),
        ('"/a/**",', '"/a/[",', "thing.toml:25: bad path '/a/[': '[' without a list"),
        ('"org.example.A"', "[]", "thing.toml:27: no interface at all: without the key, any"),
        ('"org.example.A"', "7", "thing.toml:27: Expected `str | array | null`, got `int`"),
        ('"org.example.A"', '"A"', "thing.toml:27: bad interface 'A': interface of a single"),
        ('peer = "slot"', 'peer = "slots"', "thing.toml:28: Invalid enum value 'slots'"),
        ('["plug.bus"]', '["plug.x"]', "thing.toml:29: needs an attribute that is not declared"),
        ('member = "M*"', 'members = "M*"', "thing.toml:33: Object contains unknown field"),
        ('"M*"', '"M-*"', "thing.toml:33: bad member 'M-*': '-' cannot stand in a member"),
        ('"org.example.<slot.name>.*"', '"a.b"\non = "mac"', "thing.toml:39: Invalid enum value"),
        ('"org.example.<slot.name>.*"', '"a.b"\nslot-is = "app"', "thing.toml:39: without a conn"),
        ('["own"]', '["send"]\npeer = "plug"', "thing.toml:38: without a connection there is no"),
        ("[[slot.permanent]]", "[[every-snap]]", "thing.toml:36: every-snap rules outside"),
        ("[[slot.permanent]]", "[[slot.permanent]", "thing.toml:36: Expected ']]'"),
        ('"org.example.<slot.name>.*"', '"x', "thing.toml:38: Illegal character"),
        ('type = "bus"', 'typ = "bus"', "thing.toml:6: Object contains unknown field `typ`"),
        ('"name-element"', "5", "thing.toml:13: Expected `str`, got `int`"),
        ("[[slot.permanent]]", "[[slots]]", "thing.toml:36: Object contains unknown field `slots`"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(old: str, new: str, expected: str) -> None:
    assert old in GOOD
    found = problem(GOOD.replace(old, new, 1))
    assert found.startswith(expected), found


def test_a_line_is_near_if_the_file_is_written_otherwise() -> None:
    text = 'summary = "A thing."\nplug = { connected = [{ access = ["send"], peer = "me" }] }\n'
    assert problem(text).startswith("thing.toml:2: Invalid enum value 'me'")
    assert problem('summary = "x"\n[plug]\nconnected = 5\n').startswith("thing.toml:3: Expected")
    assert problem("5").startswith("thing.toml:1: ")


def test_odd_files_are_refused() -> None:
    assert "not an interface's name" in problem(GOOD, name="Thing")
    assert "longer than" in problem("#" * 1_100_000)
    deep = "x = " + "[" * 5000 + "]" * 5000
    assert problem(deep).startswith("thing.toml:1: ")


def test_a_text_attribute_is_no_placeholder() -> None:
    # It could have any characters, so a snap could bring a pattern in.
    text = GOOD.replace('type = "bus"', 'type = "text"', 1)
    assert "unknown placeholder <plug.bus>" in problem(text)


def test_own_files_add_and_replace(tmp_path: Path) -> None:
    system, user = tmp_path / "system", tmp_path / "user"
    for directory in (system, user):
        directory.mkdir()
    (system / "thing.toml").write_text(GOOD)
    (system / "mpris.toml").write_text('summary = "Of the system."\n')
    (user / "mpris.toml").write_text('summary = "Of the user."\n')
    (user / "README").write_text("not a file of ours")
    found = load_library([system, user, tmp_path / "not-there"])
    assert len(found.interfaces) == 67
    assert found.interfaces["thing"].file == str(system / "thing.toml")
    assert found.interfaces["mpris"].interface.summary == "Of the user."
    assert found.interfaces["network"].file == "network.toml"


def test_what_every_snap_gets_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "every-snap.toml").write_text('summary = "Nothing."\n')
    assert not load_library([tmp_path]).every_snap.sections["every-snap"]


def test_a_wrong_own_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('summary = "x"\nsummary = "y"\n')
    with pytest.raises(CatalogueError) as caught:
        load_library([tmp_path])
    assert (caught.value.file, caught.value.line) == (str(file), 2)
    file.write_bytes(b"\xff")
    with pytest.raises(CatalogueError, match=r"bad\.toml:1: cannot be read"):
        load_library([tmp_path])
    file.unlink()
    file.mkdir()
    with pytest.raises(CatalogueError, match=r"bad\.toml:1: cannot be read"):
        load_library([tmp_path])


def test_a_directory_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    class Closed(type(tmp_path)):  # type: ignore[misc]
        def iterdir(self) -> Iterator[Path]:
            raise PermissionError(13, "Permission denied")

    with pytest.raises(CatalogueError, match=r"cannot be read: .*Permission denied"):
        load_library([Closed(tmp_path)])


def test_the_example_of_the_documentation() -> None:
    written = (Path(__file__).parents[3] / "docs" / "policy.md").read_text()
    example = re.search(r"```toml\n(.*?)```", written, re.DOTALL)
    assert example is not None
    scanner = parse_interface(example[1], name="scanner", file="scanner.toml")
    extended = msgspec.structs.replace(
        library(), interfaces=library().interfaces | {"scanner": scanner}
    )
    end = {"scanner": Port(interface="scanner")}
    world = World(
        snaps=(
            Snap(name="paper", apps=("ui",), plugs=end),
            Snap(name="lamp", apps=("svc",), slots=end),
            extended.system_snap("classic"),
        ),
        connections=(("paper:scanner", "lamp:scanner"),),
    )
    compiler = Compiler(extended, world)
    for tag, number in (("snap.paper.ui", 2), ("snap.lamp.svc", 2)):
        rules = [rule for rule in compiler.access(tag).rules if "scanner" in rule.origin]
        assert len(rules) == number
        assert all(f"`{format_rule(rule)}`" in written for rule in rules)
    compiler.disconnect(compiler.connections[0])
    (connected,) = compiler.connect(parse_connection("paper:scanner", "snapd:scanner"))
    assert {rule.peer for rule in connected.added} == {Peer(kind="host")}
