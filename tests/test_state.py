import sqlite3
from pathlib import Path

import msgspec
import pytest

from broker.supervisor.state import SCHEMA, open_state
from broker.wire.errors import ConfigError
from policy.rules import Access, AccessList, Peer, Rule
from policy.snaps import Snap, World, parse_world
from tests.records import make_record

ACCESS = AccessList(
    rules=(
        Rule(
            access=frozenset({Access.SEND, Access.SEE}),
            name="org.example.*",
            peer=Peer(kind="app", type="a.b", app="x", component="y"),
            origin="test",
        ),
    ),
    receive_from_host=False,
)


def test_a_new_file_holds_nothing(tmp_path: Path) -> None:
    with open_state(tmp_path / "state.db") as state:
        assert state.load() == ([], 0)


def test_what_was_put_is_there_for_whoever_opens_it_next(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    first = make_record(3, access=ACCESS, plugs=("network",), component="c")
    second = make_record(1)
    with open_state(path) as state:
        state.put(first)
        state.put(second)
        state.put(msgspec.structs.replace(second, listening=False))
        # As after a kill: a second connection while the first was never closed.
        with open_state(path) as other:
            assert other.load() == ([msgspec.structs.replace(second, listening=False), first], 4)


def test_numbers_are_not_given_again(tmp_path: Path) -> None:
    with open_state(tmp_path / "state.db") as state:
        state.put(make_record(5))
        state.delete(make_record(5))
        state.delete(make_record(6))
        assert state.load() == ([], 6)


def test_what_is_no_state_file_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_text("this is no database, and long enough for SQLite to look at it closely")
    with pytest.raises(ConfigError, match="cannot use"):
        with open_state(path):
            pass
    with pytest.raises(ConfigError, match="cannot open"):
        with open_state(tmp_path / "no" / "state.db"):
            pass


def change(path: Path, statement: str) -> None:
    with open_state(path):
        pass
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_file_of_another_version_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    change(path, f"PRAGMA user_version = {SCHEMA + 1}")
    with pytest.raises(ConfigError, match="version"):
        with open_state(path):
            pass


def test_a_record_that_cannot_be_read_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    change(path, "INSERT INTO sandbox VALUES (1, x'c0')")
    with open_state(path) as state:
        with pytest.raises(ConfigError, match="record"):
            state.load()


def test_a_table_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    change(path, "DROP TABLE counter")
    with open_state(path) as state:
        with pytest.raises(ConfigError, match="damaged"):
            state.load()


WORLD = parse_world(
    {
        "system": "core",
        "snaps": [
            {
                "name": "a",
                "apps": ["x"],
                "plugs": {"p": {"interface": "dbus", "attributes": {"n": [1, {"k": True}]}}},
            },
            {"name": "b", "system": True},
        ],
        "connections": [("a:p", "b:s")],
    }
)


def test_snaps_and_connections_are_there_for_whoever_opens_it_next(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with open_state(path) as state:
        assert state.load_world() == World()
        state.put_world(World(snaps=(Snap(name="gone"),), connections=(("gone:p", "b:s"),)))
        state.put_world(WORLD)
        state.put_connection("a:q", "b:s")
        state.put_connection("a:q", "b:s")
        state.put_connection("a:r", "b:s")
        state.delete_connection("a:r", "b:s")
    with open_state(path) as state:
        pairs = (("a:p", "b:s"), ("a:q", "b:s"))
        assert state.load_world() == msgspec.structs.replace(WORLD, connections=pairs)


def test_a_file_of_the_version_before_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with open_state(path) as state:
        state.put(make_record(3))
    for table in ("system", "snap", "connection"):
        change(path, f"DROP TABLE {table}")
    change(path, "PRAGMA user_version = 1")
    with open_state(path) as state:
        assert state.load() == ([make_record(3)], 4)
        assert state.load_world() == World()
        state.put_world(WORLD)
    with open_state(path) as state:
        assert state.load_world() == WORLD


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("INSERT INTO snap VALUES ('a', x'c0')", "snap that cannot be read"),
        ("INSERT INTO snap VALUES ('a', x'ff')", "snap that cannot be read"),
        ("INSERT INTO system VALUES ('attic')", "snap that cannot be read"),
        ("DROP TABLE snap", "damaged"),
    ],
)
def test_snaps_that_cannot_be_read_are_a_clear_error(
    tmp_path: Path, statement: str, says: str
) -> None:
    path = tmp_path / "state.db"
    change(path, statement)
    with open_state(path) as state:
        with pytest.raises(ConfigError, match=says):
            state.load_world()
