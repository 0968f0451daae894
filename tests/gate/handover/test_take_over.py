"""A whole gate handed over to another one, both in this process: what it serves, and what the supervisor hears."""

import gc
import os
import socket
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from broker.control_protocol.framing import make_frame
from broker.control_protocol.messages import (
    PROTOCOL,
    AddSandbox,
    BusSpec,
    Done,
    Ended,
    Envelope,
    Gone,
    HandedOver,
    HandOver,
    Listener,
    Refused,
    RequestInstanceField,
    SandboxOf,
    SandboxSpec,
    SetBuses,
    StopSandbox,
    WhoIs,
)
from broker.gate import server as server_module
from broker.gate.dumps import (
    AppConnectionDump,
    BudgetDump,
    HandoverError,
    RateLimitedLogDump,
    SandboxDump,
    StreamDump,
)
from broker.gate.handover import take_over as successor
from broker.gate.handover.channel import Channel, Failed
from broker.gate.handover.take_over import offer, take_over, without_connections
from broker.gate.io.loop import Loop
from broker.gate.sandbox.connection import AppConnection
from broker.gate.server import Gate
from policy.rules import AccessList, Identity
from tests.gate.test_server import Supervisor, count_fds, snapshot

BUS = BusSpec(name="session", address="unix:path=/nowhere")
ASKED = 1000
LEFT_BEHIND: list[Gate] = []


class _Left(BaseException):
    """The old gate's process would be gone."""


def _leave(_last: object) -> NoReturn:
    raise _Left


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    monkeypatch.setattr(server_module, "exit_now", _leave)
    supervisor = Supervisor(tmp_path)
    assert supervisor.ask(SetBuses((BUS,))) == Done()
    yield supervisor
    supervisor.close()
    # A gate that is left behind closes nothing: its process would do that.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del supervisor.gate, supervisor.loop
        LEFT_BEHIND.clear()
        gc.collect()


