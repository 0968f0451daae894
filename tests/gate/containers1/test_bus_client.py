"""The gate's own connection to a bus: on a real control socket, with a bus at the other end of a socket pair."""

import os

import pytest

from broker.control_protocol.messages import (
    CallBus,
    Called,
    Done,
    Ended,
    Refused,
    Snapshot,
    StopSandbox,
    TakeSnapshot,
)
from broker.gate.containers1 import bus_client
from broker.gate.dumps import Fds
from broker.wire.errors import DISCONNECTED, LIMITS_EXCEEDED, NO_REPLY
from broker.wire.header import Header, MessageType, serialise_header
from tests.helpers.messages import call, changed, signal
from tests.helpers.own_stage import ADD, PING, Stage, stage

__all__ = ["stage"]


def test_the_bus_is_called_on_one_connection(stage: Stage) -> None:
    assert stage.make() != stage.make()
    assert stage.call(PING) == Called(signature="", body=b"", little=True)
    assert stage.bus.count == 1
    assert [call.member for call in stage.bus.calls[:3]] == ["Hello", "AddMatch", "AddServer"]


def test_an_error_of_the_bus_is_passed_on(stage: Stage) -> None:
    stage.bus.driver.mode = "refuse"
    assert stage.call(ADD) == Refused("org.freedesktop.DBus.Error.AccessDenied", "not you")


def test_other_requests_do_not_wait_for_the_bus(stage: Stage) -> None:
    stage.call(PING)
    stage.bus.quiet = True
    asked = stage.start(PING)
    assert isinstance(stage.ask(TakeSnapshot()), Snapshot)
    stage.bus.take(stage.bus.calls[-1], b"")
    stage.go_on()
    (answer,) = [e for e in stage.take() if e.serial]
    assert (answer.serial, type(answer.body)) == (asked, Called)


def test_a_bus_that_does_not_answer_hello_is_given_up(stage: Stage) -> None:
    stage.bus.quiet = True
    asked = stage.start(PING)
    stage.pass_time()
    (answer,) = [e.body for e in stage.take() if e.serial == asked]
    assert isinstance(answer, Refused)
    assert answer.error in (DISCONNECTED, NO_REPLY)
    stage.bus.quiet = False
    assert isinstance(stage.call(PING), Called)
    assert stage.bus.count == 2


def test_an_answer_that_comes_too_late_is_undone(stage: Stage) -> None:
    stage.call(PING)
    stage.bus.quiet = True
    asked = stage.start(ADD)
    stage.pass_time()
    (answer,) = [e.body for e in stage.take() if e.serial == asked]
    assert answer == Refused(NO_REPLY, "bus session did not answer AddServer in 5 s")
    stage.bus.quiet = False
    stage.bus.take(stage.bus.calls[-1], ADD.body)
    assert len(stage.bus.driver.instances) == 1
    stage.go_on()
    assert stage.bus.driver.instances == {}
    assert stage.take() == []


@pytest.mark.parametrize("what", ["bytes", "hello", "size"])
def test_a_bus_that_talks_nonsense_is_hung_up_on(stage: Stage, what: str) -> None:
    if what == "hello":
        stage.bus.refuses_hello = True
    else:
        stage.call(PING)
        stage.bus.quiet = True
    asked = stage.start(PING)
    if what == "bytes":
        stage.bus.sock.send(b"x" * 64)
    elif what == "size":
        stage.bus.sock.send(b"l\2\1\1" + (1 << 28).to_bytes(4, "little") + bytes([1, 0, 0, 0] * 2))
    stage.go_on()
    (answer,) = [e.body for e in stage.take() if e.serial == asked]
    assert isinstance(answer, Refused)
    assert answer.error == DISCONNECTED


def test_a_bus_that_cannot_be_reached(stage: Stage) -> None:
    stage.bus.is_reachable = False
    answer = stage.call(PING)
    assert answer == Refused(DISCONNECTED, "bus session cannot be reached")
    stage.bus.is_reachable = True
    assert isinstance(stage.call(PING), Called)


def test_how_many_calls_wait_is_bounded(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_client, "MAX_WAITING", 2)
    stage.call(PING)
    stage.bus.quiet = True
    stage.start(PING)
    stage.start(PING)
    answer = stage.call(PING)
    assert isinstance(answer, Refused)
    assert answer.error == LIMITS_EXCEEDED


def test_a_bus_that_does_not_read_is_hung_up_on(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_client, "MAX_BYTES", 4096)
    stage.call(PING)
    monkeypatch.setattr(stage.bus, "turn", lambda: None)
    large = CallBus(
        bus="session",
        uid=os.geteuid(),
        interface="x.y",
        member="Do",
        signature="ay",
        body=bytes(60_000),
    )
    answer = stage.call(large)
    assert isinstance(answer, Refused)
    assert "does not read" in answer.text


