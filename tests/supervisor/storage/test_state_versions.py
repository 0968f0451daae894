"""Files of each version that there has been, as it was made then, are read by this program."""

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from broker.supervisor.storage.recovery import open_state
from broker.supervisor.storage.state_file import SCHEMA, STEPS
from broker.wire.errors import ConfigError
from policy.snaps.installed import Snap, World
from tests.helpers.records import make_record

# Written once and never changed: what the step to each version made, and a record as it was stored then.
FROZEN = {
    1: """
    CREATE TABLE sandbox (number INTEGER PRIMARY KEY, record BLOB NOT NULL);
    CREATE TABLE counter (next INTEGER NOT NULL);
    INSERT INTO counter VALUES (0);
    """,
    2: """
    CREATE TABLE system (kind TEXT NOT NULL);
    CREATE TABLE snap (name TEXT PRIMARY KEY, snap BLOB NOT NULL);
    CREATE TABLE connection (plug TEXT, slot TEXT, PRIMARY KEY (plug, slot));
    """,
    3: """
    CREATE TABLE unsettled (aside TEXT NOT NULL, snaps_lost INTEGER NOT NULL);
    """,
    4: """
    CREATE TABLE tag (bus TEXT, unique_name TEXT, PRIMARY KEY (bus, unique_name));
    CREATE TABLE bus (name TEXT PRIMARY KEY, id TEXT NOT NULL);
    """,
}
RECORD = {
    "number": 3,
    "type": "org.example.Type",
    "app": "app",
    "metadata": bytes(8),
    "uid": 1000,
    "creator": ":1.1",
    "creator_bus": "session",
    "credentials": bytes(8),
    "sockets": {"session": "/run/dbus-3"},
    "addresses": {"session": "unix:path=/run/dbus-3"},
    "access": {"rules": [{"access": ["send"], "name": "org.example.X"}]},
    "created": 1.0,
}


def make_file(path: Path, version: int) -> None:
    """Make a file as the program of that version did, with something in each table."""
    with closing(sqlite3.connect(path)) as db, db:
        for step in range(1, version + 1):
            db.executescript(FROZEN[step])
        db.execute("INSERT INTO sandbox VALUES (3, ?)", (msgspec.msgpack.encode(RECORD),))
        db.execute("UPDATE counter SET next = 7")
        if version >= 2:
            db.execute("INSERT INTO system VALUES ('classic')")
            db.execute("INSERT INTO snap VALUES ('a', ?)", (msgspec.msgpack.encode({"name": "a"}),))
            db.execute("INSERT INTO connection VALUES ('a:p', 'b:s')")
        if version >= 4:
            db.execute("INSERT INTO tag VALUES ('session', ':1.2')")
            db.execute("INSERT INTO bus VALUES ('session', 'abc')")
        db.execute(f"PRAGMA user_version = {version}")


def shape(path: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(path)) as db:
        return sorted(db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))


def test_no_step_is_changed_after_it_was_made() -> None:
    assert set(FROZEN) == set(range(1, SCHEMA + 1))
    for version, text in FROZEN.items():
        assert STEPS[version - 1].split() == text.split()


@pytest.mark.parametrize("version", range(1, SCHEMA + 1))
def test_each_version_becomes_this_one_and_loses_nothing(tmp_path: Path, version: int) -> None:
    path = tmp_path / "state.db"
    make_file(path, version)
    with open_state(path) as state:
        ((record,), next_number) = state.load()
        assert (record.id, record.access.rules[0].name) == ("c3", "org.example.X")
        assert msgspec.structs.replace(record, access=make_record().access) == make_record(3)
        assert next_number == 7
        world = World(snaps=(Snap(name="a"),), connections=(("a:p", "b:s"),))
        assert state.load_world() == (world if version >= 2 else World())
        assert state.pending_recovery() is None
        assert state.load_field_requests() == ([("session", ":1.2")] if version >= 4 else [])
        assert state.load_bus_ids() == ({"session": "abc"} if version >= 4 else {})
        state.put(make_record(8))
    with open_state(tmp_path / "new.db"):
        assert shape(path) == shape(tmp_path / "new.db")
    assert not list(tmp_path.glob("*damaged*"))


def test_a_newer_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    make_file(path, SCHEMA)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    before = shape(path)
    with pytest.raises(ConfigError, match=f"has version {SCHEMA + 1}.*run the newer program"):
        with open_state(path):
            pass
    assert shape(path) == before
    assert not list(tmp_path.glob("*damaged*"))