def hand_over(
    supervisor: Supervisor, *behind: Envelope, fds: Sequence[int] = (), protocol: int = PROTOCOL
) -> str:
    """Have the gate of this supervisor replaced; return why that fails, if it does.

    `behind` and `fds` follow the request at once.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = Envelope(serial=ASKED, body=HandOver(5.0, protocol), fds=1)
    frames = b"".join(map(make_frame, (request, *behind)))
    socket.send_fds(supervisor.sock, [frames], [ours.fileno(), *fds])
    ours.close()
    old, new_loop = supervisor.loop, Loop()
    gate = Gate(new_loop)
    left = []

    def be_old() -> None:
        try:
            supervisor.turn()
        except _Left:
            left.append(True)

    thread = threading.Thread(target=be_old)
    thread.start()
    channel = Channel(theirs.detach(), 5.0)
    try:
        offer(channel, 77)
        opening = take_over(channel, gate)
    except HandoverError as exc:
        LEFT_BEHIND.append(gate)
        channel.say(Failed(str(exc)))
        thread.join()
        assert not left
        return str(exc)
    finally:
        channel.close()
    thread.join()
    assert left
    old.close()
    LEFT_BEHIND.append(supervisor.gate)
    supervisor.gate, supervisor.loop = gate, new_loop
    gate.resume(opening.serial)
    return ""


def test_the_new_gate_answers_what_was_asked_and_what_was_behind_it(
    supervisor: Supervisor,
) -> None:
    supervisor.add("c0")
    supervisor.add("c1")
    supervisor.ask(RequestInstanceField("session", ":1.5"))
    before = snapshot(supervisor)
    who = Envelope(serial=ASKED + 1, body=WhoIs("session", ":1.9"))
    assert hand_over(supervisor, who) == ""
    supervisor.turn()
    answers = supervisor.take()
    assert [answer.serial for answer in answers] == [ASKED, ASKED + 1]
    assert [answer.body for answer in answers] == [HandedOver(os.getpid()), SandboxOf(None)]
    after = snapshot(supervisor)
    assert [one.spec for one in after.sandboxes] == [one.spec for one in before.sandboxes]
    assert after.buses == before.buses
    assert vars(supervisor.gate)["_buses"]["session"].wants_instance_field == {":1.5"}


def test_a_sandbox_that_was_being_added_is_added_by_the_new_gate(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    spec = SandboxSpec(
        id="c7",
        identity=Identity(type="org.example.Type", app="x"),
        uid=os.getuid(),
        listeners=(Listener(bus="session", fd=0),),
        access=AccessList(),
    )
    add = Envelope(serial=ASKED + 1, body=AddSandbox(spec), fds=1)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "c7"))
        sock.listen()
        assert hand_over(supervisor, add, fds=[sock.fileno()]) == ""
    supervisor.turn()
    assert [e.body for e in supervisor.take()] == [HandedOver(os.getpid()), Done()]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "c7"))
        supervisor.turn()
        assert snapshot(supervisor).sandboxes[0].opening == 1


def test_sockets_and_pipes_are_served_by_the_new_gate(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    read_end, write_end = os.pipe()
    supervisor.add("c0", close_notify=read_end)
    os.close(read_end)
    supervisor.add("c1")
    with socket.socket(socket.AF_UNIX) as early, socket.socket(socket.AF_UNIX) as late:
        early.connect(str(tmp_path / "c1"))
        early.send(b"\0AUTH EXT")
        supervisor.turn()
        assert snapshot(supervisor).sandboxes[1].opening == 1
        assert hand_over(supervisor) == ""
        early.send(b"ERNAL\r\n")
        late.connect(str(tmp_path / "c1"))
        late.send(b"\0AUTH EXTERNAL\r\n")
        supervisor.turn()
        for sock in (early, late):
            sock.setblocking(False)
            assert sock.recv(100) == b"DATA\r\n"
        supervisor.take()
        assert snapshot(supervisor).sandboxes[1].opening == 2
        os.close(write_end)
        supervisor.turn()
        supervisor.take()
        assert supervisor.events[-1] == Ended("c0", "close-notify")
        assert not (tmp_path / "c0").exists()
        assert supervisor.ask(StopSandbox("c1")) == Done()
        assert not (tmp_path / "c1").exists()


def test_ends_that_nobody_confirmed_are_told_by_the_new_gate(supervisor: Supervisor) -> None:
    supervisor.add("c0")
    supervisor.ask(StopSandbox("c0"))
    assert hand_over(supervisor) == ""
    supervisor.turn()
    supervisor.sock.close()
    supervisor.turn()
    supervisor.events.clear()
    supervisor.sock = supervisor.connect()
    supervisor.turn()
    supervisor.take()
    assert supervisor.events == [Ended("c0", "stopped")]


def test_what_differs_is_not_served(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    supervisor.add("c0")
    monkeypatch.setattr(successor, "dump_equals", lambda *_: False)
    assert "differs" in hand_over(supervisor)
    (answer,) = supervisor.take()
    assert isinstance(answer.body, Refused)
    assert "the new gate cannot take over: " in answer.body.text
    assert (tmp_path / "c0").exists()
    assert len(snapshot(supervisor).sandboxes) == 1


def test_another_protocol_than_the_supervisors_is_not_spoken(supervisor: Supervisor) -> None:
    assert f"the supervisor {PROTOCOL + 1}" in hand_over(supervisor, protocol=PROTOCOL + 1)
    assert supervisor.take()


def test_a_gate_that_judges_wrongly_does_not_offer_itself(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> NoReturn:
        raise HandoverError("the self check failed: wrong verdicts")

    monkeypatch.setattr(successor, "check_judgement", fails)
    assert "wrong verdicts" in hand_over(supervisor)
    (answer,) = supervisor.take()
    assert isinstance(answer.body, Refused)


def test_it_takes_one_descriptor(supervisor: Supervisor) -> None:
    answer = supervisor.ask(HandOver(1.0))
    assert isinstance(answer, Refused)
    assert "one descriptor" in answer.text


def test_who_has_used_up_its_budget_has_to_wait_on(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.add("c0")
    sandbox = vars(supervisor.gate)["_sandboxes"]["c0"]
    assert sandbox.charge(10_000_000, sandbox.resume_listening)
    sandbox.limited_log.warning("test", "of the log")
    before = snapshot(supervisor).sandboxes[0].usage
    assert before.messages_per_second > 9_000_000
    assert hand_over(supervisor) == ""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "c0"))
        supervisor.turn(10)
        supervisor.take()
        (state,) = snapshot(supervisor).sandboxes
        assert state.opening == 0
        assert state.usage.messages_per_second > 9_000_000
        assert state.usage.throttled == before.throttled == 1


def test_a_bus_that_was_too_busy_is_connected_to_by_the_new_gate(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    with (
        socket.socket(socket.AF_UNIX) as bus,
        socket.socket(socket.AF_UNIX) as crowd,
        socket.socket(socket.AF_UNIX) as app,
    ):
        bus.bind(str(tmp_path / "bus"))
        bus.listen(0)
        crowd.connect(str(tmp_path / "bus"))  # there is no room for another one
        supervisor.ask(SetBuses((BusSpec(name="session", address=f"unix:path={tmp_path}/bus"),)))
        supervisor.add("c0")
        app.connect(str(tmp_path / "c0"))
        uid = str(os.getuid()).encode().hex().encode()
        app.send(b"\0AUTH EXTERNAL " + uid + b"\r\nBEGIN\r\nl\1")
        supervisor.turn()
        bus.settimeout(0.01)
        bus.accept()[0].close()
        with pytest.raises(TimeoutError):
            bus.accept()
        assert hand_over(supervisor) == ""
        supervisor.turn()
        accepted, _ = bus.accept()
        with accepted:
            accepted.settimeout(1)
            assert accepted.recv(100).startswith(b"\0AUTH EXTERNAL ")
            accepted.send(b"OK " + b"0" * 32 + b"\r\nAGREE_UNIX_FD\r\n")
            supervisor.turn()
            supervisor.take()
            assert snapshot(supervisor).sandboxes[0].opening == 1
            assert hand_over(supervisor) == ""  # once more, in the midst of the first message
            app.send(bytes(200))
            supervisor.turn()
            app.settimeout(1)
            assert app.recv(1000).startswith(b"OK ")
            supervisor.take()
            # That was no message. (The old gate's copy of the socket is still open here.)
            assert snapshot(supervisor).sandboxes[0].opening == 0


def test_attack_c2_a_sandbox_that_cannot_be_taken_over_has_no_veto(
    supervisor: Supervisor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A damaged sandbox loses its connections; its socket and all others are served."""
    supervisor.add("c0")
    supervisor.add("c1")
    load = AppConnection.load

    def fail(self: AppConnection, dump: AppConnectionDump, fds: Sequence[int]) -> None:
        load(self, dump, fds)
        if self.sandbox.id == "c1":
            raise ValueError("a state of the future")

    with (
        socket.socket(socket.AF_UNIX) as good,
        socket.socket(socket.AF_UNIX) as bad,
        socket.socket(socket.AF_UNIX) as late,
    ):
        for name, sock in (("c0", good), ("c1", bad)):
            sock.connect(str(tmp_path / name))
            sock.send(b"\0AUTH EXT")
        supervisor.turn(5)
        before = count_fds()
        monkeypatch.setattr(AppConnection, "load", fail)
        assert hand_over(supervisor) == ""
        assert "not-taken-over sandbox=c1: ValueError('a state of the future')" in caplog.text
        good.send(b"ERNAL\r\n")
        late.connect(str(tmp_path / "c1"))
        late.send(b"\0AUTH EXTERNAL\r\n")
        supervisor.turn(5)
        for sock in (good, late):
            sock.settimeout(5)
            assert sock.recv(100) == b"DATA\r\n"
        supervisor.take()
        assert [one.opening for one in snapshot(supervisor).sandboxes] == [1, 1]
        assert supervisor.events == []
        # The old gate's process would be gone, and the connection with it: here its copies are still open.
        assert count_fds() > before
        assert supervisor.ask(StopSandbox("c1")) == Done()


