"""The engine for buses that label: what it asks of them for a new sandbox, and while there is one."""

import logging
from collections.abc import Sequence

import msgspec
import pytest
import trio

from broker.bus.values import Variant, pack
from broker.control_protocol.messages import (
    AddSandbox,
    Answer,
    CallBus,
    ContainerServer,
    Done,
    Request,
    SetAccess,
    Snapshot,
    StopSandbox,
)
from broker.engines.base import EngineLostError
from broker.engines.gate_process import GateError
from broker.wire.errors import (
    ACCESS_DENIED,
    LIMITS_EXCEEDED,
    CallRefusedError,
)
from policy.rules import AccessList, Identity
from policy.text import parse_rule
from tests.helpers.fake_driver import FakeDriver
from tests.helpers.labels_stage import NO_FDS, Engine, fd, make_spec, reachable
from tests.helpers.records import make_record, make_state

__all__ = ["fd", "reachable"]


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
    assert added.spec.container_servers["session"].instance == path
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
    upstream = added.spec.container_servers["session"]
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
    assert engine.requests(AddSandbox)[0].spec.container_servers == {}
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
        await engine._ask_buses()
    with pytest.raises(CallRefusedError, match="bus other has no"):
        await engine.add(make_spec(0, "other"), NO_FDS)
    strict = Engine(is_required=True, session=FakeDriver(mode="nonsense-arguments"))
    with pytest.raises(GateError, match="bus session cannot label its connections"):
        await strict._ask_buses()


async def test_two_buses_of_which_one_has_it(fd: int, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(session=FakeDriver(), other=FakeDriver(mode="none"))
    await engine._ask_buses()
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
    (0x24, "", "/", ""),
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


async def test_a_bus_that_cannot_change_its_rules_gets_none(fd: int) -> None:
    engine = Engine(session=FakeDriver(arguments=("Allow",)))
    await engine.add(make_spec(access=RULES), [fd])
    ((*_, named),) = engine.drivers["session"].instances.values()
    assert named == {}
    await engine.set_access("c0", AccessList())
    assert engine.drivers["session"].asked[-1][0] == "AddServer"
    assert isinstance(engine.asked[-1], SetAccess)
    engine.held.close()


async def test_a_supervisor_that_is_new_tells_a_bus_of_rules_for_any_user() -> None:
    driver = FakeDriver(arguments=("Allow",), set_access="SetContainerAccess")
    engine = Engine(session=driver)
    upstream = ContainerServer(instance="/i", address="unix:path=/i")
    spec = make_spec(uid=4711, container_servers={"session": upstream})
    state = msgspec.structs.replace(make_state(make_record()), spec=spec)
    engine.learn(Snapshot(protocol=1, pid=1, buses=(), sandboxes=(state,)))
    await engine.set_access("c0", RULES)
    assert driver.asked[-1] == ("SetContainerAccess", ["/i", SAID])
    assert engine.requests(CallBus)[-1].uid == 4711


@pytest.mark.parametrize("mode", ["hangs", "nonsense-arguments"])
async def test_a_bus_that_cannot_be_told_is_complained_of(
    mode: str, fd: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(session=FakeDriver(arguments=("Allow",), set_access="SetContainerAccess"))
    await engine.add(make_spec(), [fd])
    engine.drivers["session"].mode = mode
    engine.bus_restarted("session")
    await engine.set_access("c0", RULES)
    assert "c0: bus session keeps the old rules" in caplog.text
    assert len(engine.requests(SetAccess)) == 1
    engine.held.close()


async def test_stop_waits_for_the_bus(fd: int) -> None:
    engine = Engine(session=FakeDriver())
    await engine.add(make_spec(), [fd])
    await engine.stop("c0")
    assert isinstance(engine.asked[-2], StopSandbox)
    assert engine.drivers["session"].asked[-1][0] == "Ping"
    engine.held.close()


async def test_a_gate_that_says_something_else() -> None:
    class Odd(Engine):
        async def _request(self, request: Request, fds: Sequence[int] = ()) -> Answer:
            await trio.lowlevel.checkpoint()
            return Done()

    with pytest.raises(EngineLostError, match="CallBus"):
        await Odd(session=FakeDriver()).add(make_spec(), NO_FDS)
