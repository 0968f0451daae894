import sqlite3
from pathlib import Path

import msgspec
import pytest

from broker.supervisor.storage.recovery import open_state
from broker.supervisor.storage.state_file import NoRoomError, StateFile, unusable
from broker.wire.errors import FAILED, CallRefusedError, ConfigError
from policy.rules import Access, AccessList, Peer, Rule
from policy.snaps.installed import Snap, World, parse_world
from tests.helpers.records import make_record

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


def test_a_file_that_cannot_be_used_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot open"):
        with open_state(tmp_path / "no" / "state.db"):
            pass
    (tmp_path / "state.db").mkdir()
    with pytest.raises(ConfigError, match="cannot open"):
        with open_state(tmp_path / "state.db"):
            pass


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


class Full:
    """A state file that cannot grow, as on a full disk, until `make_room`."""

    def __init__(self, state: StateFile) -> None:
        self._db = state._db
        self._db.execute("PRAGMA max_page_count = 1").fetchall()

    def make_room(self) -> None:
        self._db.execute("PRAGMA max_page_count = 100000").fetchall()


LARGE = AccessList(
    rules=tuple(Rule(access=frozenset({Access.SEND}), name=f"org.n{n}") for n in range(500))
)


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with open_state(path) as state:
        state.put(make_record(1))
        full = Full(state)
        with pytest.raises(CallRefusedError, match=r"cannot store.*make room"):
            state.put(make_record(2, access=LARGE))
        with pytest.raises(CallRefusedError, match="cannot store"):
            state.put_world(World(snaps=tuple(Snap(name=f"{n}-{'x' * 100}") for n in range(200))))
        assert state.load() == ([make_record(1)], 2)
        assert state.load_world() == World()
        full.make_room()
        state.put(make_record(2, access=LARGE))
    with open_state(path) as state:
        assert state.load() == ([make_record(1), make_record(2, access=LARGE)], 3)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (sqlite3.SQLITE_FULL, NoRoomError),
        (sqlite3.SQLITE_IOERR_SHMSIZE, NoRoomError),
        (sqlite3.SQLITE_READONLY, ConfigError),
    ],
)
def test_a_full_disk_is_no_mistake_in_the_settings(code: int, kind: type[Exception]) -> None:
    error = sqlite3.OperationalError("no")
    error.sqlite_errorcode = code
    assert type(unusable("it cannot be opened", error)) is kind
    refused = CallRefusedError(FAILED, "cannot store the change")
    refused.__cause__ = error
    assert type(unusable("it cannot be opened", refused)) is kind


def test_what_has_come_to_pass_is_stored_with_the_next_change(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with open_state(path) as state:
        for number in (1, 2, 3):
            state.put(make_record(number))
        state._db.execute("PRAGMA query_only = ON")
        state.delete(make_record(1))
        state.put_fact(make_record(2, listening=False))
        with pytest.raises(CallRefusedError, match="read-only"):
            state.put(make_record(4))
        assert len(state.load()[0]) == 3
        state._db.execute("PRAGMA query_only = OFF")
        state.delete(make_record(3))
        assert state.load() == ([make_record(2, listening=False)], 4)
