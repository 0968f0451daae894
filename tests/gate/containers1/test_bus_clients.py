"""What buses made for sandboxes, on a real control socket: claimed, ended, lost, handed over."""

import os
import socket

import pytest

from broker.control_protocol.messages import (
    ContainerServer,
    ContainerServerLost,
    Done,
    Ended,
    Refused,
    SetContainerServer,
    StopListening,
    StopSandbox,
)
from broker.gate.dumps import Fds
from broker.wire.errors import DISCONNECTED
from tests.gate.test_server import Supervisor
from tests.helpers.own_stage import ADD, PING, Stage, stage

__all__ = ["stage"]


def test_what_nobody_claims_is_undone_when_the_supervisor_goes(stage: Stage) -> None:
    kept, lost = stage.make(), stage.make()
    assert stage.add_labelled(kept) == Done()
    stage.call(PING)
    stage.bus.quiet = True
    stage.start(ADD)
    stage.bus.quiet = False
    stage.sock.close()
    stage.go_on()
    stage.bus.take(stage.bus.calls[-2], ADD.body)
    stage.go_on()
    assert lost.instance in stage.stopped()
    assert list(stage.bus.driver.instances) == [kept.instance]
    stage.sock = stage.connect()


def test_a_sandbox_cannot_have_what_is_gone(stage: Stage) -> None:
    upstream = stage.make()
    stage.bus.emit_removed(upstream.instance)
    stage.go_on()
    answer = stage.add_labelled(upstream)
    text = f"bus session has no instance {upstream.instance} any more"
    assert answer == Refused(DISCONNECTED, text)
    assert stage.call(StopSandbox("c0")) != Done()


def test_nobody_else_can_have_a_sandboxs_server(stage: Stage) -> None:
    upstream = stage.make()
    assert stage.add_labelled(upstream) == Done()
    assert isinstance(stage.add_labelled(upstream, "c1"), Refused)


def test_stopping_reaches_the_bus(stage: Stage) -> None:
    upstream = stage.make()
    stage.add_labelled(upstream)
    assert stage.call(StopSandbox("c0")) == Done()
    stage.go_on()
    assert stage.stopped() == [upstream.instance]
    assert stage.events == [Ended("c0", "stopped")]


def test_stop_listening_reaches_the_bus(stage: Stage) -> None:
    upstream = stage.make()
    stage.add_labelled(upstream, buses=("session", "other"))
    with stage.client("c0-other") as client:
        assert stage.call(StopListening("c0")) == Done()
        stage.go_on()
        assert stage.asked() == ["AddServer", "StopListening"]
        # Nobody was left there: the bus ends it, and the connection on the other bus goes on.
        stage.bus.emit_removed(upstream.instance)
        stage.go_on()
        assert stage.upstreams() == {}
        assert stage.events == []
        client.close()
        stage.go_on()
    stage.take()
    assert stage.events == [Ended("c0", "last-connection")]
    assert "StopInstance" not in stage.asked()


def test_the_bus_listens_for_who_is_on_the_way(stage: Stage) -> None:
    stage.add_labelled(stage.make())
    with stage.client("c0"):
        assert stage.call(StopListening("c0")) == Done()
        stage.go_on()
        assert stage.asked() == ["AddServer"]
    stage.go_on()
    stage.take()
    assert stage.asked() == ["AddServer", "StopInstance"]
    assert stage.events == [Ended("c0", "last-connection")]


def test_somebody_ends_the_instance_of_a_sandbox_that_takes_no_more(stage: Stage) -> None:
    upstream = stage.make()
    stage.add_labelled(upstream)
    with stage.client("c0"):
        stage.call(StopListening("c0"))
        stage.bus.emit_removed(upstream.instance)
        stage.go_on()
    stage.take()
    assert stage.events == [Ended("c0", "instance-removed")]


