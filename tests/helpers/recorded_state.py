"""The contents of the recorded state file, and the program that recorded it.

    python -m tests.helpers.recorded_state

writes tests/data/state-VERSION.sql by the present code, where VERSION is that of the format. Run it only when the
format gets a new version (`STEPS` in broker/supervisor/storage/state_file.py), and keep the files of earlier ones:
each stands for files on users' machines.
"""

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Final

from broker.supervisor.sandboxes.lifecycle import Cgroup, Process
from broker.supervisor.sandboxes.registry import Record
from broker.supervisor.storage.state_file import SCHEMA, PendingRecovery, StateFile
from policy.rules import Access, AccessList, Peer, Rule
from policy.snaps.installed import Port, Snap, World
from tests.helpers.records import make_record

DATA: Final = Path(__file__).resolve().parent.parent / "data"

RULE: Final = Rule(
    access=frozenset({Access.SEND}),
    deny=True,
    bus="session",
    name="org.example.*",
    path="/org/example/**",
    interface="org.example.Interface",
    member="Get*",
    peer=Peer(kind="app", type="io.example", app="other", component="part"),
    origin="session by :1.1",
)
# One record with no field at its default, and one with every field there: a stored field left out is as good as lost.
FULL: Final = Record(
    number=3,
    type="io.snapcraft.snapd",
    app="player",
    component="tray",
    metadata=b"\x08\0\0\0metadata",
    uid=1000,
    creator=":1.7",
    creator_bus="session",
    credentials=b"\x04\0\0\0cred",
    sockets={"session": "/run/dbus-3", "system": "\0abstract"},
    addresses={"session": "unix:path=/run/dbus-3", "system": "unix:abstract=abstract"},
    access=AccessList(
        rules=(
            RULE,
            *(Rule(access=frozenset({access}), peer=Peer(kind="host")) for access in Access),
        ),
        receive_from_host=False,
        bus_by_rule=True,
    ),
    portals_as_host=True,
    keep_after_creator=True,
    close_notify=True,
    plugs=("desktop", "mpris"),
    process=Process(77, 12345),
    cgroup=Cgroup("/sys/fs/cgroup/app", 99),
    time_limit=60,
    expires=1234.5,
    created=1700000000.25,
    listening=False,
    closing="creator-gone",
    held=AccessList(rules=(Rule(access=frozenset({Access.OWN}), name="org.mpris.Player"),)),
)
RECORDS: Final = (make_record(1), FULL)
NEXT_NUMBER: Final = 9
WORLD: Final = World(
    system="core",
    snaps=(
        Snap(
            name="player",
            apps=("player", "tray"),
            plugs={
                "desktop": Port(interface="desktop", apps=("tray",), attributes={"key": "value"})
            },
            slots={"mpris": Port(interface="mpris")},
            confinement="classic",
        ),
        Snap(name="snapd", slots={"network": Port(interface="network")}, system=True),
    ),
    connections=(("player:desktop", "snapd:desktop"), ("player:network", "snapd:network")),
)
FIELD_REQUESTS: Final = [("session", ":1.9"), ("system", ":1.2")]
BUS_IDS: Final = {"session": "0123456789abcdef", "system": "fedcba9876543210"}
PENDING: Final = PendingRecovery(aside="state.db.damaged-1", snaps_lost=True)


def fill(path: Path) -> None:
    """Make a state file with these contents by the present code."""
    with closing(StateFile(path)) as state:
        for record in RECORDS:
            state.put(record)
        state.skip_to(NEXT_NUMBER)
        state.put_world(WORLD)
        for bus, unique_name in FIELD_REQUESTS:
            state.put_field_request(bus, unique_name)
        for bus, id_ in BUS_IDS.items():
            state.put_bus_id(bus, id_)
        state.set_pending_recovery(PENDING)


def dump(path: Path) -> str:
    """Return a state file as SQL, which makes an equal one."""
    with closing(sqlite3.connect(path)) as db:
        ((version,),) = db.execute("PRAGMA user_version").fetchall()
        return "\n".join([*db.iterdump(), f"PRAGMA user_version = {version};", ""])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.db"
        fill(path)
        (DATA / f"state-{SCHEMA}.sql").write_text(dump(path), encoding="utf-8")


if __name__ == "__main__":
    main()
