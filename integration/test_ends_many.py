"""Ten thousand sandboxes, added and ended in every way in turn: nothing of them is left anywhere."""

import contextlib
import os
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from broker.supervisor.watches.cgroups import find_mounts
from integration.harness.buses import open_dbus_daemon
from integration.harness.endings import count_fds
from integration.harness.rawclient import RawClient
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    MANAGE,
    NAME,
    TYPE,
    Warden,
    open_warden,
    wait_for,
)
from integration.harness.values import Variant
from integration.test_ends_cgroups import remove

MANY: Final = 10_000
ROUND: Final = 1000  # at a time
WARM_UP: Final = 2  # rounds, until caches, allocators and modules are what they are going to be
MAX_GROWTH: Final = 4096  # KiB of private memory, supervisor and gate together, from then on
KEEP: Final = Variant("b", True)
Close = Callable[[], None]


class Round:
    """Some sandboxes for each way to end. What ends them is done by `end`."""

    def __init__(self, warden: Warden, cgroup: Path | None) -> None:
        self._warden = warden
        self._cgroup = cgroup
        self._creator = RawClient.connect(warden.bus.address)
        self._children: list[int] = []
        self._folders: list[Path] = []
        self._closes: list[Close] = [self._creator.close]
        self._serials: list[tuple[RawClient, int, str]] = []
        self.paths: dict[str, str] = {}  # path -> why it will end
        self._ways: list[Callable[[], None]] = [
            self._piped,
            self._stopped,
            self._closed,
            self._created,
            self._watched,
            self._timed,
        ]
        if cgroup is not None:
            self._ways.append(self._grouped)

    def add(self, count: int) -> None:
        """Add so many, as many of each way, without waiting for one before the next is asked for."""
        for number in range(count):
            self._ways[number % len(self._ways)]()
            if number % 50 == 49:
                self._collect()
        self._collect()

    def end(self) -> None:
        """End those that do not end by themselves."""
        host = self._warden.host
        members = {"stopped": "StopInstance", "last-connection": "StopListening"}
        calls = [(members[why], path) for path, why in self.paths.items() if why in members]
        # One caller may have 64 calls waiting.
        for start in range(0, len(calls), 50):
            serials = [
                host.start_call(NAME, CONTAINERS_PATH, CONTAINERS, member, "o", (path,))
                for member, path in calls[start : start + 50]
            ]
            for serial in serials:
                assert host.wait_reply(serial).error is None
        for close in self._closes:
            close()
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        for pid in self._children:
            os.waitpid(pid, 0)
        for folder in self._folders:
            remove(folder)

    def _collect(self) -> None:
        for client, serial, reason in self._serials:
            reply = client.wait_reply(serial)
            assert reply.error is None, reply.values
            self.paths[reply.values[0]] = reason
        self._serials.clear()

    def _ask(
        self, reason: str, *fds: int, creator: RawClient | None = None, **named: Variant
    ) -> None:
        client = creator or self._warden.host
        values: tuple[Any, ...] = (TYPE, "many", {}, named)
        serial = client.start_call(
            NAME, CONTAINERS_PATH, CONTAINERS, "AddServer", "ssa{sv}a{sv}", values, fds=fds
        )
        self._serials.append((client, serial, reason))

    def _piped(self) -> None:
        read_end, write_end = os.pipe()
        self._ask("close-notify", read_end, CloseNotify=Variant("h", 0))
        os.close(read_end)
        self._closes.append(lambda: os.close(write_end))

    def _stopped(self) -> None:
        self._ask("stopped")

    def _closed(self) -> None:
        self._ask("last-connection")

    def _created(self) -> None:
        self._ask("creator-gone", creator=self._creator)

    def _watched(self) -> None:
        self._ask("process-ended", Process=Variant("u", self._start()))

    def _timed(self) -> None:
        self._ask("time-limit", KeepAfterCreator=KEEP, TimeLimit=Variant("t", 1))

    def _grouped(self) -> None:
        assert self._cgroup is not None
        folder = self._cgroup / f"app{len(self._folders)}"
        folder.mkdir()
        self._folders.append(folder)
        (folder / "cgroup.procs").write_text(str(self._start()))
        self._ask("cgroup-empty", Cgroup=Variant("s", str(folder)))

    def _start(self) -> int:
        pid = os.posix_spawn("/bin/sleep", ["sleep", "1000"], {})
        self._children.append(pid)
        return pid


@contextmanager
def cgroup_of_ours() -> Iterator[Path | None]:
    """Make a cgroup of v2, where there is such a thing for us."""
    for mount in find_mounts():
        path = Path(mount.point) / f"buswarden-many-{os.getpid()}"
        if mount.unified:
            with contextlib.suppress(OSError):
                path.mkdir()
                break
    else:
        yield None
        return
    try:
        yield path
    finally:
        remove(path)


def private_memory(*pids: int) -> int:
    """Return the KiB that only these processes have."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                total += int(line.split()[1])
    return total


@pytest.mark.slow
def test_nothing_is_left_of_ten_thousand(folder: Path) -> None:
    with (
        open_dbus_daemon(folder) as bus,
        open_warden(bus, folder / "run") as warden,
        RawClient.connect(bus.address) as listener,
        cgroup_of_ours() as cgroup,
    ):
        listener.add_match(f"sender='{NAME}',interface='{MANAGE}',member='SandboxEnded'")
        us = (warden.process.pid, warden.gate_pid)
        counts: Counter[str] = Counter()
        # An inotify comes with the first cgroup, and stays.
        idle = count_fds(*us) + (cgroup is not None)
        memory = 0
        for number in range(MANY // ROUND):
            work = Round(warden, cgroup)
            work.add(ROUND)
            work.end()
            told = dict(listener.wait_signal("SandboxEnded").values for _ in range(ROUND))
            assert told == work.paths
            counts.update(told.values())
            if number == WARM_UP - 1:
                memory = private_memory(*us)
        _check_nothing_is_left(warden, counts)
        wait_for(lambda: count_fds(*us) == idle)
        grown = private_memory(*us) - memory
        print(f"{dict(counts)}; {idle} descriptors; {memory} KiB, grown by {grown} KiB")
        assert grown < MAX_GROWTH
        assert [m for m in listener.drain(0) if m.header.member == "SandboxEnded"] == []


def _check_nothing_is_left(warden: Warden, counts: Counter[str]) -> None:
    (status,) = warden.manage("Status")
    assert status["ended"] == dict(counts)
    assert (status["sandboxes"], status["connections"]) == (0, 0)
    assert status["watched"] == {"processes": "0 by pidfds", "cgroups": "0 by inotify"}
    assert list((warden.folder / "containers").iterdir()) == []
    with closing(sqlite3.connect(warden.folder / "state.db")) as db:
        assert db.execute("SELECT count(*) FROM sandbox").fetchall() == [(0,)]
        assert db.execute("SELECT next FROM counter").fetchall() == [(MANY,)]
    assert "Traceback" not in warden.log
