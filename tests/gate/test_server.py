"""The gate's control socket, spoken to as the supervisor does."""

import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.control_protocol.framing import FrameReader, make_frame
from broker.control_protocol.messages import (
    PROTOCOL,
    AddSandbox,
    Answer,
    BusSpec,
    Done,
    Ended,
    Envelope,
    Event,
    Listener,
    Refused,
    Request,
    SandboxOf,
    SandboxSpec,
    SetAccess,
    SetBuses,
    Shutdown,
    Snapshot,
    StopListening,
    StopSandbox,
    TakeSnapshot,
    TakeUsage,
    Usage,
    WhoIs,
)
from broker.gate import server, supervisor_channel
from broker.gate.io.loop import Loop
from broker.gate.sandbox.budgets import MessageBudget
from broker.gate.server import Gate
from broker.wire import errors
from broker.wire.errors import LIMITS_EXCEEDED
from policy.rules import Access, AccessList, Identity, Rule

APP = Identity(type="org.example.Type", app="org.example.App")
BUS = BusSpec(name="session", address="unix:path=/nowhere")


class Supervisor:
    """A gate in this very process, and the other end of its control socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loop = Loop()
        self.gate = Gate(self.loop)
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(folder / "gate"))
        self.listening.listen()
        self.gate.serve(self.listening)
        self.sock = self.connect()
        self.reader = FrameReader()
        self.events: list[Event] = []
        self.serial = 0

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.folder / "gate"))
        sock.setblocking(False)
        self.turn()
        return sock

    def turn(self, times: int = 3) -> None:
        for _ in range(times):
            self.loop._running = True
            self.loop.call_later(0, self.loop.stop)
            self.loop.run()

    def ask(self, request: Request, fds: tuple[int, ...] = ()) -> Answer:
        self.serial += 1
        frame = make_frame(Envelope(serial=self.serial, body=request, fds=len(fds)))
        socket.send_fds(self.sock, [frame], fds)
        self.turn()
        while self.gate._channel.is_busy:
            self.turn(1)
        answers = [e for e in self.take() if e.serial]
        assert [e.serial for e in answers] == [self.serial]
        body = answers[0].body
        assert isinstance(body, Answer)
        return body

    def take(self) -> list[Envelope]:
        try:
            data = self.sock.recv(1 << 20)
        except BlockingIOError:
            return []
        envelopes = [envelope for envelope, _ in self.reader.feed(data)]
        self.events += [e.body for e in envelopes if isinstance(e.body, Event)]
        return envelopes

    def add(
        self,
        id_: str = "c0",
        *,
        close_notify: int | None = None,
        access: AccessList = AccessList(),  # noqa: B008 - it does not change
    ) -> Answer:
        path = self.folder / id_
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
            sock.listen()
            status = path.stat()
            listener = Listener(
                bus="session", fd=0, path=str(path), device=status.st_dev, inode=status.st_ino
            )
            fds = [os.dup(sock.fileno())]
        spec = SandboxSpec(
            id=id_,
            identity=APP,
            uid=os.getuid(),
            listeners=(listener,),
            access=access,
            close_notify=None if close_notify is None else 1,
        )
        if close_notify is not None:
            fds.append(close_notify)
        answer = self.ask(AddSandbox(spec), tuple(fds))
        os.close(fds[0])
        return answer

    def close(self) -> None:
        self.ask(Shutdown())
        self.gate.close()
        self.sock.close()
        self.listening.close()
        self.loop.close()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    assert supervisor.ask(SetBuses((BUS,))) == Done()
    yield supervisor
    supervisor.close()


def count_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def snapshot(supervisor: Supervisor) -> Snapshot:
    answer = supervisor.ask(TakeSnapshot())
    assert isinstance(answer, Snapshot)
    return answer


def ask_in_parts(supervisor: Supervisor) -> list[Snapshot]:
    """Return the parts of a snapshot, read while the gate sends them."""
    supervisor.sock.send(make_frame(Envelope(serial=77, body=TakeSnapshot(in_parts=True))))
    parts: list[Snapshot] = []
    while not parts or parts[-1].more:
        supervisor.turn()
        for envelope in supervisor.take():
            assert envelope.serial == 77
            assert isinstance(envelope.body, Snapshot)
            parts.append(envelope.body)
    return parts


def test_an_added_sandbox_is_in_the_snapshot(supervisor: Supervisor) -> None:
    assert supervisor.add() == Done()
    found = snapshot(supervisor)
    assert [one.spec.id for one in found.sandboxes] == ["c0"]
    assert found.buses == (BUS,)
    assert found.sandboxes[0].listening


def test_the_same_id_twice_is_refused(supervisor: Supervisor) -> None:
    supervisor.add()
    (supervisor.folder / "c0").unlink()
    answer = supervisor.add()
    assert isinstance(answer, Refused)
    assert "already exists" in answer.text


def test_rules_that_do_not_compile_are_refused_and_the_old_ones_stay(
    supervisor: Supervisor,
) -> None:
    supervisor.add()
    bad = AccessList(rules=(Rule(access=frozenset({Access.SEND}), path="/a/[z"),))
    assert isinstance(supervisor.ask(SetAccess("c0", bad)), Refused)
    assert snapshot(supervisor).sandboxes[0].spec.access == AccessList()


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(SetAccess("c9", AccessList()), id="set-access"),
        pytest.param(StopListening("c9"), id="stop-listening"),
        pytest.param(StopSandbox("c9"), id="stop"),
        pytest.param(WhoIs("nobus", ":1.1"), id="who"),
    ],
)
def test_what_is_not_there_is_refused(supervisor: Supervisor, request_: Request) -> None:
    assert isinstance(supervisor.ask(request_), Refused)


def test_a_stranger_is_in_no_sandbox(supervisor: Supervisor) -> None:
    assert supervisor.ask(WhoIs("session", ":1.7")) == SandboxOf(None)


def test_stopping_ends_it_once_and_unlinks_its_socket(supervisor: Supervisor) -> None:
    supervisor.add()
    assert supervisor.ask(StopSandbox("c0")) == Done()
    assert supervisor.events == [Ended("c0", "stopped")]
    assert not (supervisor.folder / "c0").exists()
    assert isinstance(supervisor.ask(StopSandbox("c0")), Refused)


def test_stopping_has_the_reason_that_it_is_given(supervisor: Supervisor) -> None:
    supervisor.add()
    assert supervisor.ask(StopSandbox("c0", "time-limit")) == Done()
    assert supervisor.events == [Ended("c0", "time-limit")]


def test_stop_listening_without_connections_is_the_end(supervisor: Supervisor) -> None:
    supervisor.add()
    supervisor.ask(StopListening("c0"))
    assert supervisor.events == [Ended("c0", "last-connection")]


def test_a_socket_that_somebody_replaced_is_left_alone(supervisor: Supervisor) -> None:
    supervisor.add()
    path = supervisor.folder / "c0"
    path.unlink()
    path.touch()
    supervisor.ask(StopSandbox("c0"))
    assert path.exists()


def test_end_of_the_pipe_is_the_end_of_the_sandbox(supervisor: Supervisor) -> None:
    reading, writing = os.pipe()
    supervisor.add(close_notify=reading)
    os.close(reading)
    os.write(writing, b"noise")
    supervisor.turn()
    assert snapshot(supervisor).sandboxes
    os.close(writing)
    supervisor.turn()
    supervisor.take()
    assert supervisor.events == [Ended("c0", "close-notify")]


def test_an_end_without_a_supervisor_is_told_to_the_next_one(supervisor: Supervisor) -> None:
    reading, writing = os.pipe()
    supervisor.add(close_notify=reading)
    os.close(reading)
    supervisor.sock.close()
    supervisor.turn()
    os.close(writing)
    supervisor.turn()
    supervisor.sock = supervisor.connect()
    supervisor.take()
    assert supervisor.events == [Ended("c0", "close-notify")]


def test_a_second_supervisor_is_turned_away(supervisor: Supervisor) -> None:
    second = supervisor.connect()
    assert second.recv(10) == b""
    second.close()
    assert snapshot(supervisor).protocol == PROTOCOL


def test_bytes_that_are_no_frame_end_the_connection_only(supervisor: Supervisor) -> None:
    supervisor.add()
    supervisor.sock.send(b"\x04\x00\x00\x00junk")
    supervisor.turn()
    assert supervisor.sock.recv(10) == b""
    supervisor.sock.close()
    supervisor.sock = supervisor.connect()
    supervisor.reader = FrameReader()
    assert [one.spec.id for one in snapshot(supervisor).sandboxes] == ["c0"]


def test_descriptors_of_a_refused_request_are_closed(supervisor: Supervisor) -> None:
    before = count_fds()
    reading, writing = os.pipe()
    spec = SandboxSpec(
        id="c1",
        identity=APP,
        uid=0,
        listeners=(Listener(bus="nobus", fd=0),),
        access=AccessList(),
    )
    assert isinstance(supervisor.ask(AddSandbox(spec), (reading,)), Refused)
    os.close(reading)
    os.close(writing)
    assert count_fds() == before


def test_use_is_told_of_one_sandbox_and_of_all(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MessageBudget, "fill", lambda _budget: None)  # however long this takes
    assert supervisor.ask(TakeUsage()) == Usage()
    supervisor.add("c0")
    supervisor.add("c1")
    apps = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for app, name in zip(apps, ("c0", "c1", "c1"), strict=True):
        app.connect(str(supervisor.folder / name))
    supervisor.turn()
    one, both = supervisor.ask(TakeUsage("c1")), supervisor.ask(TakeUsage())
    assert isinstance(one, Usage)
    assert isinstance(both, Usage)
    assert (one.connections, one.handshake_seconds) == (2, 2)
    assert (both.connections, both.handshake_seconds) == (3, 3)
    assert 0 < one.messages_per_second < both.messages_per_second
    assert isinstance(supervisor.ask(TakeUsage("c9")), Refused)
    for app in apps:
        app.close()


def works(supervisor: Supervisor) -> bool:
    return supervisor.gate._channel.is_busy


def globs(count: int, pattern: str) -> AccessList:
    access = frozenset({Access.SEND})
    return AccessList(
        rules=tuple(Rule(access=access, path=pattern.format(n)) for n in range(count))
    )


def test_attack_c4_changing_to_many_globs_leaves_others_their_turns(supervisor: Supervisor) -> None:
    supervisor.add()
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        if supervisor.gate._channel.is_busy:
            supervisor.loop.next_turn(turn)

    request = SetAccess("c0", globs(9990, "/org/x{}/**/y*z"))
    frames = make_frame(Envelope(serial=7, body=request))
    frames += make_frame(Envelope(serial=8, body=TakeUsage("c0")))
    supervisor.sock.setblocking(True)
    sender = threading.Thread(target=supervisor.sock.sendall, args=(frames,))
    sender.start()
    while not works(supervisor):
        supervisor.turn(1)
    supervisor.loop.next_turn(turn)
    supervisor.turn(1)
    assert supervisor.gate._sandboxes["c0"].spec.access == AccessList()  # until it is compiled
    while works(supervisor):
        supervisor.turn(1)
    sender.join()
    supervisor.turn()
    supervisor.sock.setblocking(False)
    answers = [(envelope.serial, envelope.body) for envelope in supervisor.take()]
    assert [serial for serial, _ in answers] == [7, 8]  # in order, whatever takes long
    assert answers[0][1] == Done()
    assert isinstance(answers[1][1], Usage)
    assert 9990 < answers[1][1].rule_steps < 32_768
    # What each of the steps is at the most, test_tables.py counts.
    assert turns > 40


def test_attack_c4_the_gate_refuses_a_list_that_costs_too_much(supervisor: Supervisor) -> None:
    supervisor.add()
    for request in (SetAccess("c0", globs(6000, "/**a*{}b*")), SetAccess("c0", globs(1, "/[z-a]"))):
        answer = supervisor.ask(request)
        assert isinstance(answer, Refused)
        assert snapshot(supervisor).sandboxes[0].spec.access == AccessList()
    answer = supervisor.ask(SetAccess("c0", globs(6000, "/**a*{}b*")))
    assert isinstance(answer, Refused)
    assert answer.error == errors.LIMITS_EXCEEDED
    assert "rule_steps=32768 would be exceeded" in answer.text


def test_what_is_compiled_for_a_supervisor_that_left_is_not_answered_to_the_next(
    supervisor: Supervisor,
) -> None:
    supervisor.add()
    request = SetAccess("c0", globs(2000, "/org/x{}/**/y*z"))
    frames = make_frame(Envelope(serial=7, body=request))
    frames += make_frame(Envelope(serial=8, body=StopSandbox("c0")))
    supervisor.sock.setblocking(True)
    sender = threading.Thread(target=supervisor.sock.sendall, args=(frames,))
    sender.start()
    while not works(supervisor):
        supervisor.turn(1)
    sender.join()
    supervisor.sock.close()
    supervisor.turn(1)
    supervisor.sock, supervisor.reader = supervisor.connect(), FrameReader()
    while works(supervisor):
        supervisor.turn(1)
    supervisor.turn()
    assert [envelope for envelope in supervisor.take() if envelope.serial] == []
    assert "c0" in supervisor.gate._sandboxes  # nobody was told that it is stopped


LONG = AccessList(
    rules=tuple(Rule(access=frozenset({Access.SEND}), path=f"/{n}/{'x' * 4000}") for n in range(50))
)


def add_long(supervisor: Supervisor, count: int) -> list[str]:
    ids = [f"c{number}" for number in range(count)]
    for id_ in ids:
        assert supervisor.add(id_) == Done()
        assert supervisor.ask(SetAccess(id_, LONG)) == Done()
    return ids


def test_a_snapshot_that_is_long_comes_in_parts(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_PART_BYTES", 1_000_000)
    ids = add_long(supervisor, 12)
    parts = ask_in_parts(supervisor)
    assert [part.more for part in parts] == [True, True, False]
    found = [state for part in parts for state in part.sandboxes]
    assert [state.spec.id for state in found] == ids
    assert all(state.spec.access == LONG for state in found)
    assert all(part.buses == (BUS,) for part in parts)


def test_a_snapshot_may_be_longer_than_what_a_supervisor_leaves_unread(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_PART_BYTES", 100_000)
    monkeypatch.setattr(supervisor_channel, "MAX_UNREAD", 100_000)
    supervisor.gate._channel._bound_unread()
    ids = add_long(supervisor, 12)
    supervisor.sock.send(make_frame(Envelope(serial=77, body=TakeSnapshot(in_parts=True))))
    supervisor.turn()
    for id_ in ids:  # and what happens while it is on its way is told
        supervisor.gate._sandboxes[id_].stop("close-notify")
    got: list[Envelope] = []
    while not supervisor.events[len(ids) - 1 :]:
        got += supervisor.take()
        supervisor.turn()
    parts = [one.body for one in got if isinstance(one.body, Snapshot)]
    assert [state.spec.id for part in parts for state in part.sandboxes] == ids
    assert supervisor.events == [Ended(id_, "close-notify") for id_ in ids]
    assert supervisor.gate._channel._most_unread == 100_000  # as before


def test_attack_f2_a_descriptor_that_cannot_end_is_refused_by_the_gate_too(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    before = count_fds()
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(type=socket.SOCK_DGRAM) as udp:
        sock.bind(str(tmp_path / "sandbox"))
        spec = SandboxSpec(
            id="c1",
            identity=APP,
            uid=os.getuid(),
            access=AccessList(),
            listeners=(Listener(bus="session", fd=0),),
            close_notify=1,
        )
        answer = supervisor.ask(AddSandbox(spec), (sock.fileno(), udp.fileno()))
        assert isinstance(answer, Refused)  # it does not listen
        sock.listen()
        answer = supervisor.ask(AddSandbox(spec), (sock.fileno(), udp.fileno()))
        assert isinstance(answer, Refused)
        assert answer.error == "org.freedesktop.DBus.Error.InvalidArgs"
        assert "CloseNotify is not the read end of a pipe" in answer.text
        read_end = pipe_end()
        assert supervisor.ask(AddSandbox(spec), (sock.fileno(), read_end)) == Done()
        os.close(read_end)
    assert count_fds() == before


def pipe_end() -> int:
    read_end, write_end = os.pipe()
    os.close(write_end)
    return read_end


def test_attack_c9_descriptors_that_do_not_fit_cost_their_request_alone(
    supervisor: Supervisor,
) -> None:
    pipe = os.pipe()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted, not read
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        spec = SandboxSpec(
            id="c0", identity=APP, uid=os.getuid(), listeners=(), access=AccessList()
        )
        answers = [supervisor.ask(AddSandbox(spec), pipe) for _ in range(3)]
        there = supervisor.ask(WhoIs("session", ":1.1"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {(one.error, one.text) for one in answers if isinstance(one, Refused)} == {
        (LIMITS_EXCEEDED, "the gate has no file descriptors left")
    }
    assert there == SandboxOf(None)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    for fd in pipe:
        os.close(fd)


def test_attack_c4_a_sandbox_whose_rules_cost_too_much_is_refused_with_its_descriptors(
    supervisor: Supervisor,
) -> None:
    before = count_fds()
    answer = supervisor.add(access=globs(6000, "/**a*{}b*"))
    assert isinstance(answer, Refused)
    assert answer.error == errors.LIMITS_EXCEEDED
    assert snapshot(supervisor).sandboxes == ()
    assert count_fds() == before
