"""A state file that is damaged, of a newer program, on a full disk or read-only: what the real service makes of it."""

import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from integration.harness.buses import Bus, open_dbus_daemon
from integration.harness.clients import Outcome, run
from integration.harness.processes import PYTHON, running
from integration.harness.rawclient import CallError, RawClient
from integration.harness.service import ECHO, PATH, running_service
from integration.harness.supervised import NAME, SEND, Sandbox, Warden, open_warden, wait_for
from integration.harness.values import Variant

KEEP = Variant("b", True)
# Whoever is in there has the folder to itself, and may mount on it; as the same user as outside.
OWN_MOUNTS = ("unshare", "--user", "--map-current-user", "--keep-caps", "--mount")
LARGE = {"text": Variant("s", "x" * 60_000)}


def noise(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)


def cut_off(path: Path) -> None:
    path.write_bytes(b"")


def torn(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:  # what was in the journal is in the file then
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * 4096 + content[8192:])


def no_table(path: Path) -> None:
    _change(path, "DROP TABLE counter")


def odd_record(path: Path) -> None:
    _change(path, "INSERT OR REPLACE INTO sandbox VALUES (0, x'c0')")


def removed(path: Path) -> None:
    path.unlink()


def _change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(statement)


DAMAGES = (noise, cut_off, torn, no_table, odd_record)


@pytest.mark.parametrize("damage", [*DAMAGES, removed])
def test_what_the_gate_knows_is_taken_over(folder: Path, damage: Callable[[Path], None]) -> None:
    runtime = folder / "run"
    with (
        open_dbus_daemon(folder) as bus,
        running_service(bus.address),
        open_warden(bus, runtime, orderly=False) as first,
    ):
        metadata = {"icon": Variant("s", "gear")}
        kept = first.add_server("org.example.Kept", metadata=metadata, KeepAfterCreator=KEEP)
        first.change_access(kept, rules=[f"send:{ECHO}"])
        follows = first.add_server("org.example.Follows")
        gone = first.add_server("org.example.Gone")
        first.stop_instance(gone)
        client = first.connect(kept)
        first.kill()
        path = runtime / "buswarden" / "state.db"
        damage(path)
        with open_warden(bus, runtime) as second:
            assert second.gate_pid == first.gate_pid
            assert {one["path"] for one in second.list_sandboxes()} == {kept.path, follows.path}
            shown = second.show(kept)
            assert (shown["app"], shown["metadata"]) == ("org.example.Kept", {"icon": "gear"})
            assert shown["access"] == [(False, f"send:{ECHO}")]
            assert second.who(client.unique_name) == kept.path
            assert client.call(ECHO, PATH, ECHO, "Echo", "s", ("hello",)).error is None
            new = second.add_server(KeepAfterCreator=KEEP)
            assert int(new.id[1:]) > int(gone.id[1:])
            if damage is not removed:
                assert path.with_name("state.db.damaged-1").exists()
                assert "state.db is damaged" in second.log
            # Whom it follows is known as well.
            first.host.close()
            wait_for(lambda: not follows.socket.exists())
            assert kept.socket.exists()
            second.change_access(kept, replace=True)
            assert client.call(ECHO, PATH, ECHO, "Echo", "s", ("hello",)).error is not None


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_a_gate_it_says_what_it_lost(folder: Path, damage: Callable[[Path], None]) -> None:
    runtime = folder / "run"
    with open_dbus_daemon(folder) as bus:
        with open_warden(bus, runtime) as first:
            last = first.add_server()
            first.stop_instance(last)
        damage(runtime / "buswarden" / "state.db")
        with open_warden(bus, runtime) as second:
            assert second.list_sandboxes() == []
            assert int(second.add_server().id[1:]) > int(last.id[1:])
            lines = [line for line in second.log.splitlines() if "is damaged" in line]
    (line,) = lines
    assert line.startswith("ERROR ")
    assert "kept as state.db.damaged-1; recovered: 0 sandboxes" in line


def start(bus: Bus, runtime: Path, *before: str) -> Outcome:
    argv = (*before, PYTHON, "-m", "broker.cli", "run", "--bus", f"session={bus.address}")
    return run(*argv, env={"XDG_RUNTIME_DIR": str(runtime)})


def test_a_newer_version_is_refused_in_one_line(folder: Path) -> None:
    runtime = folder / "run"
    with open_dbus_daemon(folder) as bus:
        with open_warden(bus, runtime):
            pass
        path = runtime / "buswarden" / "state.db"
        _change(path, "PRAGMA user_version = 99")
        outcome = start(bus, runtime)
    assert outcome.code == 2
    expected = rf"buswarden: {path} has version 99, .*: run the newer program, or move .*\n"
    assert re.fullmatch(expected, outcome.err)


