"""The engine for buses that label, with the gate and the bus in this process."""

import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from broker.bus.values import Variant, pack, unpack
from broker.engines.base import EngineLostError
from broker.engines.containers1 import Containers1Engine, _Ears
from broker.engines.process import GateError
from broker.gate.control import (
    AddSandbox,
    Answer,
    BusSpec,
    Done,
    Ended,
    Listener,
    Request,
    SandboxSpec,
    SetAccess,
    Snapshot,
    StopSandbox,
)
from broker.gate.upstream import CallBus, Called, SetUpstream, Upstream, UpstreamLost
from broker.wire.errors import (
    ACCESS_DENIED,
    DISCONNECTED,
    LIMITS_EXCEEDED,
    NO_REPLY,
    CallRefusedError,
)
from policy.rules import AccessList, Identity
from policy.text import parse_rule
from tests.fake_driver import FakeDriver
from tests.records import make_record, make_state
from tests.test_engine_link import Told

BUSES = tuple(BusSpec(name=name, address="unix:path=/nowhere") for name in ("session", "other"))
NO_FDS: list[int] = []


class Engine(Containers1Engine):
    """With a gate that does what it is asked, and a bus for each name that is in `drivers`."""

    def __init__(self, *, is_required: bool = False, **drivers: FakeDriver) -> None:
        super().__init__(control=Path("/none"), buses=BUSES, is_required=is_required)
        self.drivers = drivers
        self.asked: list[Request] = []
        self.refuse: Exception | None = None
        self.gone = False

    async def _request(self, request: Request, fds: Sequence[int] = ()) -> Answer:
        await trio.lowlevel.checkpoint()
        self.asked.append(request)
        if isinstance(request, CallBus):
            return self._drive(request)
        if self.refuse is not None:
            raise self.refuse
        return Done()

    def _drive(self, request: CallBus) -> Called:
        driver = self.drivers.get(request.bus)
        if self.gone or driver is None:
            raise CallRefusedError(DISCONNECTED, "it cannot be reached")
        result = driver.answer(request.member, unpack(request.signature, request.body))
        if result is None:
            raise CallRefusedError(NO_REPLY, "it did not answer")
        signature, values = result
        return Called(signature=signature, body=pack(signature, values), little=True)

    def requests(self, kind: type[Any]) -> list[Any]:
        return [one for one in self.asked if isinstance(one, kind)]


@pytest.fixture(autouse=True)
def _reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(address: str) -> None:
        if "/nowhere" in address:
            raise CallRefusedError(DISCONNECTED, "cannot be reached")

    monkeypatch.setattr("broker.engines.labels._check_reachable", check)


def make_spec(number: int = 0, *buses: str, **changes: Any) -> SandboxSpec:
    spec = make_state(make_record(number=number)).spec
    listeners = tuple(Listener(bus=bus, fd=0) for bus in buses or ("session",))
    return msgspec.structs.replace(spec, listeners=listeners, **changes)


@pytest.fixture
def fd() -> Any:
    with socket.socket(socket.AF_UNIX) as sock:
        yield sock.fileno()


@asynccontextmanager
async def remaking(engine: Engine) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine._remake_lost)
        yield
        await trio.testing.wait_all_tasks_blocked(0.001)
        nursery.cancel_scope.cancel()


async def test_a_sandbox_gets_a_server_of_the_bus(fd: int) -> None:
    engine = Engine(session=FakeDriver())
    identity = Identity(type="org.example.T", app="a", component="part")
    metadata = pack("a{sv}", [{"k": Variant("s", "v")}])
    await engine.add(make_spec(identity=identity, metadata=metadata), [fd])
    driver = engine.drivers["session"]
    ((path, made),) = driver.instances.items()
    component = {"k": Variant("s", "v"), "org.buswarden.Component": Variant("s", "part")}
    assert made == ("org.example.T", "a", component, {})
    (added,) = engine.requests(AddSandbox)
    assert added.spec.upstreams["session"].instance == path
    assert (engine.name, engine.serving("session"), engine.serving("other")) == (
        "containers1",
        "containers1",
        "gate",
    )
    assert engine.instances("c0") == {"session": path}
    assert engine.instances("c1") == {}
    engine.held.close()


async def test_a_bus_is_asked_once_what_it_has(fd: int) -> None:
    engine = Engine(session=FakeDriver(), other=FakeDriver(mode="none"))
    for number in range(3):
        await engine.add(make_spec(number, "session", "other"), [fd])
    members = [member for member, _ in engine.drivers["session"].asked]
    assert members == ["Introspect", "Get", "AddServer", "AddServer", "AddServer"]
    assert [member for member, _ in engine.drivers["other"].asked] == ["Introspect", "Ping"]
    engine.held.close()


