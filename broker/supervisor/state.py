"""What survives us, in SQLite: the sandboxes, the number of the next, the snaps and their connections.

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
from policy.snaps import SnapError, World, parse_world

# What makes each version of the file out of the one before; the first one out of nothing.
_STEPS: Final = (
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
)
SCHEMA: Final = len(_STEPS)  # an older program could not read the file


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
        # A table that is not there, or not as it should be.
        except (sqlite3.Error, ValueError) as exc:
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

    def load_world(self) -> World:
        """Return the snaps and their connections. Raises ConfigError."""
        try:
            kinds = self._db.execute("SELECT kind FROM system").fetchall()
            snaps = self._db.execute("SELECT snap FROM snap ORDER BY name").fetchall()
            pairs = self._db.execute("SELECT plug, slot FROM connection ORDER BY plug, slot")
            data: dict[str, object] = {"connections": pairs.fetchall()}
            data["snaps"] = [msgspec.msgpack.decode(row[0]) for row in snaps]
            if kinds:
                data["system"] = kinds[0][0]
            return parse_world(data)
        except (msgspec.MsgspecError, SnapError) as exc:
            raise ConfigError(f"the state file holds a snap that cannot be read: {exc}") from exc
        except sqlite3.Error as exc:
            raise ConfigError(f"the state file is damaged: {exc}") from exc

    def put_world(self, world: World) -> None:
        """Store these snaps and connections in place of all others."""
        rows = [(snap.name, self._encoder.encode(snap)) for snap in world.snaps]
        with self._db:
            for table in ("system", "snap", "connection"):
                self._db.execute(f"DELETE FROM {table}")  # noqa: S608 - none of it is from outside
            self._db.execute("INSERT INTO system VALUES (?)", (world.system,))
            self._db.executemany("INSERT INTO snap VALUES (?, ?)", rows)
            self._db.executemany("INSERT INTO connection VALUES (?, ?)", world.connections)

    def put_connection(self, plug: str, slot: str) -> None:
        """Store a connection."""
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO connection VALUES (?, ?)", (plug, slot))

    def delete_connection(self, plug: str, slot: str) -> None:
        """Forget a connection."""
        with self._db:
            self._db.execute("DELETE FROM connection WHERE plug = ? AND slot = ?", (plug, slot))


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
    if 0 <= version < SCHEMA:
        steps = "".join(_STEPS[version:])
        db.executescript(f"BEGIN; {steps} PRAGMA user_version = {SCHEMA}; COMMIT;")
    elif version != SCHEMA:
        raise ConfigError(f"the state file is of version {version}, and we know {SCHEMA}")
