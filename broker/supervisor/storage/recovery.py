"""Open a state file that may be damaged, and recover records from the gate.

Theory of operation. A damaged file is kept beside a new one, which gets everything that can still be read: each
record by itself, the snaps and connections all or none, the counter or else the clock. The new file also says
that the gate has to be asked for the rest, so a supervisor that dies before asking loses nothing:

    open_state           sandboxes.db is damaged   ->   sandboxes.db.damaged-1, and a new sandboxes.db
                         new file: the readable contents, and a PendingRecovery
    first snapshot       recover_from_gate         ->   records that differ from the file are replaced
                         new file: all records, no PendingRecovery

The gate's word counts more than the file's, because the gate keeps the record of each sandbox as it was when the
sandbox was made, and has the rules in force.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from broker.control_protocol.messages import SandboxState, Snapshot
from broker.supervisor.sandboxes.registry import OWN_CALLS, PORTAL_RULES, Record, Registry
from broker.supervisor.storage.state_file import (
    DamagedError,
    PendingRecovery,
    StateFile,
    decode_record,
    unusable,
)
from broker.wire.address import make_unix_address
from broker.wire.errors import CallRefusedError
from policy.rules import AccessList, Rule
from policy.snaps.installed import SNAP_TYPE, World

LOGGER: Final = logging.getLogger(__name__)
KEPT_ASIDE: Final = 5  # damaged files; older files are deleted
NO_VALUES: Final = bytes(8)  # a marshalled a{sv}
# Stands for the plugs of a sandbox whose plugs are unknown. No snap has a plug of this name, so it gets none.
UNKNOWN_PLUG: Final = "?"
_JOURNAL: Final = "-wal"
# The origin of a rule that a caller gave names the caller; the origin of a snap's rule does not.
_BY_CALLER: Final = re.compile(r"[A-Za-z0-9_]+ by ")


@contextmanager
def open_state(path: Path) -> Iterator[StateFile]:
    """Open the state file, or set a damaged file aside. Raises ConfigError or NoRoomError."""
    state = _open(path)
    try:
        yield state
    finally:
        state.close()


def recover_from_gate(registry: Registry, state: StateFile, snapshot: Snapshot) -> list[Record]:
    """Recover and return the records that the file has lost, from the gate."""
    pending = state.pending_recovery()
    if pending is None:
        return []
    theirs = {number: one for one in snapshot.sandboxes if (number := _number(one.spec.id)) >= 0}
    if any(number >= registry.next_number for number in theirs):
        # The counter is lost or too low. Even higher numbers may have been used, but none beyond the clock.
        registry.next_number = max(registry.next_number, *(n + 1 for n in theirs), _clock())
    snaps_lost = pending.snaps_lost or not pending.aside
    recovered = [
        record
        for number, one in theirs.items()
        if (record := _recover(registry, number, one, snaps_lost=snaps_lost)) is not None
    ]
    for record in recovered:
        state.put_fact(record)
    try:
        state.skip_to(registry.next_number)
        state.set_pending_recovery(None)
    except CallRefusedError as exc:  # the next snapshot is another chance
        LOGGER.error("%s", exc)  # noqa: TRY400 - no defect of ours
    if recovered:
        LOGGER.warning(
            "%d sandboxes taken over from the gate, which knew them better than the state file: %s",
            len(recovered),
            ", ".join(record.id for record in recovered[:20]),
        )
    return recovered


def record_from_gate(state: SandboxState, known: Record | None, *, snaps_lost: bool) -> Record:
    """Return the record of a sandbox by the gate's word, and else `known`."""
    spec = state.spec
    original = known
    if spec.record:
        with contextlib.suppress(DamagedError):
            original = decode_record(_number(spec.id), spec.record)
    record = original if original is not None else _minimal_record(state)
    given, compiled = _split_rules(record, spec.access)
    held = None
    if snaps_lost and compiled:
        held = msgspec.structs.replace(spec.access, rules=compiled)
    access = msgspec.structs.replace(record.access, rules=given)
    return msgspec.structs.replace(record, access=access, held=held, listening=state.listening)


@dataclass(slots=True, kw_only=True)
class _Salvaged:
    """The readable contents of a damaged file."""

    records: list[Record]
    next_number: int | None = None
    world: World | None = None
    field_requests: list[tuple[str, str]] = field(default_factory=list)
    bus_ids: dict[str, str] = field(default_factory=dict)


def _open(path: Path) -> StateFile:
    if not path.exists():
        _clear(path)  # because a leftover journal would be applied to the new file
        # Made under another name and renamed, so that an empty file is always damaged.
        new = _clear(path.with_name(f"{path.name}.new"))
        StateFile(new).close()
        _take_its_place(new, path)
    with _held_journal(path) as journal:
        try:
            state = StateFile(path)
            try:
                state.check()
            except BaseException:
                state.close()
                raise
        except DamagedError as exc:
            return _replace(path, journal, " ".join(str(exc).split()))
        return state


@contextmanager
def _held_journal(path: Path) -> Iterator[Path]:
    """Link the journal under another name, because SQLite may delete a journal."""
    # SQLite deletes one that stands beside a file that is no database.
    held = Path(f"{path}.held{_JOURNAL}")
    held.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        os.link(f"{path}{_JOURNAL}", held)
    try:
        yield held
    finally:
        held.unlink(missing_ok=True)


