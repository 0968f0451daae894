import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from broker.control_protocol.messages import (
    Answer,
    BusSpec,
    ContainerServer,
    ContainerServerLost,
    Done,
    Request,
    SetContainerServer,
    Snapshot,
)
from broker.engines import gate_engine as gate_module, restart_limits
from broker.engines.base import EngineLostError
from broker.engines.gate_engine import GateEngine, _ListenerTee
from broker.engines.gate_process import GateError
from broker.wire.errors import CallRefusedError
from tests.engines.test_control_connection import Told
from tests.helpers import fake_gate
from tests.helpers.records import make_record, make_state

BUSES = (BusSpec(name="session", address="unix:path=/nowhere"),)
SPEC = make_state(make_record()).spec


def make_engine(folder: Path, mode: str = "good") -> GateEngine:
    command = (sys.executable, fake_gate.__file__, "--mode", mode)
    return GateEngine(control=folder / "gate.sock", buses=BUSES, command=command)


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"


def bury(pid: int) -> None:
    """Wait for a gate's end: it is our child, whichever supervisor started it."""
    os.waitpid(pid, 0)


@asynccontextmanager
async def kept(engine: GateEngine, told: Told | None = None) -> AsyncIterator[GateEngine]:
    """Keep it connected; at the end leave the gate as a killed supervisor would."""
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.keep_connected, told or Told())
        yield engine
        nursery.cancel_scope.cancel()


async def test_a_gate_is_started_used_and_shut_down(tmp_path: Path) -> None:
    told = Told()
    read, write = os.pipe()
    async with kept(make_engine(tmp_path), told) as engine:
        assert engine.pid > 0
        await engine.add(SPEC, [write])
        assert os.read(read, 9) == b"x"
        assert await engine.who("session", "c0") == "c0"
        assert await engine.who("session", ":1.1") is None
        await engine.set_access("c0", SPEC.access)
        await engine.stop_listening("c0")
        await engine.request_instance_field("session", ":1.1")
        await engine.stop("c0")
        assert [type(one).__name__ for one in told.order] == ["Snapshot", "Connected", "Ended"]
        with pytest.raises(CallRefusedError):
            await engine.stop("c0")
        await engine.shutdown()
        with pytest.raises(ProcessLookupError):
            os.kill(engine.pid, 0)
        with pytest.raises(EngineLostError):
            await engine.stop("c0")
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    os.close(read)
    os.close(write)


async def test_a_gate_outlives_us_and_is_found_again(tmp_path: Path) -> None:
    async with kept(make_engine(tmp_path)) as engine:
        await engine.add(SPEC, [])
        pid = engine.pid
    told = Told()
    async with kept(make_engine(tmp_path), told) as engine:
        assert engine.pid == pid
        (snapshot,) = told.order
        assert [state.spec for state in snapshot.sandboxes] == [SPEC]  # type: ignore[union-attr]
        # One of us started it, so it ends with us.
        await engine.shutdown()
    assert not is_running(pid)
    bury(pid)
    assert os.listdir(tmp_path) == []  # noqa: PTH208


@pytest.mark.parametrize(
    "upstream", [ContainerServer(), ContainerServer(instance="/i", address="unix:path=/i")]
)
async def test_what_another_engine_left_is_known_or_given_up(
    tmp_path: Path, upstream: ContainerServer, caplog: pytest.LogCaptureFixture
) -> None:
    spec = msgspec.structs.replace(SPEC, container_servers={"session": upstream})
    async with kept(make_engine(tmp_path)) as engine:
        await engine.add(spec, [])
    async with kept(make_engine(tmp_path)) as engine:
        with trio.fail_after(5):
            while engine.instances("c0") == {"session": ""}:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
            await engine.who(
                "session", ":1.1"
            )  # which the gate answers after what was asked before
        assert dict(engine.instances("c0")) == ({"session": "/i"} if upstream.instance else {})
        assert ("c0: bus session lost its container server" in caplog.text) == (
            not upstream.instance
        )
        assert engine.serving("session") == "gate"
    told = Told()
    async with kept(make_engine(tmp_path), told) as engine:
        (snapshot,) = told.order
        assert isinstance(snapshot, Snapshot)
        (state,) = snapshot.sandboxes
        assert state.spec.container_servers == (spec.container_servers if upstream.instance else {})
        await engine.shutdown()
    bury(engine.pid)