def test_attack_c2_who_loses_its_connections_in_an_upgrade_is_told_gone(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor.add("c0")
    sandbox = vars(supervisor.gate)["_sandboxes"]["c0"]
    bus = vars(supervisor.gate)["_buses"]["session"]
    bus.connected(":1.7", "c0", sandbox.identity)
    sandbox.lost.append(("session", ":1.7"))
    sandbox.resume()
    supervisor.turn()
    supervisor.take()
    assert supervisor.events == [Gone("c0", "session", ":1.7")]
    assert bus.who(":1.7") == "c0"  # whose messages may come
    assert sandbox.lost == []


def test_a_dump_without_connections_has_its_own_descriptors_alone() -> None:
    def dumped(*, listening: tuple[tuple[int, int], ...], close_pipe: int) -> SandboxDump:
        return SandboxDump(
            spec=SandboxSpec(
                id="c1",
                identity=Identity(type="org.example.Type", app="x"),
                uid=0,
                listeners=(),
                access=AccessList(),
            ),
            guid="0",
            listening=listening,
            close_pipe=close_pipe,
            connections=(AppConnectionDump(bus="session", guid="0", app_side=StreamDump(fd=2)),),
            messages=BudgetDump(left=1, filled=0.0),
            limited_log=RateLimitedLogDump(second=0.0),
            reports_left=1,
        )

    bare, fds, names = without_connections(dumped(listening=((0, 0),), close_pipe=1), [5, 6, 7])
    assert (bare.connections, fds, names) == ((), [5, 6], [])
    with pytest.raises(HandoverError, match="unexpected order"):
        without_connections(dumped(listening=((0, 1),), close_pipe=-1), [5, 6, 7])
