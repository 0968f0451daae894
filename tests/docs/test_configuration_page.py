"""docs/configuration.md has every key of the configuration file, with its type, default and range."""

import re
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest

from broker.supervisor import config
from broker.supervisor.config import SYSTEM_LIMITS, ConfiguredLimits, load_config
from broker.wire.errors import ConfigError
from tests.helpers.dbus_page import PROJECT, Section, read_sections

PAGE: Final = PROJECT / "docs" / "configuration.md"
SECTIONS: Final = {one.title: one for one in read_sections(PAGE)}
ENVIRON: Final = {"XDG_RUNTIME_DIR": "/run/user/7"}
LARGEST: Final = 2**63 - 1
TYPES: Final = {str: "text", int: "integer", dict: "table"}


def rows(title: str) -> dict[str, tuple[str, ...]]:
    (table,) = SECTIONS[title].tables
    return {row[0]: row[1:] for row in table[1:]}


def load(folder: Path, text: str, **said: Any) -> config.Config:
    path = folder / "buswarden.toml"
    path.write_text(text)
    return load_config(path, environ=ENVIRON, **said)


def plain(hint: Any) -> Any:
    """Return a type without None."""
    if get_origin(hint) in {Union, UnionType}:
        (hint,) = [one for one in get_args(hint) if one is not type(None)]
    return hint


def test_keys_and_types_are_those_of_the_file() -> None:
    shown = rows("Keys of the file")
    for name, hint in get_type_hints(config._File).items():
        kind, default, allowed = shown.pop(name)
        wanted = plain(hint)
        if get_origin(wanted) is Literal:
            assert allowed == ", ".join(get_args(wanted))
            assert kind == "text"
        else:
            assert kind == TYPES[get_origin(wanted) or wanted]
        assert default
        assert f"### `{name}`" in PAGE.read_text() or name == "limits"
    assert not shown, "keys that there are not"


def test_defaults_are_those_of_the_code() -> None:
    shown = rows("Keys of the file")
    assert shown["scope"][1] == load_config(environ=ENVIRON).scope
    assert shown["bus_gone_seconds"][1] == str(config.BUS_GONE_SECONDS)
    assert load_config(environ=ENVIRON).engine is None  # what each bus can
    text = SECTIONS["`runtime_dir`"].text + SECTIONS["`buses`"].text
    system = load_config(scope="system", environ={})
    assert f"`{system.runtime_dir}`" in text
    assert f"`{system.buses[0].address.removeprefix('unix:path=')}`" in text
    user = load_config(environ=ENVIRON)
    assert str(user.runtime_dir).removeprefix("/run/user/7") == "/buswarden"
    assert "`$XDG_RUNTIME_DIR/buswarden`" in text


def test_limits_are_those_of_the_code() -> None:
    shown = rows("Limits")
    assert list(shown) == list(ConfiguredLimits.__struct_fields__)
    user, system = msgspec.structs.asdict(ConfiguredLimits()), msgspec.structs.asdict(SYSTEM_LIMITS)
    for name, (default, of_system, _) in shown.items():
        assert (default, of_system) == (str(user[name]), str(system[name])), name


@pytest.mark.parametrize("name", ConfiguredLimits.__struct_fields__)
def test_range_of_a_limit_is_that_of_the_code(name: str, tmp_path: Path) -> None:
    least, most = map(int, rows("Limits")[name][2].split(" to "))
    for value in (least, most):
        limits = load(tmp_path, f"[limits]\n{name} = {value}\n").limits
        assert getattr(limits, name) == value
    for value in (least - 1, most + 1):
        with pytest.raises(ConfigError):
            load(tmp_path, f"[limits]\n{name} = {value}\n")


def test_range_of_bus_gone_seconds_is_that_of_the_code(tmp_path: Path) -> None:
    zero, least, most = map(
        int, re.findall("[0-9]+", rows("Keys of the file")["bus_gone_seconds"][2])
    )
    for value in (zero, least, most):
        assert load(tmp_path, f"bus_gone_seconds = {value}\n").bus_gone_seconds == value
    for value in (-1, most + 1):
        with pytest.raises(ConfigError):
            load(tmp_path, f"bus_gone_seconds = {value}\n")
    assert (zero, least) == (0, 1)


def test_names_of_buses_are_those_of_the_code(tmp_path: Path) -> None:
    text = SECTIONS["`buses`"].text
    length = int(re.findall(r"up to ([0-9]+) of the characters", " ".join(text.split()))[0])
    good = ("a" * length, "abcdefghijklmnopqrstuvwxyz", "0123456789-_")
    for name in good:
        assert load(tmp_path, f'[buses]\n{name} = "unix:path=/b"\n').buses[0].name == name
    for name in ("a" * (length + 1), "A", "a.b"):
        with pytest.raises(ConfigError):
            load(tmp_path, f'[buses]\n"{name}" = "unix:path=/b"\n')


def parts(section: Section) -> dict[str, str]:
    """Return the paragraphs of a list of limits, by the name of the limit."""
    found = re.findall(r"^- \*\*`(\w+)`\*\*: (.*(?:\n  .*)*)", section.text, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def test_every_limit_has_a_paragraph() -> None:
    supervisor, gate = (
        parts(SECTIONS["Limits of the supervisor"]),
        parts(SECTIONS["Limits of the gate"]),
    )
    assert not supervisor.keys() & gate.keys()
    assert {*supervisor, *gate} == set(ConfiguredLimits.__struct_fields__)
    of_gate = msgspec.structs.asdict(ConfiguredLimits().for_sandbox())
    of_gate["max_connections_per_container"] = of_gate.pop("connections")
    assert set(gate) == set(of_gate)


def test_every_key_says_what_a_change_does() -> None:
    keys = [f"`{name}`" for name in config._File.__struct_fields__ if name != "limits"]
    for title in (*keys, "Limits"):
        assert "\nChanged live: " in SECTIONS[title].text, title


def test_the_example_has_every_key_and_is_read(tmp_path: Path) -> None:
    (example,) = [
        block for one in SECTIONS.values() for block in one.blocks if block.language == "toml"
    ]
    loaded = load(tmp_path, example.text)
    assert [bus.name for bus in loaded.buses] == ["session", "accessibility"]
    assert loaded.limits.max_containers == 100
    for name in config._File.__struct_fields__:
        assert re.search(rf"^\[?{name}\b", example.text, re.MULTILINE), name
