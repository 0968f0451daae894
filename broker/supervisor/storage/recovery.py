"""Opening the state file, whatever has become of it; and taking over from the gate what the file lost.

Theory of operation. A file that is damaged is kept beside the new one, which gets what can still be read: each record by
itself, the snaps and their connections all or none, the counter or else the clock. What is left to be asked of the gate is noted in
the new file, so that our own end before we have asked changes nothing. The gate's word then goes
before the file's: it keeps the record of each sandbox as it was when it was made, and has the rules in force.
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
KEPT_ASIDE: Final = 5  # damaged files; the oldest go
NO_VALUES: Final = bytes(8)  # a marshalled a{sv}
# No snap has a plug of this name: a sandbox whose plugs are not known gets none.
UNKNOWN_PLUG: Final = "?"
_JOURNAL: Final = "-wal"
# What callers gave says who they were; what the connections of snaps gave does not.
_BY_CALLER: Final = re.compile(r"[A-Za-z0-9_]+ by ")


@contextmanager
def open_state(path: Path) -> Iterator[StateFile]:
    """Open the state file; one that is damaged is set aside. Raises ConfigError or NoRoomError if it cannot be used."""
    state = _open(path)
    try:
        yield state
    finally:
        state.close()


def recover_from_gate(registry: Registry, state: StateFile, snapshot: Snapshot) -> list[Record]:
    """Take over from the gate what the file does not know, if there is such; return that."""
    unsettled = state.unsettled()
    if unsettled is None:
        return []
    theirs = {number: one for one in snapshot.sandboxes if (number := _number(one.spec.id)) >= 0}
    if any(number >= registry.next_number for number in theirs):
        # The counter is lost, or an old one. There were more, perhaps: the clock is ahead of all numbers.
        registry.next_number = max(registry.next_number, *(n + 1 for n in theirs), _clock())
    snaps_lost = unsettled.snaps_lost or not unsettled.aside
    adopted = [
        record
        for number, one in theirs.items()
        if (record := _take_over(registry, number, one, snaps_lost=snaps_lost)) is not None
    ]
    for record in adopted:
        state.put_fact(record)
    try:
        state.skip_to(registry.next_number)
        state.unsettle(None)
    except CallRefusedError as exc:  # it is asked again of the next snapshot
        LOGGER.error("%s", exc)  # noqa: TRY400 - no defect of ours
    if adopted:
        LOGGER.warning(
            "%d sandboxes taken over from the gate, which knew them better than the state file: %s",
            len(adopted),
            ", ".join(record.id for record in adopted[:20]),
        )
    return adopted


def record_from_gate(state: SandboxState, known: Record | None, *, snaps_lost: bool) -> Record:
    """Return the record of a sandbox as the gate has it."""
    spec = state.spec
    noted = known
    if spec.record:
        with contextlib.suppress(DamagedError):
            noted = decode_record(_number(spec.id), spec.record)
    record = noted if noted is not None else _minimal_record(state)
    given, compiled = _split_rules(record, spec.access)
    held = None
    if snaps_lost and compiled:
        held = msgspec.structs.replace(spec.access, rules=compiled)
    access = msgspec.structs.replace(record.access, rules=given)
    return msgspec.structs.replace(record, access=access, held=held, listening=state.listening)


@dataclass(slots=True, kw_only=True)
class _Found:
    """What a damaged file still says."""

    records: list[Record]
    next_number: int | None = None
    world: World | None = None
    tags: list[tuple[str, str]] = field(default_factory=list)
    bus_ids: dict[str, str] = field(default_factory=dict)


def _open(path: Path) -> StateFile:
    if not path.exists():
        _clear(path)  # a journal that was left behind would be taken for the new one's
        # Made under another name, so that a file that holds nothing is always one that lost it.
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
    """Keep the journal: SQLite deletes one that it finds beside a file that is no database."""
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
        "%s is damaged (%s): kept as %s; read from it: %d sandboxes, %s; the gate is asked for the rest%s",
        path,
        reason,
        aside.name,
        len(found.records),
        "the snaps and connections" if found.world is not None else "no snaps and connections",
        ""
        if found.world is not None
        else "; load the snaps again, until then apps of snaps keep the rules they have",
    )
    return StateFile(path)


def _salvage(path: Path, journal: Path) -> _Found:
    """Read what can be read, from a copy: SQLite changes what it opens."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="salvage-") as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(journal, f"{copy}{_JOURNAL}")
        try:
            state = StateFile(copy)
        except DamagedError:
            return _Found(records=[])
        try:
            return _read(state)
        finally:
            state.close()