def test_who_calls_the_gate_is_answered(stage: Stage) -> None:
    stage.call(PING)
    stage.bus.call()
    stage.bus.call(flags=0)
    stage.go_on()
    (error,) = [one for one in stage.bus.calls if one.error_name]
    assert error.destination == ":1.9"


LONG_PATH = "/" + "a" * (2 << 20)


@pytest.mark.parametrize(
    ("body", "path"),
    [
        pytest.param(b"", LONG_PATH, id="fields"),
        pytest.param(bytes(200_000), "/", id="body"),
        pytest.param(bytes(200_000), LONG_PATH, id="both"),
    ],
)
@pytest.mark.parametrize("kind", [MessageType.METHOD_CALL, MessageType.SIGNAL])
def test_attack_c7_what_is_too_large_is_gone_over(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, kind: int, body: bytes, path: str
) -> None:
    """The connection to a bus on which anybody may send us what the bus allows."""
    monkeypatch.setattr(bus_client, "MAX_BYTES", 100_000)
    stage.call(PING)
    header = Header(
        little=True,
        type=kind,
        flags=0,
        body_length=len(body),
        serial=77,
        path=path,
        interface="org.x",
        member="Do",
        sender=":1.9",
        signature="ay" if body else "",
    )
    raw = serialise_header(header, sender=True) + body
    for at in range(0, len(raw), 70_000):
        stage.bus.sock.setblocking(True)
        stage.bus.sock.settimeout(0)
        rest = raw[at : at + 70_000]
        while rest:
            try:
                rest = rest[stage.bus.sock.send(rest) :]
            except BlockingIOError:
                stage.go_on()
    stage.go_on()
    assert stage.call(PING) == Called(signature="", body=b"", little=True)
    assert stage.bus.count == 1
    errors = [one.reply_serial for one in stage.bus.calls if one.error_name]
    is_found = kind == MessageType.METHOD_CALL and path == "/"
    assert errors == ([77] if is_found else [])


def test_attack_c7_what_is_strange_is_left_out(stage: Stage) -> None:
    stage.call(PING)
    stage.bus.sock.send(changed(signal(5, sender=":1.9"), extra={200: ("s", "\uffff")}))
    stage.bus.sock.send(
        changed(call(6, ":1.5", flags=0), sender=":1.9", extra={200: ("s", "\uffff")})
    )
    stage.go_on()
    assert stage.call(PING) == Called(signature="", body=b"", little=True)
    assert [one.reply_serial for one in stage.bus.calls if one.error_name] == [6]
    assert stage.bus.count == 1


def test_a_connection_that_is_not_ready_is_not_handed_over(stage: Stage) -> None:
    stage.bus.quiet = True
    asked = stage.start(PING)
    stage.gate._bus_clients.settle()
    assert stage.gate._bus_clients.dump(Fds()) == ()
    stage.go_on()
    (answer,) = [e.body for e in stage.take() if e.serial == asked]
    assert isinstance(answer, Refused)
    assert "try again" in answer.text


def leave(stage: Stage) -> None:
    """Have the time be over after which an idle connection is closed."""
    for _, _, timer in list(stage.loop._timers):
        if timer.callback is not None and "_leave" in repr(timer.callback):
            callback, timer.callback = timer.callback, None
            callback()
    stage.go_on()


def test_a_bus_that_keeps_nothing_for_us_is_left(stage: Stage) -> None:
    stage.call(PING)
    leave(stage)
    assert stage.bus.sock.recv(9) == b""
    upstream = stage.make()
    leave(stage)
    assert isinstance(stage.call(PING), Called)
    stage.add_labelled(upstream)
    leave(stage)
    assert stage.call(StopSandbox("c0")) == Done()
    assert stage.bus.count == 2
    leave(stage)
    assert isinstance(stage.call(PING), Called)
    assert stage.bus.count == 3
    assert stage.events == [Ended("c0", "stopped")]


def test_a_user_that_is_none_is_no_reason_to_fall(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found: 77")

    monkeypatch.setattr(bus_client, "connect_unix", connect)
    answer = stage.call(PING)
    assert isinstance(answer, Refused)
    assert answer.error == DISCONNECTED


def test_a_bus_can_be_left_at_once_unless_it_keeps_something(stage: Stage) -> None:
    last = CallBus(bus="session", uid=PING.uid, interface=PING.interface, member="Ping", leave=True)
    assert isinstance(stage.call(last), Called)
    assert stage.bus.sock.recv(9) == b""
    stage.make()
    assert isinstance(stage.call(last), Called)
    assert isinstance(stage.call(PING), Called)
    assert stage.bus.count == 2