@pytest.mark.parametrize(
    "driver",
    [
        FakeDriver(),
        FakeDriver(add="AddContainerServer", stop="RemoveContainerServer", stop_listening=""),
        FakeDriver(add="AddServer", stop="RemoveContainerServer"),
    ],
    ids=["merged", "proposed", "mixed"],
)
async def test_methods_are_called_by_the_names_that_the_bus_has(
    driver: FakeDriver, fd: int
) -> None:
    engine = Engine(is_required=True, session=driver)
    await engine.add(make_spec(), [fd])
    (added,) = engine.requests(AddSandbox)
    upstream = added.spec.upstreams["session"]
    assert (upstream.stop, upstream.stop_listening) == (driver.stop, driver.stop_listening)
    engine.refuse = CallRefusedError(ACCESS_DENIED, "no")
    with pytest.raises(CallRefusedError, match="no"):
        await engine.add(make_spec(1), [fd])
    assert driver.asked[-1][0] == driver.stop
    assert len(driver.instances) == 1
    engine.held.close()


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("refuse", "not you"),
        ("nonsense", "answered with 's'"),
        ("nonsense-arguments", "SupportedArguments"),
        ("silent", "did not answer"),
        ("unreachable", "cannot be reached"),
        ("another-form", "answered with 'o'"),
    ],
)
async def test_a_bus_that_does_not_work_is_done_without_only_if_nobody_chose_it(
    mode: str, why: str, fd: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(session=FakeDriver(mode=mode))
    with caplog.at_level(logging.WARNING):
        await engine.add(make_spec(), [fd])
    assert "the gate alone serves it on bus session" in caplog.text
    assert why in caplog.text
    assert engine.requests(AddSandbox)[0].spec.upstreams == {}
    assert engine.instances("c0") == {}
    assert engine.drivers["session"].instances == {}
    engine.held.close()
    strict = Engine(is_required=True, session=FakeDriver(mode=mode))
    with pytest.raises(CallRefusedError, match=f"bus session: .*{why}"):
        await strict.add(make_spec(), NO_FDS)
    assert strict.requests(AddSandbox) == []
    assert strict.drivers["session"].instances == {}


async def test_a_bus_that_hangs_keeps_only_one_waiting(fd: int) -> None:
    engine = Engine(session=FakeDriver(mode="silent"))
    for number in range(3):
        await engine.add(make_spec(number), [fd])
    assert [m for m, _ in engine.drivers["session"].asked].count("AddServer") == 1
    engine.held.close()


async def test_limits_of_the_bus_are_the_callers_to_hear_of() -> None:
    engine = Engine(session=FakeDriver(), other=FakeDriver())
    engine.drivers["other"].arguments = ()
    metadata = pack("a{sv}", [{f"k{n}": Variant("s", "") for n in range(4)}])
    with pytest.raises(CallRefusedError, match=r"bus session: too much \(max=3\)") as caught:
        await engine.add(make_spec(0, "session", "other", metadata=metadata), NO_FDS)
    assert caught.value.dbus_name == LIMITS_EXCEEDED
    assert engine.requests(AddSandbox) == []


async def test_what_one_bus_made_is_undone_if_the_other_refuses() -> None:
    engine = Engine(is_required=True, session=FakeDriver(), other=FakeDriver(mode="refuse"))
    with pytest.raises(CallRefusedError, match="bus other: not you"):
        await engine.add(make_spec(0, "session", "other"), NO_FDS)
    assert engine.drivers["session"].made == 1
    assert engine.drivers["session"].instances == {}
    assert engine.instances("c0") == {}


async def test_who_asks_for_this_engine_gets_no_other() -> None:
    engine = Engine(is_required=True, session=FakeDriver(), other=FakeDriver(mode="none"))
    with pytest.raises(GateError, match="bus other has no org"):
        await engine._look_at_buses()
    with pytest.raises(CallRefusedError, match="bus other has no"):
        await engine.add(make_spec(0, "other"), NO_FDS)
    strict = Engine(is_required=True, session=FakeDriver(mode="nonsense-arguments"))
    with pytest.raises(GateError, match="bus session cannot label its connections"):
        await strict._look_at_buses()


async def test_two_buses_of_which_one_has_it(fd: int, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(session=FakeDriver(), other=FakeDriver(mode="none"))
    await engine._look_at_buses()
    await engine.add(make_spec(0, "session", "other"), [fd])
    assert set(engine.instances("c0")) == {"session"}
    assert caplog.text == ""
    engine.held.close()


RULES = AccessList(
    rules=(
        parse_rule("send:org.a", deny=False, origin=""),
        parse_rule("send:org.b@/x/*", deny=False, origin=""),
        parse_rule("send:org.c@/x/*", deny=True, origin=""),
    ),
    receive_from_host=True,
)
SAID = [
    (0x22, "org.a", "/", ""),
    (0x22, "org.b", "/", ""),
    (0x124, "", "/", ""),
]


async def test_a_bus_that_takes_rules_gets_those_that_it_can_have(fd: int) -> None:
    engine = Engine(session=FakeDriver(arguments=("Allow",), set_access="SetContainerAccess"))
    driver = engine.drivers["session"]
    await engine.add(make_spec(access=RULES), [fd])
    ((path, (*_, named)),) = driver.instances.items()
    assert named == {"Allow": Variant("a(usos)", SAID)}
    await engine.set_access("c0", AccessList(rules=RULES.rules[:1], receive_from_host=False))
    assert driver.asked[-1] == ("SetContainerAccess", [path, SAID[:1]])
    kinds = [type(one) for one in engine.asked[-2:]]
    assert kinds == [SetAccess, CallBus]
    engine.held.close()


async def test_a_bus_that_cannot_change_its_rules_is_complained_of(
    fd: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(session=FakeDriver(arguments=("Allow",)))
    await engine.add(make_spec(), [fd])
    await engine.set_access("c0", RULES)
    assert "bus session keeps the rules that it was given" in caplog.text
    assert len(engine.requests(SetAccess)) == 1
    engine.held.close()


async def test_stop_waits_for_the_bus(fd: int) -> None:
    engine = Engine(session=FakeDriver())
    await engine.add(make_spec(), [fd])
    await engine.stop("c0")
    assert isinstance(engine.asked[-2], StopSandbox)
    assert engine.drivers["session"].asked[-1][0] == "Ping"
    engine.held.close()


def test_the_snapshot_brings_back_what_belongs_together() -> None:
    engine, told = Engine(session=FakeDriver()), Told()
    upstream = Upstream(instance="/i", address="unix:path=/i")
    state = msgspec.structs.replace(
        make_state(make_record()), spec=make_spec(upstreams={"session": upstream})
    )
    snapshot = Snapshot(protocol=1, pid=1, buses=(), sandboxes=(state,))
    ears = _Ears(engine, told)
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
        _Ears(engine, told).take_event(UpstreamLost("c0", "session"))
        assert engine.instances("c0") == {}
    (request,) = engine.requests(SetUpstream)
    assert request.upstream.instance == engine.instances("c0")["session"]
    assert engine.instances("c0") != before
    assert told.order == []
    engine.held.close()


async def test_a_bus_that_is_not_there_is_waited_for(
    fd: int, autojump_clock: trio.testing.MockClock
) -> None:
    engine = Engine(session=FakeDriver())
    await engine.add(make_spec(), [fd])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine._remake_lost)
        engine.gone = True
        engine.lose(UpstreamLost("c0", "session"))
        await trio.sleep(30)
        assert engine.requests(SetUpstream) == []
        engine.gone = False
        await trio.sleep(6)
        assert len(engine.requests(SetUpstream)) == 1
        nursery.cancel_scope.cancel()
    engine.held.close()


@pytest.mark.parametrize("is_required", [False, True])
async def test_a_bus_that_comes_back_without_it(
    fd: int, is_required: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(is_required=is_required, session=FakeDriver())
    await engine.add(make_spec(), [fd])
    engine.drivers["session"] = FakeDriver(mode="none")
    async with remaking(engine):
        engine.lose(UpstreamLost("c0", "session"))
    if is_required:
        assert engine.requests(StopSandbox) == [StopSandbox("c0")]
        assert "does not take it again" in caplog.text
    else:
        assert engine.requests(SetUpstream) == [SetUpstream("c0", "session", None)]
    engine.held.close()


async def test_a_new_gate_has_its_servers_made_when_it_has_the_sandbox() -> None:
    engine = Engine(session=FakeDriver())

    class Missing(Told):
        def missing(self) -> list[tuple[SandboxSpec, Sequence[int]]]:
            return [(make_spec(), [3])]

    async with remaking(engine):
        ((spec, fds),) = _Ears(engine, Missing()).missing()
        assert (spec.upstreams, fds) == ({"session": Upstream()}, [3])
    assert engine.instances("c0") == {"session": "/org/freedesktop/DBus/Containers1/c100"}


async def test_a_gate_that_says_something_else() -> None:
    class Odd(Engine):
        async def _request(self, request: Request, fds: Sequence[int] = ()) -> Answer:
            await trio.lowlevel.checkpoint()
            return Done()

    with pytest.raises(EngineLostError, match="CallBus"):
        await Odd(session=FakeDriver()).add(make_spec(), NO_FDS)
