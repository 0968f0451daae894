"""The state file, in SQLite: sandboxes, snaps and connections.

Each change is committed before the function returns, and so before the caller is answered. The file lives as long as
the runtime folder, a tmpfs. The file survives a kill, and need not survive a power cut.

A change that cannot be stored is refused. A fact, such as the end of a sandbox, cannot be refused: a fact that cannot be
stored is owed, and stored together with the next change.

A damaged file is set aside by recovery.py. The format is pinned by a recorded file in tests/data/, see
tests/supervisor/storage/test_recorded_state.py.
"""

import errno
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from broker.supervisor.sandboxes.registry import Record
from broker.wire.errors import FAILED, BrokerError, CallRefusedError, ConfigError
from policy.snaps.installed import SnapError, World, parse_world

LOGGER: Final = logging.getLogger(__name__)
# The statements that make each version of the file from the version before, and the first version from nothing.
STEPS: Final = (
    """
    CREATE TABLE sandbox (number INTEGER PRIMARY KEY, record BLOB NOT NULL);
    CREATE TABLE counter (next INTEGER NOT NULL);
    INSERT INTO counter VALUES (0);
    """,
    """
    CREATE TABLE system (kind TEXT NOT NULL);
    CREATE TABLE snap (name TEXT PRIMARY KEY, snap BLOB NOT NULL);
    CREATE TABLE connection (plug TEXT, slot TEXT, PRIMARY KEY (plug, slot));
    """,
    # At most a single row, a PendingRecovery.
    """
    CREATE TABLE unsettled (aside TEXT NOT NULL, snaps_lost INTEGER NOT NULL);
    """,
    # Connections that requested the instance field; and the ids of the buses that gave the names.
    """
    CREATE TABLE tag (bus TEXT, unique_name TEXT, PRIMARY KEY (bus, unique_name));
    CREATE TABLE bus (name TEXT PRIMARY KEY, id TEXT NOT NULL);
    """,
)
SCHEMA: Final = len(STEPS)
# Errors of SQLite that a damaged file causes: no such table, a table of another form, a torn page, no database.
_DAMAGE: Final = {
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_NOTADB,
}
_ADVICE: Final = {
    sqlite3.SQLITE_FULL: "no space left on its disk: make room",
    sqlite3.SQLITE_READONLY: "the file is read-only: make it writable",
    sqlite3.SQLITE_IOERR: "the file cannot be read or written: is its disk full?",
}


class DamagedError(BrokerError):
    """The file's contents are not those that were stored, so the file must be set aside."""


class NoRoomError(BrokerError):
    """The disk is full, which is worth another try."""


class PendingRecovery(msgspec.Struct, frozen=True, kw_only=True):
    """A note that the gate must still be asked for records that the file lacks."""

    aside: str  # name of the damaged file; empty if the file was missing
    snaps_lost: bool  # together with the connections


