"""Whether somebody listens where a bus says, and when a bus that failed is asked again; the rest is tested with the engine."""

import itertools
import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from broker.control_protocol.messages import AddSandbox
from broker.engines.containers1_client import FIRST_PAUSE, LONGEST_PAUSE, _check_reachable
from broker.wire.errors import NO_REPLY, CallRefusedError
from tests.helpers.fake_driver import FakeDriver
from tests.helpers.labels_stage import NO_FDS, Engine, fd, make_spec, reachable

__all__ = ["fd", "reachable"]


def test_a_socket_that_somebody_listens_on(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen(0)
        for _ in range(3):  # a backlog that is full is no reason
            _check_reachable(f"unix:path={tmp_path}/s")


@pytest.mark.parametrize("address", ["unix:path=/nowhere", "tcp:host=x", "", "nonsense"])
def test_an_address_that_leads_nowhere(address: str) -> None:
    with pytest.raises(CallRefusedError):
        _check_reachable(address)


def calls(driver: FakeDriver, member: str) -> int:
    return [one for one, _ in driver.asked].count(member)


@pytest.mark.parametrize("is_required", [False, True])
@pytest.mark.parametrize("mode", ["hangs", "silent", "nonsense-arguments"])
async def test_a_bus_that_failed_once_is_asked_again(
    mode: str,
    is_required: bool,
    fd: int,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = FakeDriver(mode=mode)
    engine = Engine(is_required=is_required, session=driver)

    async def add(number: int) -> str:
        try:
            await engine.add(make_spec(number), [fd])
        except CallRefusedError as exc:
            assert is_required
            return str(exc)
        return str(caplog.messages[-1]) if caplog.messages else ""

    before = await add(0)
    driver.mode = "good"
    asked = len(driver.asked)
    assert (await add(1)).partition("bus")[2] == before.partition("bus")[2]
    assert "Arguments" in before or "did not answer" in before
    assert len(driver.asked) == asked
    assert engine.serving("session") == "gate"
    await trio.sleep(FIRST_PAUSE + 1)
    caplog.clear()
    assert await add(2) == ""
    assert set(engine.instances("c2")) == {"session"}
    assert engine.serving("session") == "containers1"
    engine.held.close()


async def test_a_bus_that_goes_on_failing_is_asked_less_and_less(
    autojump_clock: trio.testing.MockClock,
) -> None:
    driver = FakeDriver(mode="silent")
    engine = Engine(is_required=True, session=driver)
    times = []
    while trio.current_time() < 5 * LONGEST_PAUSE:
        before = calls(driver, "AddServer")
        with pytest.raises(CallRefusedError) as caught:
            await engine.add(make_spec(), NO_FDS)
        assert caught.value.dbus_name == NO_REPLY
        if calls(driver, "AddServer") > before:
            times.append(trio.current_time())
        await trio.sleep(1)
    gaps = [round(b - a) for a, b in itertools.pairwise(times)]
    assert gaps == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    assert calls(driver, "Introspect") == 1


async def test_many_that_wait_at_once_are_one_failure(
    autojump_clock: trio.testing.MockClock,
) -> None:
    engine = Engine(session=FakeDriver(mode="silent"))

    async def make(number: int) -> None:
        with pytest.raises(CallRefusedError):
            await engine._client.add_server(make_spec(number), "session")

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(make, number)
    assert calls(engine.drivers["session"], "AddServer") > 1
    await trio.sleep(FIRST_PAUSE + 1)
    assert not engine._client._known["session", make_spec().uid].is_pausing


@pytest.mark.parametrize("mode", ["none", "silent"])
async def test_a_bus_that_started_anew_is_asked_at_once(mode: str, fd: int) -> None:
    engine = Engine(session=FakeDriver(mode=mode))
    await engine.add(make_spec(), [fd])
    engine.drivers["session"] = FakeDriver()
    engine.bus_restarted("other")
    await engine.add(make_spec(1), [fd])
    assert engine.requests(AddSandbox)[-1].spec.container_servers == {}
    engine.bus_restarted("session")
    await engine.add(make_spec(2), [fd])
    assert set(engine.instances("c2")) == {"session"}
    engine.held.close()