async def test_a_server_that_is_lost_is_given_up(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    class Asked(GateEngine):
        def __init__(self) -> None:
            super().__init__(control=tmp_path, buses=BUSES)
            self.asked: list[Request] = []

        async def _request(self, request: Request, fds: Sequence[int] = ()) -> Answer:
            await trio.lowlevel.checkpoint()
            self.asked.append(request)
            if len(self.asked) == 1:
                raise EngineLostError("try again")
            return Done()

    engine, told = Asked(), Told()
    ears = _ListenerTee(engine, told)
    server = ContainerServer(instance="/i", address="unix:path=/i")
    spec = msgspec.structs.replace(SPEC, container_servers={"session": server})
    state = msgspec.structs.replace(make_state(make_record()), spec=spec)
    ears.take_snapshot(Snapshot(protocol=1, pid=1, buses=(), sandboxes=(state,)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine._servers.recreate_lost, engine._recreate)
        ears.take_event(ContainerServerLost("c0", "session"))
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert engine.asked == [SetContainerServer("c0", "session", None)] * 2
    assert len(told.order) == 1


async def test_a_gate_that_somebody_else_started_is_left_running(tmp_path: Path) -> None:
    async with kept(make_engine(tmp_path)) as first:
        pid = first.pid
    (tmp_path / "gate.pid").unlink()
    async with kept(make_engine(tmp_path)) as engine:
        await engine.shutdown()
        with pytest.raises(EngineLostError):
            await engine.who("session", ":1.1")
    os.kill(pid, signal.SIGTERM)
    bury(pid)


async def test_a_gate_that_dies_is_replaced(tmp_path: Path) -> None:
    told = Told()
    async with kept(make_engine(tmp_path), told) as engine:
        pid = engine.pid
        (tmp_path / "gate.sock").unlink()
        with pytest.raises(EngineLostError):
            await engine.add(make_state(make_record(app="die")).spec, [])
        with trio.fail_after(10):
            await trio.lowlevel.checkpoint()
            while engine.pid == pid or engine._link is None:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
        assert len(told.order) == 2
        await engine.shutdown()


async def test_a_gate_of_another_version_is_not_talked_to(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, "old")
    with pytest.raises(GateError, match="protocol"):
        await engine.keep_connected(Told())
    (pid,) = engine._process._children
    os.kill(pid, signal.SIGTERM)
    bury(pid)


async def test_a_gate_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="did not start"):
        await make_engine(tmp_path, "refuse").keep_connected(Told())


async def test_gates_are_not_started_for_ever(tmp_path: Path) -> None:
    await trio.lowlevel.checkpoint()  # a clock is all it needs of trio
    limits = make_engine(tmp_path)._limits
    for _ in range(restart_limits.MAX_STARTS):
        limits.count_start()
    with pytest.raises(GateError, match="5 times"):
        limits.count_start()


async def be_given_up(
    folder: Path, serve: Callable[[trio.SocketStream], Awaitable[None]], match: str
) -> None:
    """Have an engine meet a gate that does that on each connection, and give it up."""
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(folder / "gate.sock"))
    listener.listen(64)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        with pytest.raises(GateError, match=match):
            await make_engine(folder).keep_connected(Told())
        nursery.cancel_scope.cancel()


async def test_a_gate_that_hangs_up_at_once_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart_limits, "REFUSAL_PAUSE", 0.001)

    async def hang_up(stream: trio.SocketStream) -> None:
        await stream.aclose()

    await be_given_up(tmp_path, hang_up, "another supervisor")


async def test_a_gate_that_cannot_be_understood_is_given_up_and_the_reason_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart_limits, "REFUSAL_PAUSE", 0.001)

    async def babble(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(b"\xff" * 4)
            await stream.receive_some(1)
            await trio.sleep(0.01)

    await be_given_up(tmp_path, babble, "refuses this supervisor: control frame of 4294967295")


async def test_a_gate_that_never_answers_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "GREETING_TIMEOUT", 0.01)
    with trio.socket.socket(trio.socket.AF_UNIX) as mute:
        await mute.bind(str(tmp_path / "gate.sock"))
        mute.listen()
        with trio.fail_after(10), pytest.raises(GateError, match="did not answer"):
            await make_engine(tmp_path).keep_connected(Told())


async def test_a_gate_whose_start_is_given_up_is_ended(tmp_path: Path) -> None:
    command = ("/bin/sh", "-c", "exec sleep 1000")  # which never says that it listens
    engine = GateEngine(control=tmp_path / "gate.sock", buses=BUSES, command=command)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.keep_connected, Told())
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    (pid,) = engine._process._children
    bury(pid)
