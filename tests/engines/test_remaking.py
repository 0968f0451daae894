"""The engine for buses that label: what they lose, and what a supervisor that is new finds."""

from collections.abc import Sequence

import msgspec
import pytest
import trio

from broker.control_protocol.messages import (
    Answer,
    CallBus,
    ContainerServer,
    ContainerServerLost,
    Ended,
    Request,
    SandboxSpec,
    SetContainerServer,
    Snapshot,
    StopSandbox,
)
from broker.engines.base import EngineLostError
from broker.engines.gate_engine import _ListenerTee
from broker.wire.errors import DISCONNECTED, NOT_CONTAINER, CallRefusedError
from policy.rules import AccessList
from policy.text import parse_rule
from policy.usos.convert import make_superset
from tests.engines.test_control_connection import Told
from tests.helpers.fake_driver import FakeDriver, Result
from tests.helpers.labels_stage import Engine, fd, make_spec, reachable, remaking
from tests.helpers.records import make_record, make_state

__all__ = ["fd", "reachable"]


def test_the_snapshot_brings_back_what_belongs_together() -> None:
    engine, told = Engine(session=FakeDriver()), Told()
    upstream = ContainerServer(instance="/i", address="unix:path=/i")
    state = msgspec.structs.replace(
        make_state(make_record()), spec=make_spec(container_servers={"session": upstream})
    )
    snapshot = Snapshot(protocol=1, pid=1, buses=(), sandboxes=(state,))
    ears = _ListenerTee(engine, told)
    ears.take_snapshot(snapshot)
    assert engine.instances("c0") == {"session": "/i"}
    assert told.order == [snapshot]
    ears.take_event(Ended("c0", "stopped"))
    assert engine.instances("c0") == {}
    assert len(told.order) == 2


async def test_a_server_that_is_lost_is_made_again(fd: int) -> None:
    engine, told = Engine(session=FakeDriver()), Told()
    await engine.add(make_spec(), [fd])
    before = engine.instances("c0")
    async with remaking(engine):
        _ListenerTee(engine, told).take_event(ContainerServerLost("c0", "session"))
        assert engine.instances("c0") == {"session": ""}
        assert (engine.name, engine.serving("session")) == ("containers1", "containers1")
    (request,) = engine.requests(SetContainerServer)
    assert request.server.instance == engine.instances("c0")["session"]
    assert engine.instances("c0") != before
    assert told.order == []
    engine.held.close()


async def test_two_buses_that_are_lost_at_once(fd: int) -> None:
    engine = Engine(session=FakeDriver(), other=FakeDriver())
    await engine.add(make_spec(0, "session", "other"), [fd])
    async with remaking(engine):
        for bus in ("session", "other", "session"):
            engine.lose(ContainerServerLost("c0", bus))
    assert [driver.made for driver in engine.drivers.values()] == [2, 2]
    assert sorted(one.bus for one in engine.requests(SetContainerServer)) == ["other", "session"]
    assert set(engine.instances("c0")) == {"session", "other"}
    engine.held.close()


async def test_a_snapshot_while_a_bus_is_waited_for(
    fd: int, autojump_clock: trio.testing.MockClock
) -> None:
    engine = Engine(session=FakeDriver())
    await engine.add(make_spec(), [fd])
    state = make_state(make_record())
    lost = msgspec.structs.replace(
        state, spec=make_spec(container_servers={"session": ContainerServer()})
    )
    snapshot = Snapshot(protocol=1, pid=1, buses=(), sandboxes=(lost,))
    engine.gone = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine._servers.recreate_lost, engine._recreate)
        engine.lose(ContainerServerLost("c0", "session"))
        for _ in range(3):
            await trio.sleep(1)
            engine.learn(snapshot)
        engine.gone = False
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert engine.drivers["session"].made == 2
    assert len(engine.requests(SetContainerServer)) == 1
    engine.held.close()


async def test_a_gate_that_is_not_there_is_asked_again(
    fd: int, autojump_clock: trio.testing.MockClock
) -> None:
    engine = Engine(session=FakeDriver())
    await engine.add(make_spec(), [fd])
    engine.refuse = EngineLostError("there is no gate")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine._servers.recreate_lost, engine._recreate)
        engine.lose(ContainerServerLost("c0", "session"))
        await trio.sleep(3)
        engine.refuse = None
        await trio.sleep(3)
        nursery.cancel_scope.cancel()
    assert set(engine.instances("c0")) == {"session"}
    engine.held.close()