class StateFile:
    """An open state file."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make a missing file. Raises DamagedError, ConfigError or NoRoomError."""
        is_new = not path.exists()
        if path.is_file() and not path.stat().st_size:
            raise DamagedError("the file is empty")
        self._path: Final = path
        self._encoder: Final = msgspec.msgpack.Encoder()
        # Facts that could not be stored at once; None stands for an end.
        self._owed: Final[dict[int, Record | None]] = {}
        try:
            self._db: Final = sqlite3.connect(path, isolation_level="IMMEDIATE")
        except sqlite3.Error as exc:
            raise unusable(f"cannot open {path}: {_explain(exc)}", exc) from exc
        try:
            with self._reading():
                self._prepare(is_new=is_new)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file, after a last try to store owed facts."""
        if self._owed:
            with suppress(CallRefusedError), self._writing():
                pass
        self._db.close()

    def check(self) -> None:
        """Read the whole file. Raises DamagedError."""
        with self._reading():
            ((verdict, *_),) = self._db.execute("PRAGMA quick_check(1)").fetchall()
        if verdict != "ok":
            raise DamagedError(verdict)
        self.load()
        self.load_world()
        self.load_field_requests()
        self.load_bus_ids()
        self.pending_recovery()

    def load(self) -> tuple[list[Record], int]:
        """Return all records and the next number. Raises DamagedError."""
        with self._reading():
            rows = self._db.execute("SELECT number, record FROM sandbox ORDER BY number").fetchall()
            return [decode_record(*row) for row in rows], self.load_counter()

    def load_each(self) -> Iterator[Record]:
        """Yield the readable records of a damaged file. A record may come twice."""
        # From both ends, each up to the torn page.
        for order in ("ASC", "DESC"):
            try:
                for row in self._db.execute(
                    f"SELECT number, record FROM sandbox ORDER BY number {order}"  # noqa: S608
                ):
                    try:
                        yield decode_record(*row)
                    except DamagedError as exc:
                        LOGGER.debug("%s: %s", self._path, exc)
            except sqlite3.Error as exc:
                LOGGER.debug("%s: %s", self._path, exc)

    def load_counter(self) -> int:
        """Return the next number. Raises DamagedError."""
        with self._reading():
            ((number,),) = self._db.execute("SELECT next FROM counter").fetchall()
            if not isinstance(number, int) or number < 0:
                raise DamagedError("the counter is not a number")
            return number

    def put(self, record: Record) -> None:
        """Store a record, new or changed, and keep the number from being used again. Raises CallRefusedError."""
        with self._writing():
            self._put(record)

    def put_fact(self, record: Record) -> None:
        """Store a record that states a fact, at once or with the next change."""
        self._owe(record.number, record)

    def delete(self, record: Record) -> None:
        """Delete a record but not the number, at once or with the next change."""
        self._owe(record.number, None)

    def skip_to(self, number: int) -> None:
        """Raise the next number to at least `number`. Raises CallRefusedError."""
        with self._writing():
            self._db.execute("UPDATE counter SET next = max(next, ?)", (number,))

    def load_world(self) -> World:
        """Return the snaps and connections. Raises DamagedError."""
        with self._reading():
            kinds = self._db.execute("SELECT kind FROM system").fetchall()
            snaps = self._db.execute("SELECT snap FROM snap ORDER BY name").fetchall()
            pairs = self._db.execute("SELECT plug, slot FROM connection ORDER BY plug, slot")
            data: dict[str, object] = {"connections": pairs.fetchall()}
            try:
                data["snaps"] = [msgspec.msgpack.decode(row[0]) for row in snaps]
                if kinds:
                    data["system"] = kinds[0][0]
                return parse_world(data)
            except (msgspec.MsgspecError, SnapError, UnicodeDecodeError, TypeError) as exc:
                raise DamagedError(f"a snap cannot be read: {exc}") from exc

    def put_world(self, world: World) -> None:
        """Store these snaps and connections in place of all others. Raises CallRefusedError."""
        rows = [(snap.name, self._encoder.encode(snap)) for snap in world.snaps]
        with self._writing():
            for table in ("system", "snap", "connection"):
                self._db.execute(f"DELETE FROM {table}")  # noqa: S608 - a constant
            self._db.execute("INSERT INTO system VALUES (?)", (world.system,))
            self._db.executemany("INSERT INTO snap VALUES (?, ?)", rows)
            self._db.executemany("INSERT INTO connection VALUES (?, ?)", world.connections)

    def put_connection(self, plug: str, slot: str) -> None:
        """Store a connection. Raises CallRefusedError."""
        with self._writing():
            self._db.execute("INSERT OR REPLACE INTO connection VALUES (?, ?)", (plug, slot))

    def delete_connection(self, plug: str, slot: str) -> None:
        """Delete a connection. Raises CallRefusedError."""
        with self._writing():
            self._db.execute("DELETE FROM connection WHERE plug = ? AND slot = ?", (plug, slot))

    def load_field_requests(self) -> list[tuple[str, str]]:
        """Return the connections that requested the instance field, as (bus, unique name). Raises DamagedError."""
        with self._reading():
            rows = self._db.execute("SELECT bus, unique_name FROM tag ORDER BY rowid").fetchall()
            if not all(isinstance(text, str) for row in rows for text in row):
                raise DamagedError("a request for the instance field is not text")
            return rows

    def put_field_request(self, bus: str, unique_name: str) -> None:
        """Store a connection's request for the instance field. Raises CallRefusedError."""
        with self._writing():
            self._db.execute("INSERT OR REPLACE INTO tag VALUES (?, ?)", (bus, unique_name))

    def delete_field_request(self, bus: str, unique_name: str) -> None:
        """Delete a connection's request for the instance field. Raises CallRefusedError."""
        with self._writing():
            self._db.execute(
                "DELETE FROM tag WHERE bus = ? AND unique_name = ?", (bus, unique_name)
            )

    def load_bus_ids(self) -> dict[str, str]:
        """Return the ids of the buses last seen, by name. Raises DamagedError."""
        with self._reading():
            rows = self._db.execute("SELECT name, id FROM bus").fetchall()
            if not all(isinstance(text, str) for row in rows for text in row):
                raise DamagedError("the id of a bus is not text")
            return dict(rows)

    def put_bus_id(self, bus: str, id_: str) -> None:
        """Store the id of a bus. Raises CallRefusedError."""
        with self._writing():
            self._db.execute("INSERT OR REPLACE INTO bus VALUES (?, ?)", (bus, id_))

    def pending_recovery(self) -> PendingRecovery | None:
        """Return the note that the gate must be asked, if there is a note. Raises DamagedError."""
        with self._reading():
            rows = self._db.execute("SELECT aside, snaps_lost FROM unsettled").fetchall()
        return PendingRecovery(aside=rows[0][0], snaps_lost=bool(rows[0][1])) if rows else None

    def set_pending_recovery(self, pending: PendingRecovery | None) -> None:
        """Store the note that the gate must be asked; None after the answer. Raises CallRefusedError."""
        with self._writing():
            self._db.execute("DELETE FROM unsettled")
            if pending is not None:
                self._db.execute(
                    "INSERT INTO unsettled VALUES (?, ?)", (pending.aside, pending.snaps_lost)
                )

    def _prepare(self, *, is_new: bool) -> None:
        # A single writer on a tmpfs needs no fsync, and a small cache saves memory.
        for pragma in ("journal_mode = WAL", "synchronous = OFF", "cache_size = -256"):
            self._db.execute(f"PRAGMA {pragma}").fetchall()
        ((version,),) = self._db.execute("PRAGMA user_version").fetchall()
        if version > SCHEMA:
            raise ConfigError(
                f"{self._path} has version {version}, and this program reads up to {SCHEMA}:"
                " run the newer program, or move the file away"
            )
        if version < 0 or (version == 0 and not is_new):
            raise DamagedError("the file has no version")
        if version < SCHEMA:
            steps = "".join(STEPS[version:])
            if is_new:
                steps += "INSERT INTO unsettled VALUES ('', 0);"
            self._db.executescript(f"BEGIN; {steps} PRAGMA user_version = {SCHEMA}; COMMIT;")

    def _put(self, record: Record) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO sandbox VALUES (?, ?)",
            (record.number, self._encoder.encode(record)),
        )
        self._db.execute("UPDATE counter SET next = max(next, ?)", (record.number + 1,))

    def _owe(self, number: int, record: Record | None) -> None:
        self._owed[number] = record
        try:
            with self._writing():
                pass  # only the owed facts
        except CallRefusedError as exc:
            # No defect of ours: a line, and no traceback.
            LOGGER.error(  # noqa: TRY400
                "c%d: %s; the next change stores this one as well", number, exc
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Run a transaction, which stores the owed facts first.

        A failed one changes nothing.
        """
        owed = dict(self._owed)
        try:
            with self._db:
                for number, record in owed.items():
                    if record is None:
                        self._db.execute("DELETE FROM sandbox WHERE number = ?", (number,))
                    else:
                        self._put(record)
                yield
        except sqlite3.Error as exc:
            if self._db.in_transaction:  # the commit failed
                self._db.rollback()
            raise CallRefusedError(
                FAILED, f"cannot store the change in {self._path}: {_explain(exc)}"
            ) from exc
        self._owed.clear()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Separate damage from errors that the operator can mend. Raises DamagedError, ConfigError, NoRoomError."""
        try:
            yield
        except sqlite3.Error as exc:
            if _code(exc) in _DAMAGE:
                raise DamagedError(str(exc)) from exc
            raise unusable(f"cannot use {self._path}: {_explain(exc)}", exc) from exc
        except ValueError as exc:  # too many rows, or too few
            raise DamagedError(str(exc)) from exc


def unusable(text: str, cause: BaseException) -> ConfigError | NoRoomError:
    """Return the error for a file that cannot be used."""
    return NoRoomError(text) if _is_full(cause) else ConfigError(text)


def _is_full(exc: BaseException | None) -> bool:
    if isinstance(exc, sqlite3.Error):
        return _code(exc) in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
    if isinstance(exc, OSError):
        return exc.errno in {errno.ENOSPC, errno.EDQUOT}
    return exc is not None and _is_full(exc.__cause__)


def decode_record(number: object, data: object) -> Record:
    """Return the record that is stored under a number. Raises DamagedError."""
    try:
        record = _decoder.decode(data)  # type: ignore[arg-type]
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError) as exc:
        raise DamagedError(f"the record of c{number} cannot be read: {exc}") from exc
    if record.number != number:
        raise DamagedError(f"the record of c{number} says c{record.number}")
    return record


_decoder: Final = msgspec.msgpack.Decoder(Record)


def _code(exc: sqlite3.Error) -> int:
    # The upper bits only give details. An error of Python's own, such as text that is not UTF-8, has no code.
    return getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF


def _explain(exc: sqlite3.Error) -> str:
    return _ADVICE.get(_code(exc), str(exc))