def _replace(path: Path, journal: Path, reason: str) -> StateFile:
    try:
        found = _salvage(path, journal)
        new = _clear(path.with_name(f"{path.name}.new"))
        aside = _aside(path)
        _fill(new, found, aside.name)
        _set_aside(path, journal, aside)
        _take_its_place(new, path)
    except (OSError, CallRefusedError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else exc
        text = f"{path} is damaged ({reason}), and cannot be set aside: {why}"
        raise unusable(text, exc) from exc
    LOGGER.error(
        "%s is damaged (%s): kept as %s; recovered: %d sandboxes, %s; the gate is asked for the rest%s",
        path,
        reason,
        aside.name,
        len(found.records),
        "the snaps and connections" if found.world is not None else "no snaps and connections",
        ""
        if found.world is not None
        else "; load the snaps again: until then, apps of snaps keep their present rules",
    )
    return StateFile(path)


def _salvage(path: Path, journal: Path) -> _Salvaged:
    """Read all that is readable, from a copy, because SQLite changes each opened file."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="salvage-") as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(journal, f"{copy}{_JOURNAL}")
        try:
            state = StateFile(copy)
        except DamagedError:
            return _Salvaged(records=[])
        try:
            return _read(state)
        finally:
            state.close()


def _read(state: StateFile) -> _Salvaged:
    # `load_each` may yield a record twice.
    records = {record.number: record for record in state.load_each()}
    found = _Salvaged(records=list(records.values()))
    with contextlib.suppress(DamagedError):
        found.next_number = state.load_counter()
    with contextlib.suppress(DamagedError):
        found.world = state.load_world()
    with contextlib.suppress(DamagedError):
        found.field_requests = state.load_field_requests()
    with contextlib.suppress(DamagedError):
        found.bus_ids = state.load_bus_ids()
    return found


def _fill(path: Path, found: _Salvaged, aside: str) -> None:
    state = StateFile(path)
    try:
        for record in found.records:
            state.put(record)
        state.skip_to(found.next_number if found.next_number is not None else _clock())
        if found.world is not None:
            state.put_world(found.world)
        for bus, unique_name in found.field_requests:
            state.put_field_request(bus, unique_name)
        for bus, id_ in found.bus_ids.items():
            state.put_bus_id(bus, id_)
        state.set_pending_recovery(PendingRecovery(aside=aside, snaps_lost=found.world is None))
    finally:
        state.close()


def _aside(path: Path) -> Path:
    """Return the new name for a damaged file, and delete the oldest of those kept."""
    kept = sorted(
        number
        for one in path.parent.glob(f"{path.name}.damaged-*")
        if (number := _number(one.name.rpartition("-")[2])) >= 0
    )
    for number in kept[: max(0, len(kept) - KEPT_ASIDE + 1)]:
        _clear(path.with_name(f"{path.name}.damaged-{number}"))
    return path.with_name(f"{path.name}.damaged-{kept[-1] + 1 if kept else 1}")


def _set_aside(path: Path, journal: Path, aside: Path) -> None:
    # The file stays until the new file is in place. The journal must go, or SQLite would apply the journal to the new file.
    os.link(path, aside)
    with contextlib.suppress(FileNotFoundError):
        journal.rename(f"{aside}{_JOURNAL}")
    for ending in (_JOURNAL, "-shm"):
        Path(f"{path}{ending}").unlink(missing_ok=True)


def _take_its_place(new: Path, path: Path) -> None:
    # Closing a file empties the journal, unless the disk is full.
    if Path(f"{new}{_JOURNAL}").exists():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(new))
    new.rename(path)


def _clear(path: Path) -> Path:
    for ending in ("", _JOURNAL, "-shm"):
        Path(f"{path}{ending}").unlink(missing_ok=True)
    return path


def _recover(
    registry: Registry, number: int, state: SandboxState, *, snaps_lost: bool
) -> Record | None:
    """Put the gate's record into the registry; return the record if changed."""
    known = registry.get(state.spec.id)
    if known is not None and not known.is_announced:
        return None  # AddServer is still at work
    before = known.record if known is not None else None
    record = record_from_gate(state, before, snaps_lost=snaps_lost)
    assert record.number == number
    if before is None:
        registry.restore(record)
    elif before == record:
        return None
    else:
        registry.update(record)
    return record


def _minimal_record(state: SandboxState) -> Record:
    """Make a record from the state of a sandbox whose gate was given no record."""
    spec = state.spec
    paths = {one.bus: one.path for one in spec.listeners if one.path}
    return Record(
        number=_number(spec.id),
        type=spec.identity.type,
        app=spec.identity.app,
        component=spec.identity.component,
        metadata=NO_VALUES,
        uid=spec.uid,
        creator="",
        creator_bus="",
        credentials=NO_VALUES,
        sockets=paths,
        addresses={
            one.bus: make_unix_address(one.path, one.guid) for one in spec.listeners if one.path
        },
        access=msgspec.structs.replace(spec.access, rules=()),
        portals_as_host=not set(PORTAL_RULES) <= set(spec.access.rules),
        # The creator is unknown, so the sandbox cannot follow the creator.
        keep_after_creator=True,
        close_notify=spec.close_notify is not None,
        plugs=(UNKNOWN_PLUG,),
        created=time.time(),
    )


def _split_rules(record: Record, access: AccessList) -> tuple[tuple[Rule, ...], tuple[Rule, ...]]:
    """Return callers' rules and those of snaps' connections, without built-in ones."""
    rules = [r for r in access.rules if r not in record.built_in and r.origin != OWN_CALLS]
    if record.type != SNAP_TYPE:
        return tuple(rules), ()
    given = [r for r in rules if r in record.access.rules or _BY_CALLER.match(r.origin)]
    return tuple(given), tuple(rule for rule in rules if rule not in given)


def _number(text: str) -> int:
    digits = text.removeprefix("c")
    return int(digits) if digits.isascii() and digits.isdigit() else -1


def _clock() -> int:
    """Return a number that no sandbox has: the seconds since 1970."""
    return int(time.time())