async def test_rules_that_change_while_a_server_is_made_again_reach_the_bus(
    fd: int, autojump_clock: trio.testing.MockClock
) -> None:
    lists = [
        AccessList(rules=(parse_rule(f"send:org.{name}", deny=False, origin=""),))
        for name in ("a", "b", "c")
    ]

    class Slow(Engine):
        async def _request(self, request: Request, fds: Sequence[int] = ()) -> Answer:
            answer = await super()._request(request, fds)
            if isinstance(request, CallBus):
                await trio.sleep(1)
            return answer

    driver = FakeDriver(arguments=("Allow",), set_access="SetContainerAccess")
    engine = Slow(session=driver)
    await engine.add(make_spec(access=lists[0]), [fd])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine._servers.recreate_lost, engine._recreate)
        engine.lose(ContainerServerLost("c0", "session"))
        await trio.sleep(2.5)  # it is asked what it has, in two calls, and then for a server
        assert driver.made == 2
        await engine.set_access("c0", lists[1])
        await trio.sleep(1)  # while it is told
        await engine.set_access("c0", lists[2])
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    path = engine.instances("c0")["session"]
    said = [values for member, values in driver.asked if member == "SetContainerAccess"]
    assert said[0] == [path, list(make_superset(lists[1], "session"))]
    assert said[-1] == [path, list(make_superset(lists[2], "session"))]
    engine.held.close()


class Interrupted(Engine):
    """In which something happens before the first answer to SetUpstream gets to whoever asked."""

    def happen(self, request: SetContainerServer) -> None:
        """Overridden."""

    async def _request(self, request: Request, fds: Sequence[int] = ()) -> Answer:
        answer = await super()._request(request, fds)
        if isinstance(request, SetContainerServer) and len(self.requests(SetContainerServer)) == 1:
            self.happen(request)
        return answer


async def test_a_server_that_is_lost_again_at_once_is_made_again_at_once(fd: int) -> None:
    class LostAgain(Interrupted):
        def happen(self, request: SetContainerServer) -> None:
            self.lose(ContainerServerLost(request.sandbox, request.bus))

    engine = LostAgain(session=FakeDriver())
    await engine.add(make_spec(), [fd])
    async with remaking(engine):
        engine.lose(ContainerServerLost("c0", "session"))
    first, second = engine.requests(SetContainerServer)
    assert engine.instances("c0") == {"session": second.server.instance}
    assert first.server.instance != second.server.instance
    engine.held.close()


async def test_a_server_that_the_gate_refuses_is_ended_and_made_again(
    fd: int, autojump_clock: trio.testing.MockClock
) -> None:
    class Refusing(Interrupted):
        def happen(self, request: SetContainerServer) -> None:
            raise CallRefusedError(DISCONNECTED, "it does not have that any more")

    engine = Refusing(session=FakeDriver())
    await engine.add(make_spec(), [fd])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine._servers.recreate_lost, engine._recreate)
        engine.lose(ContainerServerLost("c0", "session"))
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    first, second = engine.requests(SetContainerServer)
    assert engine.instances("c0") == {"session": second.server.instance}
    assert first.server.instance not in engine.drivers["session"].instances
    engine.held.close()


async def test_a_server_for_a_sandbox_that_has_ended_is_ended(fd: int) -> None:
    class Ending(Interrupted):
        def happen(self, request: SetContainerServer) -> None:
            self.forget(request.sandbox)
            raise CallRefusedError(NOT_CONTAINER, "no sandbox")

    engine = Ending(session=FakeDriver())
    await engine.add(make_spec(), [fd])
    before = set(engine.instances("c0").values())
    async with remaking(engine):
        engine.lose(ContainerServerLost("c0", "session"))
    assert set(engine.drivers["session"].instances) == before
    assert len(engine.requests(SetContainerServer)) == 1
    engine.held.close()


async def test_a_server_that_a_snapshot_has_is_in_use(fd: int) -> None:
    class Asking(Interrupted):
        def happen(self, request: SetContainerServer) -> None:
            assert request.server is not None
            spec = make_spec(container_servers={"session": msgspec.structs.replace(request.server)})
            state = msgspec.structs.replace(make_state(make_record()), spec=spec)
            self.learn(Snapshot(protocol=1, pid=1, buses=(), sandboxes=(state,)))
            raise CallRefusedError(DISCONNECTED, "somebody has that already")

    engine = Asking(session=FakeDriver())
    await engine.add(make_spec(), [fd])
    async with remaking(engine):
        engine.lose(ContainerServerLost("c0", "session"))
    (request,) = engine.requests(SetContainerServer)
    assert engine.instances("c0") == {"session": request.server.instance}
    assert request.server.instance in engine.drivers["session"].instances
    engine.held.close()


async def test_a_bus_that_is_not_there_is_waited_for(
    fd: int, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(session=FakeDriver())
    await engine.add(make_spec(), [fd])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine._servers.recreate_lost, engine._recreate)
        engine.gone = True
        engine.lose(ContainerServerLost("c0", "session"))
        await trio.sleep(30)
        assert engine.requests(SetContainerServer) == []
        engine.gone = False
        await trio.sleep(6)
        assert len(engine.requests(SetContainerServer)) == 1
        nursery.cancel_scope.cancel()
    assert caplog.text.count("c0: its connections to bus session wait: it cannot be reached") == 1
    engine.held.close()


