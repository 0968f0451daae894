"""What outlives one of the two: descriptors lent to the supervisor, and events until they are dealt with."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.control_protocol.framing import MAX_FRAME_FDS, FrameReader, make_frame
from broker.control_protocol.messages import (
    AddSandbox,
    Confirm,
    Denied,
    Done,
    Ended,
    Envelope,
    Listener,
    Listeners,
    Refused,
    Request,
    RequestInstanceField,
    SandboxSpec,
    SetBuses,
    StopListening,
    StopSandbox,
    TakeListeners,
)
from policy.rules import AccessList
from tests.gate.test_server import APP, BUS, Supervisor, count_fds


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    assert supervisor.ask(SetBuses((BUS,))) == Done()
    yield supervisor
    supervisor.close()


def borrow(supervisor: Supervisor, *sandboxes: str) -> tuple[Envelope, list[int]]:
    """Ask for listeners; return the answer with its descriptors."""
    frame = make_frame(Envelope(serial=7, body=TakeListeners(sandboxes)))
    supervisor.sock.send(frame)
    supervisor.turn()
    data, fds, _, _ = socket.recv_fds(supervisor.sock, 1 << 20, 253)
    ((envelope, own),) = FrameReader().feed(data, fds)
    return envelope, own


def come_back(supervisor: Supervisor) -> list[Envelope]:
    """Have another supervisor in place of the one that there is; return what it is told."""
    supervisor.sock.close()
    supervisor.turn()
    supervisor.sock = supervisor.connect()
    supervisor.reader = FrameReader()
    return supervisor.take()


def test_what_a_sandbox_listens_on_is_lent(supervisor: Supervisor) -> None:
    read, write = os.pipe()
    supervisor.add("c1", close_notify=read)
    supervisor.add("c2")
    supervisor.add("c3")
    supervisor.ask(StopListening("c3"))  # and so it is gone
    envelope, fds = borrow(supervisor, "c1", "c2", "c3", "c4")
    assert envelope.body == Listeners((("c1", "session"), ("c1", ""), ("c2", "session")))
    assert os.fstat(fds[1]).st_ino == os.fstat(read).st_ino
    with socket.socket(fileno=fds[2]) as held, socket.socket(socket.AF_UNIX) as app:
        assert held.getsockname() == str(supervisor.folder / "c2")
        supervisor.ask(StopSandbox("c1"))
        app.connect(held.getsockname())
    for fd in (*fds[:2], read, write):
        os.close(fd)


def test_more_than_a_frame_may_carry_is_refused_and_costs_nothing(supervisor: Supervisor) -> None:
    read, write = os.pipe()
    names = [f"c{number}" for number in range(MAX_FRAME_FDS // 2 + 1)]
    for name in names:
        supervisor.add(name, close_notify=read)
    before = count_fds()
    envelope, fds = borrow(supervisor, *names)
    assert isinstance(envelope.body, Refused)
    assert not fds
    assert count_fds() == before
    os.close(read)
    os.close(write)


def test_events_come_again_until_they_are_confirmed(supervisor: Supervisor) -> None:
    supervisor.add("c1")
    supervisor.ask(StopSandbox("c1"))
    (first,) = come_back(supervisor)
    (told,) = come_back(supervisor)
    assert first == told
    assert told.body == Ended("c1", "stopped")
    frame = make_frame(Envelope(serial=9, body=Confirm(), number=told.number))
    supervisor.sock.send(frame)
    supervisor.turn()
    assert [e.body for e in supervisor.take()] == [Done()]
    assert come_back(supervisor) == []


def test_refusals_without_a_supervisor_are_told_on_its_return(supervisor: Supervisor) -> None:
    supervisor.add("c1")
    supervisor.sock.close()
    supervisor.turn()
    refusal = Denied(
        sandbox="c1", bus="session", direction="send", kind="call", peer="org.example.X"
    )
    supervisor.gate._channel.emit(refusal)
    assert [e.body for e in come_back(supervisor)] == [refusal]


def test_the_end_of_another_of_that_name_is_not_told_again(supervisor: Supervisor) -> None:
    supervisor.add("c1")
    supervisor.ask(StopSandbox("c1"))
    supervisor.add("c1")
    assert come_back(supervisor) == []


def test_a_tag_can_be_taken_back(supervisor: Supervisor) -> None:
    tagged = supervisor.gate._buses["session"].wants_instance_field
    assert supervisor.ask(RequestInstanceField("session", ":1.5")) == Done()
    assert tagged == {":1.5"}
    assert supervisor.ask(RequestInstanceField("session", ":1.5", wanted=False)) == Done()
    assert supervisor.ask(RequestInstanceField("session", ":1.6", wanted=False)) == Done()
    assert tagged == set()


def test_a_pipe_that_was_closed_meanwhile_ends_the_sandbox(supervisor: Supervisor) -> None:
    read, write = os.pipe()
    os.close(write)
    supervisor.add("c1", close_notify=read)
    os.close(read)
    supervisor.turn()
    supervisor.take()
    assert supervisor.events == [Ended("c1", "close-notify")]


def test_clients_of_before_are_taken(supervisor: Supervisor) -> None:
    path = supervisor.folder / "held"
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as app:
        listening.bind(str(path))
        listening.listen()
        app.connect(str(path))
        spec = SandboxSpec(
            id="c1",
            identity=APP,
            uid=os.getuid(),
            listeners=(Listener(bus="session", fd=0),),
            access=AccessList(),
        )
        assert supervisor.ask(AddSandbox(spec), (listening.fileno(),)) == Done()
        app.send(b"\0AUTH EXTERNAL\r\n")
        supervisor.turn()
        assert app.recv(100).startswith(b"DATA")


def test_descriptors_for_who_is_gone_are_closed(supervisor: Supervisor) -> None:
    supervisor.add("c1")
    before = count_fds()
    request: Request = TakeListeners(("c1",))
    supervisor.sock.send(make_frame(Envelope(serial=7, body=request)))
    supervisor.sock.close()
    supervisor.turn()
    assert count_fds() <= before
    supervisor.sock = supervisor.connect()
