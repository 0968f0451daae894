"""What survives us, in SQLite: the sandboxes, the number of the next, the snaps and their connections.

Each change is committed before its function returns, and so before the answer to whoever asked for it. The
file lives as long as the runtime folder, a tmpfs: it is made to stand a kill, not a power cut. What cannot be
stored is refused, but for what happened whether we store it or not: that is stored with the next change.
A file that is damaged is set aside by whoever opens it (`broker.supervisor.storage.recovery`).
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
# What makes each version of the file out of the one before; the first one out of nothing.
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
    # A row: the gate has not been asked yet what the file, new or damaged, does not say.
    """
    CREATE TABLE unsettled (aside TEXT NOT NULL, snaps_lost INTEGER NOT NULL);
    """,
    # Connections that want header field 10; and which bus their names, and those of creators, are of.
    """
    CREATE TABLE tag (bus TEXT, unique_name TEXT, PRIMARY KEY (bus, unique_name));
    CREATE TABLE bus (name TEXT PRIMARY KEY, id TEXT NOT NULL);
    """,
)
SCHEMA: Final = len(STEPS)  # an older program could not read the file
# Of what SQLite says, what is the file's fault: no such table, or not of this form; a torn page; no database.
_DAMAGE: Final = {
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_NOTADB,
}
_DO: Final = {
    sqlite3.SQLITE_FULL: "no space is left there: make room",
    sqlite3.SQLITE_READONLY: "it is read-only: make it writable",
    sqlite3.SQLITE_IOERR: "it cannot be read or written: is its disk full?",
}


class DamagedError(BrokerError):
    """The file's bytes are not what was stored: to be set aside."""


class NoRoomError(BrokerError):
    """Its disk is full: no mistake in the settings, and so worth another try."""


