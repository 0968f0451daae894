from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.supervisor.bus_connections import BusIds
from broker.supervisor.storage.recovery import open_state
from broker.supervisor.storage.state_file import StateFile


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateFile]:
    with open_state(tmp_path / "state.db") as state:
        yield state


def test_another_bus_is_told_from_the_same(state: StateFile) -> None:
    ids = BusIds(state)
    assert ids.meet("session", "a")
    assert ids.meet("session", "a")
    assert not ids.meet("session", "b")
    assert ids.meet("session", "b")
    assert ids.meet("system", "a")


def test_it_is_known_to_the_next_supervisor(state: StateFile) -> None:
    BusIds(state).meet("session", "a")
    assert BusIds(state).meet("session", "a")
    assert not BusIds(state).meet("session", "b")
    assert state.load_bus_ids() == {"session": "b"}


def test_what_cannot_be_stored_is_known_to_us(
    state: StateFile, caplog: pytest.LogCaptureFixture
) -> None:
    ids = BusIds(state)
    state._db.execute("PRAGMA query_only = ON")
    assert ids.meet("session", "a")
    assert not ids.meet("session", "b")
    assert ids.meet("session", "b")
    assert "read-only" in caplog.text
