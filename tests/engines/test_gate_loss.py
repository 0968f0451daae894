"""A gate that dies: replaced, given back what is held, and on record."""

import errno
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import trio

from broker.control_protocol.messages import (
    AddSandbox,
    Answer,
    Done,
    Listener,
    RequestInstanceField,
    SandboxSpec,
)
from broker.engines import gate_engine as gate_module, restart_limits
from broker.engines.base import EngineLostError
from broker.engines.crash_reports import MOVED, TRACE
from broker.engines.gate_engine import _batches
from broker.engines.gate_process import GateError, GateProcess
from broker.engines.held_sockets import PIPE
from broker.wire.errors import INVALID_ARGS, CallRefusedError
from tests.engines.test_control_connection import Told
from tests.engines.test_crash_reports import records, write_trace
from tests.engines.test_gate_engine import bury, kept, make_engine
from tests.helpers.records import make_record, make_state

if TYPE_CHECKING:
    from broker.engines.control_connection import ControlConnection


def make_spec(number: int, app: str = "app") -> SandboxSpec:
    """Return a sandbox with a pipe for its first descriptor, and a socket's place for the second."""
    spec = make_state(make_record(number, app=app)).spec
    listener = Listener(bus="session", fd=1)
    return SandboxSpec(
        id=spec.id,
        identity=spec.identity,
        uid=spec.uid,
        listeners=(listener,),
        access=spec.access,
        close_notify=0,
    )


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def past_process() -> int:
    """Return the id of one that has ended."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    return pid


class Restoring(Told):
    """Has the engine serve again what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[tuple[SandboxSpec, Sequence[int]]] = []
        self.given_up: list[str] = []
        self.wishes: list[tuple[str, str]] = []

    def missing(self) -> list[tuple[SandboxSpec, Sequence[int]]]:
        return self.wanted

    def instance_field_wishes(self) -> list[tuple[str, str]]:
        return self.wishes

    def lost(self, sandbox: str) -> None:
        self.given_up.append(sandbox)


def test_descriptors_are_asked_for_a_frame_at_a_time() -> None:
    states = [make_state(make_record(number)) for number in range(450)]
    found = list(_batches(iter(states)))
    assert [name for batch in found for name in batch] == [state.spec.id for state in states]
    assert [len(batch) for batch in found] == [200, 200, 50]


async def test_a_dead_gate_is_replaced_and_given_back_what_it_had(tmp_path: Path) -> None:
    told = Restoring()
    read, write = os.pipe()
    async with kept(make_engine(tmp_path), told) as engine:
        spec = make_spec(1)
        await engine.add(spec, [write, write])
        assert os.read(read, 9) == b"xx"
        assert set(engine.held.of("c1")) == {"session", PIPE}
        held = engine.held.of("c1")
        told.wanted = [(spec, [held[PIPE], held["session"]])]
        old = engine.pid
        os.kill(old, signal.SIGKILL)
        # Whoever asks waits for the next one, which has the sandbox by then.
        assert await engine.who("session", "c1") == "c1"
        assert engine.pid != old
        assert os.read(read, 9) == b"xx"
        assert f"(process {old}) was killed by SIGKILL" in engine.last_crash
        await engine.stop("c1")
        assert "c1" not in engine.held
        await engine.shutdown()
    os.close(write)
    assert os.read(read, 9) == b""  # nobody has it any more
    os.close(read)
    assert [name[:10] for name in files(tmp_path)] == ["gate-crash"]


class Asked:
    """A link that says what it was asked, and refuses what is about a bus that the gate does not know."""

    def __init__(self) -> None:
        self.requests: list[object] = []

    async def request(self, request: object, _fds: Sequence[int] = ()) -> Answer:
        self.requests.append(request)
        if isinstance(request, RequestInstanceField) and request.bus == "gone":
            raise CallRefusedError(INVALID_ARGS, "no bus 'gone'")
        return Done()


async def test_attack_i2_gate_knows_who_wants_tags_before_it_serves_anybody(tmp_path: Path) -> None:
    told, link, spec = Restoring(), Asked(), make_spec(1)
    told.wanted = [(spec, [])]
    told.wishes = [("gone", ":1.5"), ("session", ":1.5")]
    await make_engine(tmp_path)._restore(cast("ControlConnection", link), told)
    assert link.requests == [
        RequestInstanceField("gone", ":1.5"),
        RequestInstanceField("session", ":1.5"),
        AddSandbox(spec),
    ]