def test_an_instance_that_the_bus_removes_ends_its_sandbox(stage: Stage) -> None:
    upstream, other = stage.make(), stage.make()
    stage.add_labelled(upstream)
    stage.add_labelled(other, "c1")
    stage.bus.emit_removed(upstream.instance, sender=":1.9")  # anybody could say so
    stage.bus.emit_removed(upstream.instance, member="Removed")
    stage.call(PING)
    assert stage.events == []
    stage.bus.emit_removed(upstream.instance)
    stage.go_on()
    stage.take()
    assert stage.events == [Ended("c0", "instance-removed")]
    assert stage.stopped() == []


def test_a_bus_that_goes_away_leaves_its_sandboxes_waiting(stage: Stage) -> None:
    upstream = stage.make()
    stage.add_labelled(upstream)
    stage.bus.close()
    stage.go_on()
    stage.take()
    assert stage.events == [ContainerServerLost("c0", "session")]
    assert stage.upstreams() == {"session": ContainerServer()}
    again = stage.make()
    assert stage.call(SetContainerServer("c0", "session", again)) == Done()
    assert stage.upstreams() == {"session": again}
    assert stage.call(SetContainerServer("c0", "session", None)) == Done()
    assert stage.upstreams() == {}
    assert isinstance(
        stage.call(SetContainerServer("c0", "session", ContainerServer(instance="/x"))), Refused
    )


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_server_that_is_replaced_is_ended(stage: Stage, is_replaced: bool) -> None:
    first, second = stage.make(), stage.make()
    stage.add_labelled(first)
    after = second if is_replaced else None
    assert stage.call(SetContainerServer("c0", "session", after)) == Done()
    stage.go_on()
    assert stage.stopped() == [first.instance]
    stage.bus.emit_removed(first.instance)
    stage.go_on()
    assert stage.upstreams() == ({"session": second} if is_replaced else {})
    assert isinstance(
        stage.call(SetContainerServer("c0", "session", ContainerServer(instance="/x"))), Refused
    )
    assert stage.stopped() == [first.instance]


def test_a_bus_that_ends_in_order_leaves_its_sandboxes_waiting(stage: Stage) -> None:
    upstream = stage.make()
    stage.add_labelled(upstream)
    stage.bus.quiet = True
    stage.bus.emit_removed(upstream.instance)
    stage.go_on()
    stage.bus.close()
    stage.go_on()
    stage.take()
    assert stage.events == [ContainerServerLost("c0", "session")]


def test_a_connection_waits_for_a_server_that_is_made_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[str] = []
    monkeypatch.setattr(
        "broker.gate.io.connect.connect_unix",
        lambda _loop, address, _uid, _done: places.append(address),
    )
    stage.add_labelled(stage.make())
    stage.bus.close()
    stage.go_on()
    with socket.socket(socket.AF_UNIX) as app:
        app.connect(str(stage.folder / "c0"))
        app.send(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
        stage.go_on()
        app.send(b"BEGIN\r\n")
        stage.go_on()
        assert places == []
        again = stage.make()
        stage.call(SetContainerServer("c0", "session", again))
        assert places == [again.address]


def test_the_connection_is_handed_over(stage: Stage) -> None:
    stage.add_labelled(stage.make())
    unclaimed = stage.make()
    stage.bus.quiet = True
    stage.start(ADD)
    own = stage.gate._bus_clients
    fds = Fds()
    (dump,) = own.dump(fds)
    assert [path for path, *_ in dump.unclaimed] == [unclaimed.instance]
    assert [(one.member, one.undo) for one in dump.waiting] == [("AddServer", "StopInstance")]
    other = Supervisor.__new__(Stage)
    other.loop = type(stage.loop)()
    gate = type(stage.gate)(other.loop)
    gate._buses.update(stage.gate._buses)
    copies = [os.dup(fd) for fd in fds.all]
    gate._bus_clients.load([dump], gate._buses, copies)
    again = Fds()
    assert gate._bus_clients.dump(again)[0] == dump
    assert again.all == copies
    gate._bus_clients.settle()
    assert gate._bus_clients.dump(Fds()) != ()
    gate._bus_clients.close()
    other.loop.close()