class Disk:
    """A small file system in mounts of its own, and a prefix for commands that are to see it."""

    def __init__(self, holder: int, path: Path) -> None:
        self.path = path
        self.seen = Path(f"/proc/{holder}/root{path}")  # from outside
        self.inside = (
            *("nsenter", f"--target={holder}", "--user", "--preserve-credentials", "--mount"),
            f"--wd={Path.cwd()}",
        )

    def fill(self) -> None:
        with (self.seen / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def empty(self) -> None:
        (self.seen / "filler").unlink()

    def numbers(self) -> list[str]:
        """Return whose records are stored. SQLite does not open what it sees by way of /proc."""
        script = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute(sys.argv[2]))"
        path, query = self.path / "buswarden" / "state.db", "SELECT 'c' || number FROM sandbox"
        outcome = run(*self.inside, PYTHON, "-c", script, str(path), query)
        return sorted(re.findall(r"c\d+", outcome.out))

    def remount(self, how: str) -> None:
        outcome = run(*self.inside, "mount", "-o", f"remount,{how}", str(self.path))
        assert outcome.code == 0, outcome.err


@pytest.fixture
def disk(folder: Path) -> Iterator[Disk]:
    path = folder / "run"
    path.mkdir(mode=0o700)
    script = 'mount -t tmpfs -o size=1M,mode=700 small "$0" && echo READY && exec cat'
    with running([*OWN_MOUNTS, "sh", "-c", script, str(path)]) as process:
        try:
            process.wait_line("READY")
        except EOFError:
            pytest.skip("the kernel lets nobody mount in namespaces of its own here")
        yield Disk(process.pid, path)


@contextmanager
def open_there(bus: Bus, disk: Disk) -> Iterator[Warden]:
    argv = [PYTHON, "-m", "broker.cli", "run", "--bus", f"session={bus.address}"]
    env = {"XDG_RUNTIME_DIR": str(disk.path), "HOME": str(disk.path)}
    log = disk.path.parent / "warden.log"
    with running([*disk.inside, *argv], env=env, log=log) as process:
        process.wait_line("ready")
        host = RawClient.connect(bus.address)
        with host:
            yield Warden(bus=bus, runtime=disk.seen, process=process, host=host)
        assert process.stop() == 0
        assert "Traceback" not in process.log


def assert_nothing_was_done(warden: Warden, before: Sequence[Sandbox]) -> None:
    """Both refuse what has to be stored, and what there was is as it was."""
    rules = [(SEND, f"org.example.N{n}", "/", "") for n in range(1000)]
    for change in (
        lambda: warden.add_server(metadata=LARGE),
        lambda: warden.set_access(before[0], *rules),
    ):
        with pytest.raises(CallError, match=r"cannot store the change in .*state.db: ") as caught:
            change()
        assert "\n" not in str(caught.value)
    assert [one["path"] for one in warden.list_sandboxes()] == [one.path for one in before]
    assert warden.show(before[0])["access"] == [(False, f"send:{ECHO}")]
    wait_for(lambda: len(list((warden.folder / "containers").iterdir())) == len(before))


def test_what_does_not_fit_is_refused_and_not_half_done(folder: Path, disk: Disk) -> None:
    with (
        open_dbus_daemon(folder) as bus,
        running_service(bus.address),
        open_there(bus, disk) as warden,
    ):
        sandbox = warden.add_server(rules=[f"send:{ECHO}"], KeepAfterCreator=KEEP)
        other = warden.add_server(KeepAfterCreator=KEEP)
        address = f"unix:path={disk.seen}{str(sandbox.socket).removeprefix(str(disk.path))}"
        with RawClient.connect(address) as client:
            disk.fill()
            assert_nothing_was_done(warden, [sandbox, other])
            assert client.call(ECHO, PATH, ECHO, "Echo", "s", ("hello",)).error is None
            warden.stop_instance(other)  # an end is an end, stored or not
            assert [one["path"] for one in warden.list_sandboxes()] == [sandbox.path]
            disk.empty()
            new = warden.add_server(metadata=LARGE, KeepAfterCreator=KEEP)
            assert disk.numbers() == sorted([sandbox.id, new.id])


@pytest.mark.parametrize("how", ["full", "read-only"])
@pytest.mark.parametrize("state", ["there", "missing", "damaged"])
def test_a_start_without_room_is_one_line(folder: Path, disk: Disk, how: str, state: str) -> None:
    with open_dbus_daemon(folder) as bus:
        with open_there(bus, disk) as warden:
            assert warden.host.call(NAME, "/", "org.freedesktop.DBus.Peer", "Ping").error is None
        path = disk.seen / "buswarden" / "state.db"
        if state == "damaged":
            noise(path)
        if state == "missing":
            path.unlink()
        before = path.read_bytes() if path.exists() else None
        if how == "full":
            disk.fill()
        else:
            disk.remount("ro")
        outcome = start(bus, disk.path, *disk.inside)
        # What 2 stands for systemd does not try again.
        assert outcome.code in ((1,) if how == "full" else (1, 2)), outcome.err
        assert re.fullmatch(r"buswarden: .*(space|disk|[Rr]ead-only).*\n", outcome.err)
        assert (path.read_bytes() if path.exists() else None) == before
        if how == "full":
            disk.empty()
        else:
            disk.remount("rw")
        with open_there(bus, disk) as again:
            assert again.list_sandboxes() == []
    assert os.geteuid() == disk.path.stat().st_uid