async def test_what_a_new_gate_refuses_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = Restoring()
    async with kept(make_engine(tmp_path), told) as engine:
        read, write = os.pipe()
        await engine.add(make_spec(1, "refused-later"), [write, write])
        told.wanted = [(make_spec(1, "refused"), [write, write])]
        os.kill(engine.pid, signal.SIGKILL)
        assert await engine.who("session", "c1") is None
        assert told.given_up == ["c1"]
        assert "c1" not in engine.held
        assert "c1: the new gate refuses this sandbox: " in caplog.text
        assert "it has ended: add it anew" in caplog.text
        os.close(read)
        os.close(write)
        await engine.shutdown()


async def test_a_sandbox_is_added_at_the_next_gate(tmp_path: Path) -> None:
    async with kept(make_engine(tmp_path)) as engine:
        old = engine.pid
        await engine.add(make_state(make_record(app="die once")).spec, [])
        assert await engine.who("session", "c0") == "c0"
        assert engine.pid != old
        await engine.shutdown()


async def test_what_kills_two_gates_is_given_up(tmp_path: Path) -> None:
    async with kept(make_engine(tmp_path)) as engine:
        with pytest.raises(EngineLostError):
            await engine.add(make_state(make_record(app="die")).spec, [])
        with pytest.raises(CallRefusedError):
            await engine.stop("c0")  # the next gate has heard of none
        await engine.shutdown()


async def test_who_listens_no_more_is_not_held(tmp_path: Path) -> None:
    async with kept(make_engine(tmp_path)) as engine:
        read, write = os.pipe()
        await engine.add(make_spec(1), [write, write])
        await engine.stop_listening("c1")
        assert list(engine.held.of("c1")) == [PIPE]
        os.close(read)
        os.close(write)
        await engine.shutdown()


async def test_waiting_for_a_gate_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "GAP_TIMEOUT", 0.01)
    engine = make_engine(tmp_path)
    with pytest.raises(EngineLostError, match="try again"):
        await engine.who("session", ":1.1")


async def test_a_gate_that_dies_before_it_serves_is_given_up(tmp_path: Path) -> None:
    told = Restoring()
    told.wanted = [(make_state(make_record(app="die")).spec, [])]
    with pytest.raises(GateError, match="5 times"):
        await make_engine(tmp_path).keep_connected(told)
    assert sum(name.startswith("gate-crash") for name in files(tmp_path)) == 5


async def test_a_gate_that_died_while_nobody_was_there_is_on_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with kept(make_engine(tmp_path)) as engine:
        old = engine.pid
    os.kill(old, signal.SIGKILL)
    bury(old)
    write_trace(tmp_path)  # the fake has none
    async with kept(make_engine(tmp_path)) as engine:
        assert f"the gate (process {old}) died" in caplog.text
        assert " before 20" in engine.last_crash
        (record,) = records(tmp_path)
        assert len(record.read_text().splitlines()) == 2
        assert not (tmp_path / TRACE).exists()
        await engine.shutdown()
    # This one ended in order: it has taken its socket away.
    write_trace(tmp_path)
    async with kept(make_engine(tmp_path)) as engine:
        assert records(tmp_path) == [record]
        await engine.shutdown()


async def test_what_systemd_replaced_is_on_record(tmp_path: Path) -> None:
    write_trace(tmp_path)
    (tmp_path / TRACE).rename(tmp_path / MOVED)
    write_trace(tmp_path)  # of the one that serves now
    async with kept(make_engine(tmp_path)) as engine:
        assert engine.last_crash.startswith("a gate died")
        assert " before 20" in engine.last_crash
        assert len(records(tmp_path)) == 1
        assert set(files(tmp_path)) >= {TRACE}
        assert MOVED not in files(tmp_path)
        await engine.shutdown()