def _read(state: StateFile) -> _Found:
    # Also by whoever is told the sandbox's id: of two that are equal one is as good as the other.
    records = {record.number: record for record in state.load_each()}
    found = _Found(records=list(records.values()))
    with contextlib.suppress(DamagedError):
        found.next_number = state.load_counter()
    with contextlib.suppress(DamagedError):
        found.world = state.load_world()
    with contextlib.suppress(DamagedError):
        found.tags = state.load_tags()
    with contextlib.suppress(DamagedError):
        found.bus_ids = state.load_bus_ids()
    return found


def _fill(path: Path, found: _Found, aside: str) -> None:
    state = StateFile(path)
    try:
        for record in found.records:
            state.put(record)
        state.skip_to(found.next_number if found.next_number is not None else _clock())
        if found.world is not None:
            state.put_world(found.world)
        for bus, unique_name in found.tags:
            state.put_tag(bus, unique_name)
        for bus, id_ in found.bus_ids.items():
            state.put_bus_id(bus, id_)
        state.unsettle(PendingRecovery(aside=aside, snaps_lost=found.world is None))
    finally:
        state.close()


def _aside(path: Path) -> Path:
    """Return the name for a damaged file, and make room for it."""
    kept = sorted(
        number
        for one in path.parent.glob(f"{path.name}.damaged-*")
        if (number := _number(one.name.rpartition("-")[2])) >= 0
    )
    for number in kept[: max(0, len(kept) - KEPT_ASIDE + 1)]:
        _clear(path.with_name(f"{path.name}.damaged-{number}"))
    return path.with_name(f"{path.name}.damaged-{kept[-1] + 1 if kept else 1}")


def _set_aside(path: Path, journal: Path, aside: Path) -> None:
    # The file stays until the new one takes its place. Its journal must go: it would be taken for the new one's.
    os.link(path, aside)
    with contextlib.suppress(FileNotFoundError):
        journal.rename(f"{aside}{_JOURNAL}")
    for ending in (_JOURNAL, "-shm"):
        Path(f"{path}{ending}").unlink(missing_ok=True)


def _take_its_place(new: Path, path: Path) -> None:
    if Path(f"{new}{_JOURNAL}").exists():  # closing it had it all in one file, if there was room
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(new))
    new.rename(path)


def _clear(path: Path) -> Path:
    for ending in ("", _JOURNAL, "-shm"):
        Path(f"{path}{ending}").unlink(missing_ok=True)
    return path


def _take_over(
    registry: Registry, number: int, state: SandboxState, *, snaps_lost: bool
) -> Record | None:
    """Have in the registry what the gate has; return it if that is news."""
    known = registry.get(state.spec.id)
    if known is not None and not known.is_known:
        return None  # it is being made
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
    """Make a record of what a gate knows that was given none."""
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
        # Whom it should follow is not known: it ends with its last connection, its pipe, or when told.
        keep_after_creator=True,
        close_notify=spec.close_notify is not None,
        plugs=(UNKNOWN_PLUG,),
        created=time.time(),
    )


def _split_rules(record: Record, access: AccessList) -> tuple[tuple[Rule, ...], tuple[Rule, ...]]:
    """Return the rules that callers gave and those of connections; without the built-in ones."""
    rules = [r for r in access.rules if r not in record.built_in and r.origin != OWN_CALLS]
    if record.type != SNAP_TYPE:
        return tuple(rules), ()
    given = [r for r in rules if r in record.access.rules or _BY_CALLER.match(r.origin)]
    return tuple(given), tuple(rule for rule in rules if rule not in given)


def _number(text: str) -> int:
    digits = text.removeprefix("c")
    return int(digits) if digits.isascii() and digits.isdigit() else -1


def _clock() -> int:
    """Return a number that no sandbox has: nobody makes one a second since 1970."""
    return int(time.time())