@pytest.mark.parametrize("is_required", [False, True])
async def test_a_server_that_cannot_be_reached_is_done_without(
    fd: int, is_required: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(is_required=is_required, session=FakeDriver())
    await engine.add(make_spec(), [fd])
    driver = engine.drivers["session"] = FakeDriver(mode="unreachable")
    async with remaking(engine):
        engine.lose(ContainerServerLost("c0", "session"))
    assert (driver.made, driver.instances) == (1, {})
    assert "cannot be reached" in caplog.text
    given_up = [StopSandbox("c0")] if is_required else [SetContainerServer("c0", "session", None)]
    assert engine.requests(StopSandbox) + engine.requests(SetContainerServer) == given_up
    engine.held.close()


async def test_a_bus_that_goes_as_it_makes_a_server_is_waited_for(fd: int) -> None:
    class Going(FakeDriver):
        def answer(self, member: str, values: list[object]) -> Result | None:
            result = super().answer(member, values)
            engine.gone = member == "AddServer"
            return result

    engine = Engine(is_required=True, session=FakeDriver())
    await engine.add(make_spec(), [fd])
    engine.drivers["session"] = Going(mode="unreachable")
    async with remaking(engine):
        engine.lose(ContainerServerLost("c0", "session"))
    assert engine.requests(StopSandbox) == engine.requests(SetContainerServer) == []
    engine.held.close()


@pytest.mark.parametrize("is_required", [False, True])
async def test_a_bus_that_comes_back_without_it(
    fd: int, is_required: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(is_required=is_required, session=FakeDriver())
    await engine.add(make_spec(), [fd])
    engine.drivers["session"] = FakeDriver(mode="none")
    async with remaking(engine):
        engine.lose(ContainerServerLost("c0", "session"))
    if is_required:
        assert engine.requests(StopSandbox) == [StopSandbox("c0")]
        assert "ended, because bus session refuses it" in caplog.text
    else:
        assert engine.requests(SetContainerServer) == [SetContainerServer("c0", "session", None)]
    engine.held.close()


@pytest.mark.parametrize("is_required", [False, True])
async def test_a_bus_that_comes_back_and_hangs(
    fd: int, is_required: bool, autojump_clock: trio.testing.MockClock
) -> None:
    engine = Engine(is_required=is_required, session=FakeDriver())
    await engine.add(make_spec(), [fd])
    driver = engine.drivers["session"] = FakeDriver(mode="hangs")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine._servers.recreate_lost, engine._recreate)
        engine.lose(ContainerServerLost("c0", "session"))
        await trio.sleep(60)
        assert engine.requests(StopSandbox) == []
        driver.mode = "good"
        await trio.sleep(300)
        nursery.cancel_scope.cancel()
    # Who must have labels waits; else connections are not to wait.
    assert [one.server is not None for one in engine.requests(SetContainerServer)] == [is_required]
    engine.held.close()


def test_a_bus_that_was_not_there_yet_is_to_label() -> None:
    engine = Engine(session=FakeDriver())
    state = make_state(make_record())
    lost = msgspec.structs.replace(
        state, spec=make_spec(container_servers={"session": ContainerServer()})
    )
    engine.learn(Snapshot(protocol=1, pid=1, buses=(), sandboxes=(lost,)))
    assert engine.name == "containers1"
    assert (engine.serving("session"), engine.serving("other")) == ("containers1", "gate")
    engine.forget("c0")
    assert engine.name == "gate"


def test_who_must_have_labels_is_told_of_sandboxes_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    upstream = ContainerServer(instance="/i", address="unix:path=/i")
    spec = make_spec(0, "session", "other", container_servers={"session": upstream})
    state = msgspec.structs.replace(make_state(make_record()), spec=spec)
    snapshot = Snapshot(protocol=1, pid=1, buses=(), sandboxes=(state,))
    Engine(session=FakeDriver()).learn(snapshot)
    assert caplog.text == ""
    Engine(is_required=True, session=FakeDriver()).learn(snapshot)
    (line,) = caplog.messages
    assert "c0" in line
    assert "not labelled on bus other" in line


async def test_a_new_gate_has_its_servers_made_when_it_has_the_sandbox() -> None:
    engine = Engine(session=FakeDriver())

    class Missing(Told):
        def missing(self) -> list[tuple[SandboxSpec, Sequence[int]]]:
            return [(make_spec(), [3])]

    async with remaking(engine):
        ((spec, fds),) = _ListenerTee(engine, Missing()).missing()
        assert (spec.container_servers, fds) == ({"session": ContainerServer()}, [3])
    assert engine.instances("c0") == {"session": "/org/freedesktop/DBus/Containers1/c100"}
