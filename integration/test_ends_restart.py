"""What ends sandboxes while the supervisor is down, and that its watch goes on when there is one again."""

import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from broker.supervisor.sandboxes.registry import Record
from integration.harness.buses import Bus
from integration.harness.endings import Ends, app
from integration.harness.processes import running
from integration.harness.rawclient import RawClient
from integration.harness.supervised import Warden, open_warden, wait_for
from integration.harness.values import Variant

KEEP = Variant("b", True)


def reasons(warden: Warden) -> dict[str, int]:
    """Return how many ended for which reason."""
    (status,) = warden.manage("Status")
    return dict(status["ended"])


def ids(warden: Warden) -> set[str]:
    return {sandbox["id"] for sandbox in warden.list_sandboxes()}


def test_every_end_that_nobody_watched_is_found(bus: Bus, folder: Path) -> None:
    runtime = folder / "run"
    read_end, write_end = os.pipe()
    with (
        running(app("plain")) as ending,
        running(app("plain")) as living,
        open_warden(bus, runtime, orderly=False) as first,
        RawClient.connect(bus.address) as creator,
    ):
        for process in (ending, living):
            process.wait_line("ready")
        piped = first.add_server(fds={"CloseNotify": read_end})
        os.close(read_end)
        over = first.add_server(Process=Variant("u", ending.pid))
        timed = first.add_server(TimeLimit=Variant("t", 2), KeepAfterCreator=KEEP)
        created = first.add_server(creator=creator)
        closed = first.add_server(KeepAfterCreator=KEEP)
        client = first.connect(closed)
        first.stop_listening(closed)
        kept = first.add_server(Process=Variant("u", living.pid), TimeLimit=Variant("t", 600))
        user = first.connect(kept)
        first.kill()
        os.close(write_end)
        wait_for(lambda: not piped.socket.exists())  # the gate needs nobody for that
        client.close()
        creator.close()
        ending.send_signal(signal.SIGKILL)
        ending.wait()
        deadline = timed.socket.stat().st_ctime + 2.5
        wait_for(lambda: time.time() > deadline)
        assert user.driver("GetId")
        with open_warden(bus, runtime) as second:
            ends = Ends(second)
            wait_for(lambda: ids(second) == {kept.id})
            assert reasons(second) == {
                "close-notify": 1,
                "process-ended": 1,
                "time-limit": 1,
                "creator-gone": 1,
                "last-connection": 1,
            }
            assert not any(one.socket.exists() for one in (piped, over, timed, created, closed))
            assert user.driver("GetId")
            assert 0 < second.show(kept)["time_left"] <= 600
            ends.told()  # of the others it may have heard in part
            living.send_line("")
            ends.wait_for(kept, "process-ended")


def test_a_pid_that_is_used_again_is_another_process(bus: Bus, folder: Path) -> None:
    runtime = folder / "run"
    with running(app("plain")) as process, open_warden(bus, runtime, orderly=False) as first:
        process.wait_line("ready")
        first.add_server(Process=Variant("u", process.pid))
        first.kill()
        # As if the process of then had ended, and this one had got its pid.
        with closing(sqlite3.connect(first.folder / "state.db")) as db, db:
            ((number, data),) = db.execute("SELECT number, record FROM sandbox").fetchall()
            record = msgspec.msgpack.decode(data, type=Record)
            assert record.process is not None
            earlier = msgspec.structs.replace(record.process, start=record.process.start - 100)
            record = msgspec.structs.replace(record, process=earlier)
            row = (msgspec.msgpack.encode(record), number)
            db.execute("UPDATE sandbox SET record = ? WHERE number = ?", row)
        with open_warden(bus, runtime) as second:
            wait_for(lambda: not ids(second))
            assert reasons(second) == {"process-ended": 1}


@pytest.mark.parametrize("moment", ["before", "after"])
def test_the_reason_of_what_closes_survives(bus: Bus, folder: Path, moment: str) -> None:
    runtime = folder / "run"
    with open_warden(bus, runtime, orderly=False) as first:
        creator = first.connect_host()
        sandbox = first.add_server(creator=creator)
        client = first.connect(sandbox)
        if moment == "before":
            creator.close()
            wait_for(lambda: not first.show(sandbox)["listening"])
        first.kill()
        if moment == "after":
            creator.close()
        with open_warden(bus, runtime) as second:
            ends = Ends(second)
            wait_for(lambda: not second.show(sandbox)["listening"])
            assert second.show(sandbox)["reason"] == "creator-gone"
            assert client.driver("GetId")
            client.close()
            ends.wait_for(sandbox, "creator-gone")