class PendingRecovery(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be asked of the gate, as the file does not know."""

    aside: str  # the damaged file; empty: there was no file
    snaps_lost: bool  # with their connections


class StateFile:
    """The open file."""

    def __init__(self, path: Path) -> None:
        """Open it, made if it is not there. Raises DamagedError, and ConfigError or NoRoomError if it cannot be used."""
        is_new = not path.exists()
        if path.is_file() and not path.stat().st_size:
            raise DamagedError("nothing is in it")
        self._path: Final = path
        self._encoder: Final = msgspec.msgpack.Encoder()
        # What could not be stored when it happened; None: that it ended.
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
        """Close it; what is owed is tried a last time."""
        if self._owed:
            with suppress(CallRefusedError), self._writing():
                pass
        self._db.close()

    def check(self) -> None:
        """Read all of it. Raises DamagedError."""
        with self._reading():
            ((verdict, *_),) = self._db.execute("PRAGMA quick_check(1)").fetchall()
        if verdict != "ok":
            raise DamagedError(verdict)
        self.load()
        self.load_world()
        self.load_tags()
        self.load_bus_ids()
        self.unsettled()

    def load(self) -> tuple[list[Record], int]:
        """Return all records and the next number. Raises DamagedError."""
        with self._reading():
            rows = self._db.execute("SELECT number, record FROM sandbox ORDER BY number").fetchall()
            return [decode_record(*row) for row in rows], self.load_counter()

    def load_each(self) -> Iterator[Record]:
        """Give the records that can be read, of a file that is damaged."""
        # From either end up to the page that is torn.
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
                raise DamagedError("the counter is no number")
            return number

    def put(self, record: Record) -> None:
        """Store a record, new or changed; its number is never given again. Raises CallRefusedError."""
        with self._writing():
            self._put(record)

    def put_fact(self, record: Record) -> None:
        """Store what has come to pass: now, or with the next change that can be stored."""
        self._owe(record.number, record)

    def delete(self, record: Record) -> None:
        """Forget a record, but not its number: now, or with the next change that can be stored."""
        self._owe(record.number, None)

    def skip_to(self, number: int) -> None:
        """Give no number below this. Raises CallRefusedError."""
        with self._writing():
            self._db.execute("UPDATE counter SET next = max(next, ?)", (number,))

    def load_world(self) -> World:
        """Return the snaps and their connections. Raises DamagedError."""
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
                self._db.execute(f"DELETE FROM {table}")  # noqa: S608 - none of it is from outside
            self._db.execute("INSERT INTO system VALUES (?)", (world.system,))
            self._db.executemany("INSERT INTO snap VALUES (?, ?)", rows)
            self._db.executemany("INSERT INTO connection VALUES (?, ?)", world.connections)

    def put_connection(self, plug: str, slot: str) -> None:
        """Store a connection. Raises CallRefusedError."""
        with self._writing():
            self._db.execute("INSERT OR REPLACE INTO connection VALUES (?, ?)", (plug, slot))

    def delete_connection(self, plug: str, slot: str) -> None:
        """Forget a connection. Raises CallRefusedError."""
        with self._writing():
            self._db.execute("DELETE FROM connection WHERE plug = ? AND slot = ?", (plug, slot))

    def load_tags(self) -> list[tuple[str, str]]:
        """Return who wants header field 10: (bus, unique name). Raises DamagedError."""
        with self._reading():
            rows = self._db.execute("SELECT bus, unique_name FROM tag ORDER BY rowid").fetchall()
            if not all(isinstance(text, str) for row in rows for text in row):
                raise DamagedError("a tag is no text")
            return rows

    def put_tag(self, bus: str, unique_name: str) -> None:
        """Store who wants header field 10. Raises CallRefusedError."""
        with self._writing():
            self._db.execute("INSERT OR REPLACE INTO tag VALUES (?, ?)", (bus, unique_name))

    def delete_tag(self, bus: str, unique_name: str) -> None:
        """Forget who wants header field 10. Raises CallRefusedError."""
        with self._writing():
            self._db.execute(
                "DELETE FROM tag WHERE bus = ? AND unique_name = ?", (bus, unique_name)
            )

    def load_bus_ids(self) -> dict[str, str]:
        """Return which bus was met last, by name. Raises DamagedError."""
        with self._reading():
            rows = self._db.execute("SELECT name, id FROM bus").fetchall()
            if not all(isinstance(text, str) for row in rows for text in row):
                raise DamagedError("the id of a bus is no text")
            return dict(rows)

    def put_bus_id(self, bus: str, id_: str) -> None:
        """Store which bus was met. Raises CallRefusedError."""
        with self._writing():
            self._db.execute("INSERT OR REPLACE INTO bus VALUES (?, ?)", (bus, id_))

    def unsettled(self) -> PendingRecovery | None:
        """Return what the gate has to be asked for. Raises DamagedError."""
        with self._reading():
            rows = self._db.execute("SELECT aside, snaps_lost FROM unsettled").fetchall()
        return PendingRecovery(aside=rows[0][0], snaps_lost=bool(rows[0][1])) if rows else None

    def unsettle(self, what: PendingRecovery | None) -> None:
        """Note what the gate has to be asked for; None: it has been. Raises CallRefusedError."""
        with self._writing():
            self._db.execute("DELETE FROM unsettled")
            if what is not None:
                self._db.execute(
                    "INSERT INTO unsettled VALUES (?, ?)", (what.aside, what.snaps_lost)
                )

    def _prepare(self, *, is_new: bool) -> None:
        # One writer, on a tmpfs: no fsync, and a cache that does not show in our memory.
        for pragma in ("journal_mode = WAL", "synchronous = OFF", "cache_size = -256"):
            self._db.execute(f"PRAGMA {pragma}").fetchall()
        ((version,),) = self._db.execute("PRAGMA user_version").fetchall()
        if version > SCHEMA:
            raise ConfigError(
                f"{self._path} is of version {version} and this program knows {SCHEMA}:"
                " run the newer program, or move the file away"
            )
        if version < 0 or (version == 0 and not is_new):
            raise DamagedError("it has no version")
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
                pass  # but for what is owed
        except CallRefusedError as exc:
            # No defect of ours: a line, and no traceback.
            LOGGER.error(  # noqa: TRY400
                "c%d: %s; it is tried again with the next change", number, exc
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, with what is owed before it; of which nothing is left if it fails."""
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
            if self._db.in_transaction:  # it was the commit that failed
                self._db.rollback()
            raise CallRefusedError(
                FAILED, f"it cannot be stored in {self._path}: {_explain(exc)}"
            ) from exc
        self._owed.clear()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Tell damage from what the operator can set right. Raises DamagedError, ConfigError, NoRoomError."""
        try:
            yield
        except sqlite3.Error as exc:
            if _code(exc) in _DAMAGE:
                raise DamagedError(str(exc)) from exc
            raise unusable(f"cannot use {self._path}: {_explain(exc)}", exc) from exc
        except ValueError as exc:  # more rows than there can be, or fewer
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
    """Return a record as stored under that number. Raises DamagedError."""
    try:
        record = _decoder.decode(data)  # type: ignore[arg-type]
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError) as exc:
        raise DamagedError(f"the record of c{number} cannot be read: {exc}") from exc
    if record.number != number:
        raise DamagedError(f"the record of c{number} says c{record.number}")
    return record


_decoder: Final = msgspec.msgpack.Decoder(Record)


def _code(exc: sqlite3.Error) -> int:
    # The upper bits say more than we want to know. Python's own complaints have none: a text that is not UTF-8.
    return getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF


def _explain(exc: sqlite3.Error) -> str:
    return _DO.get(_code(exc), str(exc))
