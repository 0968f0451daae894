"""A state file that is damaged is kept, what can be read of it is used, and the gate is asked for the rest."""

import logging
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from broker.control_protocol.messages import SandboxState, Snapshot
from broker.supervisor.config import ConfiguredLimits
from broker.supervisor.sandboxes.registry import BUILT_IN, Record, Registry
from broker.supervisor.sandboxes.specs import make_spec
from broker.supervisor.storage.recovery import (
    KEPT_ASIDE,
    NO_VALUES,
    UNKNOWN_PLUG,
    open_state,
    recover_from_gate,
)
from broker.supervisor.storage.state_file import NoRoomError, PendingRecovery, StateFile
from broker.wire.errors import ConfigError
from policy.rules import Access, AccessList, Rule
from policy.snaps.installed import SNAP_TYPE, Snap, World
from tests.helpers.records import EMPTY_DICT, make_record, make_snapshot, make_state

WORLD = World(snaps=(Snap(name="a"),), connections=(("a:p", "b:s"),))
CLOCK = 1_700_000_000  # no counter that was salvaged is as high
GIVEN = Rule(access=frozenset({Access.SEND}), name="org.a", origin="AddServer by :1.1")
LATER = Rule(access=frozenset({Access.SEND}), name="org.b", origin="ChangeAccess by :1.2")
CONNECTED = Rule(access=frozenset({Access.SEND}), name="org.c", origin="dbus plug a:p (x.toml)")


def make_file(path: Path, count: int = 5) -> None:
    with open_state(path) as state:
        for number in range(count):
            state.put(make_record(number))
        state.skip_to(42)
        state.put_world(WORLD)
        state.put_field_request("session", ":1.2")
        state.put_bus_id("session", "abc")
        state.set_pending_recovery(None)


@contextmanager
def edited(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path)) as db, db:
        yield db


def cut_off(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)


def run_sql(statement: str) -> object:
    def damage(path: Path) -> None:
        with edited(path) as db:
            db.execute(statement)

    return damage