async def test_a_gate_that_somebody_ended_is_no_crash(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with kept(make_engine(tmp_path)) as engine:
        old = engine.pid
        (tmp_path / "gate.sock").unlink()
        os.kill(old, signal.SIGKILL)
        await engine.who("session", ":1.1")
        assert engine.pid != old
        assert not engine.last_crash
        assert "terminated by another program" in caplog.text
        await engine.shutdown()


async def test_a_process_that_is_no_more_is_not_watched(tmp_path: Path) -> None:
    process = GateProcess(tmp_path / "gate.sock", ["/bin/true"])
    process.watch(past_process())
    assert not await process.has_died()
    assert not process.is_ours
    await process.wait_exit()
    await trio.lowlevel.checkpoint()


async def test_what_ends_with_the_answer_is_not_held(tmp_path: Path) -> None:
    async with kept(make_engine(tmp_path)) as engine:
        read, write = os.pipe()
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted, not read
        for number in range(20):
            await engine.add(make_spec(number, "brief"), [write, write])
        await engine.who("session", ":1.1")  # whatever was told before has been heard
        assert list(engine.held) == []
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
        os.close(read)
        os.close(write)
        await engine.shutdown()


async def test_a_replacement_that_does_not_start_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:  # from now on there is enough of everything
            (tmp_path / "refuse").unlink()
        monkeypatch.setattr(os, "posix_spawn", spawn)
        await trio.lowlevel.checkpoint()

    def refuse(*_args: object, **_options: object) -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    spawn = os.posix_spawn
    async with kept(make_engine(tmp_path)) as engine:
        old = engine.pid
        monkeypatch.setattr(trio, "sleep", pause)
        monkeypatch.setattr(os, "posix_spawn", refuse)
        (tmp_path / "refuse").touch()
        os.kill(old, signal.SIGKILL)
        assert await engine.who("session", ":1.1") is None
        assert engine.pid != old
        assert pauses == [0.25, 0.5]
        assert "cannot be started: Resource temporarily" in caplog.text
        assert "the gate did not start" in caplog.text
        await engine.shutdown()


async def test_one_that_was_first_is_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, engine = make_engine(tmp_path)._process, make_engine(tmp_path)
    refuse = tmp_path / "refuse"
    start = engine._process.start

    async def start_late() -> None:
        # An earlier supervisor, which died then, had it started: ours finds the place taken.
        await other.start()
        refuse.touch()
        await start()

    monkeypatch.setattr(engine._process, "start", start_late)
    async with kept(engine):
        assert {engine.pid} == other._children
        assert engine._process.is_ours
        await engine.shutdown()
    assert files(tmp_path) == ["refuse"]
    bury(engine.pid)


async def test_a_replacement_that_never_starts_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart_limits, "START_PAUSE", 0.001)
    with pytest.RaisesGroup(pytest.RaisesExc(GateError, match="5 times")):
        async with kept(make_engine(tmp_path)) as engine:
            (tmp_path / "refuse").touch()
            os.kill(engine.pid, signal.SIGKILL)
            await trio.sleep_forever()


async def test_who_is_started_is_ours_before_its_number_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "gate.pid"
    seen: list[bool] = []

    def spawn(*_args: object, **_options: object) -> int:
        # What another supervisor would find, had we been killed here.
        other = GateProcess(tmp_path / "gate.sock", ["/bin/true"])
        other.watch(os.getpid())
        seen.append(other.is_ours)
        other.forget()
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(os, "posix_spawn", spawn)
    process = GateProcess(tmp_path / "gate.sock", ["/bin/true"])
    with pytest.raises(GateError, match="no memory"):
        await process.start()
    assert seen == [True]
    assert not mark.exists()


async def test_what_cannot_be_noted_is_known_while_we_live(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "gate.pid").mkdir()
    async with kept(make_engine(tmp_path)) as engine:
        assert "will not end the gate" in caplog.text
        assert engine._process.is_ours
        (tmp_path / "gate.pid").rmdir()
        await engine.shutdown()
    assert files(tmp_path) == []


def test_without_descriptors_a_gate_is_not_watched_and_served_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_pid: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    process = GateProcess(tmp_path / "gate.sock", ["/bin/true"])
    process.replaced(os.getpid())
    assert process.pid == os.getpid()
    assert "is not watched: Too many open files" in caplog.text
