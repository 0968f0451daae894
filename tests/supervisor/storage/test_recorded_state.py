"""A state file recorded as SQL is read by the present code, and the present code writes the same.

So no rename of a class, a field or an enum's member changes the format by accident. A field that is new shows here,
too, because the recorded record must have all of them. tests/helpers/recorded_state.py says how to record again.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from broker.supervisor.sandboxes.registry import Record
from broker.supervisor.storage.recovery import open_state
from broker.supervisor.storage.state_file import SCHEMA
from broker.wire.errors import ConfigError
from policy.rules import AccessList, Peer, Rule
from tests.helpers import recorded_state as recorded

RECORDING = recorded.DATA / f"state-{SCHEMA}.sql"


def make_file(path: Path, version: int | None = None) -> Path:
    """Make the file of the recording, as another version if one is given."""
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript(RECORDING.read_text(encoding="utf-8"))
        if version is not None:
            db.execute(f"PRAGMA user_version = {version}")
    return path


def test_recorded_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    with open_state(make_file(tmp_path / "state.db")) as state:
        assert state.load() == (list(recorded.RECORDS), recorded.NEXT_NUMBER)
        assert state.load_world() == recorded.WORLD
        assert state.load_field_requests() == recorded.FIELD_REQUESTS
        assert state.load_bus_ids() == recorded.BUS_IDS
        assert state.pending_recovery() == recorded.PENDING
    assert not list(tmp_path.glob("*damaged*"))


def test_present_code_writes_the_recorded_file(tmp_path: Path) -> None:
    recorded.fill(tmp_path / "state.db")
    assert recorded.dump(tmp_path / "state.db") == RECORDING.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Record, recorded.FULL),
        (AccessList, recorded.FULL.access),
        (Rule, recorded.RULE),
        (Peer, recorded.RULE.peer),
    ],
)
def test_recording_has_every_field(kind: type[msgspec.Struct], value: msgspec.Struct) -> None:
    for field in msgspec.structs.fields(kind):
        assert field.required or getattr(value, field.name) != field.default, field.name


def test_a_later_version_is_refused_in_one_line_and_nothing_is_lost(tmp_path: Path) -> None:
    path = make_file(tmp_path / "state.db", SCHEMA + 1)
    before = recorded.dump(path)
    with pytest.raises(ConfigError, match=f"has version {SCHEMA + 1}") as caught, open_state(path):
        pass
    assert "\n" not in str(caught.value)
    assert recorded.dump(path) == before
    assert [one.name for one in tmp_path.iterdir()] == ["state.db"]