# What happens to the file; the sandboxes that are left of five, the counter, and whether the snaps are.
DAMAGES = {
    "noise": (noise, 0, None, False),
    "cut off": (cut_off, 0, None, False),
    "no version": (run_sql("PRAGMA user_version = 0"), 0, None, False),
    "negative version": (run_sql("PRAGMA user_version = -3"), 0, None, False),
    "no counter": (run_sql("DROP TABLE counter"), 5, None, True),
    "odd counter": (run_sql("UPDATE counter SET next = 'x'"), 5, None, True),
    "two counters": (run_sql("INSERT INTO counter VALUES (3)"), 5, None, True),
    "no sandboxes": (run_sql("DROP TABLE sandbox"), 0, 42, True),
    "a record": (run_sql("UPDATE sandbox SET record = x'c0' WHERE number = 2"), 4, 42, True),
    "a text": (run_sql("UPDATE sandbox SET record = 'x' WHERE number = 2"), 4, 42, True),
    "another's record": (run_sql("UPDATE sandbox SET number = 9 WHERE number = 2"), 4, 42, True),
    "a snap": (run_sql("UPDATE snap SET snap = x'c0'"), 5, 42, False),
    "a half snap": (run_sql("UPDATE snap SET snap = x'ff'"), 5, 42, False),
    "a number for a snap": (run_sql("UPDATE snap SET snap = 3"), 5, 42, False),
    "the kind of system": (run_sql("UPDATE system SET kind = 'attic'"), 5, 42, False),
    "no snaps": (run_sql("DROP TABLE snap"), 5, 42, False),
    "a tag": (run_sql("UPDATE tag SET bus = x'00'"), 5, 42, True),
    "no buses, no tags": (run_sql("DROP TABLE tag"), 5, 42, True),
    "no note": (run_sql("DROP TABLE unsettled"), 5, 42, True),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_can_be_read_is_used_and_the_file_is_kept(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, left, counter, has_snaps = DAMAGES[name]
    path = tmp_path / "state.db"
    make_file(path)
    assert callable(damage)
    damage(path)
    before = path.read_bytes()
    for _ in range(2):  # whoever opens it next sees the same
        with open_state(path) as state:
            records, next_number = state.load()
            assert len(records) == left
            assert next_number == counter if counter is not None else next_number > CLOCK
            assert state.load_world() == (WORLD if has_snaps else World())
            assert state.pending_recovery() == PendingRecovery(
                aside="state.db.damaged-1", snaps_lost=not has_snaps
            )
            if left and "tag" not in name:
                assert state.load_field_requests() == [("session", ":1.2")]
                assert state.load_bus_ids() == {"session": "abc"}
    assert (tmp_path / "state.db.damaged-1").read_bytes() == before
    (line,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.levelno == logging.ERROR
    assert re.search("is damaged .*: kept as state.db.damaged-1", line.getMessage())
    assert "\n" not in line.getMessage()
    assert ("load the snaps again" in line.getMessage()) is not has_snaps
    assert sorted(one.name for one in tmp_path.iterdir()) == ["state.db", "state.db.damaged-1"]


def test_damaged_files_are_kept_in_bounded_number_with_their_journals(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    for _ in range(KEPT_ASIDE + 3):
        path.write_bytes(b"noise" * 100)
        Path(f"{path}-wal").write_bytes(b"more noise")
        with open_state(path):
            pass
    kept = {one.name for one in tmp_path.iterdir()}
    numbers = range(4, KEPT_ASIDE + 4)
    assert kept == {"state.db"} | {
        f"state.db.damaged-{n}{ending}" for n in numbers for ending in ("", "-wal")
    }


def kill(path: Path, *statements: str) -> None:
    """Leave the file as after a kill: all of it is in the journal."""
    first = StateFile(path.with_name("first.db"))
    first.put(make_record(1))
    for statement in statements:
        first._db.execute(statement)
        first._db.commit()
    for ending in ("", "-wal"):
        shutil.copyfile(f"{path.parent}/first.db{ending}", f"{path}{ending}")
    first.close()


def test_what_is_only_in_the_journal_is_read_as_well(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    kill(path, "INSERT INTO sandbox VALUES (2, x'c0')")
    with open_state(path) as state:
        assert state.load() == ([make_record(1)], 2)
    assert Path(f"{path}.damaged-1-wal").stat().st_size > 0


def test_a_file_that_was_cut_off_may_still_have_its_journal(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    kill(path)
    path.write_bytes(b"")
    journal = Path(f"{path}-wal").read_bytes()
    with open_state(path) as state:
        assert state.pending_recovery() is not None
    assert Path(f"{path}.damaged-1-wal").read_bytes() == journal


def test_a_journal_that_is_lost_is_not_taken_for_an_empty_state(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    kill(path)
    Path(f"{path}-wal").unlink()
    with open_state(path) as state:
        assert state.pending_recovery() is not None
    assert Path(f"{path}.damaged-1").exists()


@settings(max_examples=40)
@given(data=st.data())
def test_no_page_torn_out_of_it_makes_it_empty_in_silence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("state") / "state.db"
    large = AccessList(rules=(GIVEN,) * 60)
    with open_state(path) as state:
        for number in range(20):
            state.put(make_record(number, access=large))
        state.set_pending_recovery(None)
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.sampled_from([1, 16, 512, 4096]))
    content[start : start + length] = data.draw(st.sampled_from([b"\0", b"\xff"])) * len(
        content[start : start + length]
    )
    path.write_bytes(content)
    try:
        with open_state(path) as state:
            records, next_number = state.load()
            told = state.pending_recovery() is not None
    except ConfigError as exc:  # the version may say that it is of a newer program
        assert "version" in str(exc)  # noqa: PT017
        return
    assert told == path.with_name("state.db.damaged-1").exists()
    if not told:
        assert (len(records), next_number) == (20, 20)
    assert all(record.number < next_number for record in records)


def test_a_damaged_file_that_cannot_be_set_aside_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.db"
    noise(path)

    def fail(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", fail)
    # No ConfigError: that would be for ever.
    with pytest.raises(NoRoomError, match=r"is damaged .* cannot be set aside: No space left"):
        with open_state(path):
            pass
    assert path.read_bytes().startswith(b"this is no database")


def test_the_journal_of_a_file_that_was_taken_away_is_none_of_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with open_state(path) as state:
        state.put(make_record(0))
        # As a kill leaves them.
        left = {one: one.read_bytes() for one in tmp_path.glob("state.db-*")}
    assert {one.name for one in left} == {"state.db-wal", "state.db-shm"}
    path.unlink()
    for one, content in left.items():
        one.write_bytes(content)
    with open_state(path) as state:
        assert state.load() == ([], 0)


# -- what the gate knows ------------------------------------------------------------------------------


def as_in_gate(record: Record, *rules: Rule, **fields: object) -> SandboxState:
    """Return what the gate says of a sandbox that was added so, and is under these rules now."""
    access = AccessList(rules=(*rules, *BUILT_IN)) if rules else record.access_in_force
    spec, _ = make_spec(record, access, {}, None, ConfiguredLimits())
    return make_state(record, **{"spec": spec, **fields})


def opened(tmp_path: Path, *damage: str) -> StateFile:
    path = tmp_path / "state.db"
    make_file(path, 1)
    for statement in damage:
        with edited(path) as db:
            db.execute(statement)
    with open_state(path):
        pass
    return StateFile(path)


def settled(state: StateFile, *states: SandboxState) -> Registry:
    records, next_number = state.load()
    registry = Registry(ConfiguredLimits(), records, next_number)
    for record in recover_from_gate(registry, state, make_snapshot(*states)):
        assert registry.find(record.id).record == record
    assert state.pending_recovery() is None
    records, next_number = state.load()
    assert records == [sandbox.record for sandbox in registry]
    assert next_number == registry.next_number
    return registry


def reconciled(registry: Registry, *states: SandboxState) -> None:
    """After that, both are of one mind."""
    result = registry.reconcile(make_snapshot(*states))
    assert not any((result.strangers, result.other_access, result.lost))


def test_what_the_file_lost_the_gate_tells(tmp_path: Path) -> None:
    state = opened(tmp_path, "UPDATE sandbox SET record = x'c0'", "DROP TABLE counter")
    record = make_record(
        0, metadata=b"meta-data", component="part", plugs=("p",), access=AccessList(rules=(GIVEN,))
    )
    ended = make_record(7, listening=False)
    states = (as_in_gate(record, GIVEN, LATER), as_in_gate(ended, listening=False))
    registry = settled(state, *states)
    assert registry.find("c0").record == msgspec.structs.replace(
        record, access=AccessList(rules=(GIVEN, LATER))
    )
    assert not registry.find("c7").record.listening
    assert registry.next_number > CLOCK
    reconciled(registry, *states)
    state.close()


def test_rules_of_lost_connections_stay_in_force(tmp_path: Path) -> None:
    state = opened(tmp_path, "UPDATE snap SET snap = x'c0'")
    record = make_record(0, type=SNAP_TYPE, component="x", access=AccessList(rules=(GIVEN,)))
    states = (as_in_gate(record, GIVEN, LATER, CONNECTED),)
    registry = settled(state, *states)
    found = registry.find("c0").record
    assert found.access == AccessList(rules=(GIVEN, LATER))
    assert found.held == AccessList(rules=(CONNECTED,))
    assert found.access_in_force == states[0].spec.access
    assert found.in_force(AccessList()).rules == (GIVEN, LATER, *BUILT_IN)
    reconciled(registry, *states)
    state.close()


def test_connections_that_were_not_lost_are_not_held(tmp_path: Path) -> None:
    state = opened(tmp_path, "DROP TABLE counter")
    record = make_record(0, type=SNAP_TYPE, component="x")
    registry = settled(state, as_in_gate(record, CONNECTED))
    assert registry.find("c0").record == record
    state.close()


def test_a_gate_that_was_given_no_record_tells_what_it_has(tmp_path: Path) -> None:
    state = opened(tmp_path, "DROP TABLE sandbox")
    registry = settled(state, make_state(make_record(3)))
    record = registry.find("c3").record
    assert (record.type, record.app, record.uid) == ("org.example.Type", "app", 1000)
    assert (record.metadata, record.credentials) == (NO_VALUES, EMPTY_DICT)
    assert (record.creator, record.keep_after_creator) == ("", True)
    assert record.plugs == (UNKNOWN_PLUG,)
    state.close()


def test_no_file_is_asked_of_the_gate_and_no_gate_is_a_first_start(tmp_path: Path) -> None:
    with open_state(tmp_path / "state.db") as state:
        assert state.pending_recovery() == PendingRecovery(aside="", snaps_lost=False)
        assert settled(state).next_number == 0
    with open_state(tmp_path / "other.db") as state:
        registry = settled(state, as_in_gate(make_record(3)))
        assert [sandbox.record.id for sandbox in registry] == ["c3"]
        assert registry.next_number > CLOCK


def test_a_sandbox_of_a_number_never_given_means_that_the_counter_is_old(tmp_path: Path) -> None:
    state = opened(tmp_path, "DROP TABLE tag")
    registry = settled(state, as_in_gate(make_record(0)), as_in_gate(make_record(50)))
    assert registry.get("c50")
    assert registry.next_number > CLOCK
    state.close()


def test_a_settled_file_takes_nothing_over(tmp_path: Path) -> None:
    state = opened(tmp_path)
    states = (as_in_gate(make_record(0)), as_in_gate(make_record(9)))
    registry = settled(state, *states)
    assert registry.get("c9") is None
    assert registry.next_number == 42
    assert registry.reconcile(make_snapshot(*states)).strangers == ("c9",)
    state.close()


def test_what_is_being_made_is_left_to_who_makes_it(tmp_path: Path) -> None:
    state = opened(tmp_path, "DROP TABLE counter")
    registry = Registry(ConfiguredLimits(), [], 100)
    registry.add(make_record(0))
    snapshot: Snapshot = make_snapshot(as_in_gate(make_record(0), LATER))
    assert recover_from_gate(registry, state, snapshot) == []
    state.close()


def test_a_full_disk_leaves_it_to_be_asked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = opened(tmp_path, "DROP TABLE counter")
    state._db.execute("PRAGMA query_only = ON")
    registry = Registry(ConfiguredLimits(), *state.load())
    adopted = recover_from_gate(registry, state, make_snapshot(as_in_gate(make_record(7))))
    assert [record.id for record in adopted] == ["c7"]
    assert "read-only" in caplog.text
    assert state.pending_recovery() is not None
    state._db.execute("PRAGMA query_only = OFF")
    assert recover_from_gate(registry, state, make_snapshot(as_in_gate(make_record(7)))) == []
    assert [record.id for record in state.load()[0]] == ["c0", "c7"]
    state.close()
