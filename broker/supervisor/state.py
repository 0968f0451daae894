"""What survives us: the records of the sandboxes and the number of the next, in SQLite.

Each change is committed before its function returns, and so before the answer to whoever asked for it. The
file lives as long as the runtime folder, a tmpfs: it is made to stand a kill, not a power cut.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from broker.supervisor.registry import Record
from broker.wire.errors import ConfigError

SCHEMA: Final = 1  # raised when an older program could not read the file
_TABLES: Final = """
    CREATE TABLE sandbox (number INTEGER PRIMARY KEY, record BLOB NOT NULL);
    CREATE TABLE counter (next INTEGER NOT NULL);
    INSERT INTO counter VALUES (0);
"""


class State:
    """The open file. Made by `open_state`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db: Final = connection
        self._encoder: Final = msgspec.msgpack.Encoder()

    def load(self) -> tuple[list[Record], int]:
        """Return all records and the next number. Raises ConfigError."""
        decoder = msgspec.msgpack.Decoder(Record)
        try:
            rows = self._db.execute("SELECT record FROM sandbox ORDER BY number").fetchall()
            ((next_number,),) = self._db.execute("SELECT next FROM counter").fetchall()
            return [decoder.decode(row[0]) for row in rows], next_number
        except msgspec.MsgspecError as exc:
            raise ConfigError(f"the state file holds a record that cannot be read: {exc}") from exc
        except (sqlite3.Error, ValueError) as exc:  # a table that is not there, or not as it should be
            raise ConfigError(f"the state file is damaged: {exc}") from exc

    def put(self, record: Record) -> None:
        """Store a record, new or changed; its number is never given again."""
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO sandbox VALUES (?, ?)",
                (record.number, self._encoder.encode(record)),
            )
            self._db.execute("UPDATE counter SET next = max(next, ?)", (record.number + 1,))

    def delete(self, record: Record) -> None:
        """Forget a record, but not its number."""
        with self._db:
            self._db.execute("DELETE FROM sandbox WHERE number = ?", (record.number,))


@contextmanager
def open_state(path: Path) -> Iterator[State]:
    """Open the file, made if it is not there. Raises ConfigError."""
    try:
        connection = sqlite3.connect(path, isolation_level="IMMEDIATE")
    except sqlite3.Error as exc:
        raise ConfigError(f"cannot open {path}: {exc}") from exc
    with contextlib.closing(connection):
        try:
            _prepare(connection)
        except sqlite3.Error as exc:
            raise ConfigError(f"cannot use {path}: {exc}") from exc
        yield State(connection)


def _prepare(db: sqlite3.Connection) -> None:
    # One writer, on a tmpfs: no fsync, and a cache that does not show in our memory.
    for pragma in ("journal_mode = WAL", "synchronous = OFF", "cache_size = -256"):
        db.execute(f"PRAGMA {pragma}").fetchall()
    ((version,),) = db.execute("PRAGMA user_version").fetchall()
    if version == 0:
        db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;")
    elif version != SCHEMA:
        raise ConfigError(f"the state file is of version {version}, and we know {SCHEMA}")
