"""Servers that are lost are seen to once each, whatever is said meanwhile."""

import msgspec
import trio
import trio.testing

from broker.control_protocol.messages import ContainerServer, SandboxSpec
from broker.engines.lost_servers import LOST, MAX_RECREATING, ContainerServerTable
from policy.rules import AccessList
from tests.helpers.records import make_record, make_state

SERVER = ContainerServer(instance="/i", address="unix:path=/i")


def make_spec(number: int = 0, **upstreams: ContainerServer) -> SandboxSpec:
    spec = make_state(make_record(number=number)).spec
    return msgspec.structs.replace(spec, container_servers=upstreams)


def test_a_sandbox_without_servers_is_not_known() -> None:
    upkeep = ContainerServerTable()
    upkeep.keep(make_spec())
    upkeep.change("c0", "session", SERVER)
    assert list(upkeep) == []
    assert upkeep.change_access("c0", AccessList()) is None
    assert not upkeep.is_lost("c0", "session")


def test_a_server_of_a_sandbox_that_listens_no_more_can_be_lost() -> None:
    upkeep = ContainerServerTable()
    upkeep.keep(make_spec(session=ContainerServer(stop_listening="")))
    assert upkeep.is_lost("c0", "session")


async def test_what_is_lost_again_meanwhile_is_seen_to_once() -> None:
    upkeep, seen = ContainerServerTable(), []

    async def mend(spec: SandboxSpec, bus: str) -> None:
        seen.append((spec.id, bus))
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep.recreate_lost, mend)
        upkeep.keep(make_spec(session=LOST, other=SERVER))
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()
            upkeep.change("c0", "session", LOST)
        upkeep.change("c0", "other", LOST)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == [("c0", "session"), ("c0", "other")]
        nursery.cancel_scope.cancel()


async def test_what_was_seen_to_can_be_lost_again() -> None:
    upkeep, seen = ContainerServerTable(), []

    async def mend(spec: SandboxSpec, bus: str) -> None:
        await trio.lowlevel.checkpoint()
        seen.append(spec.id)
        upkeep.change(spec.id, bus, SERVER)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep.recreate_lost, mend)
        upkeep.keep(make_spec(session=SERVER))
        for _ in range(3):
            upkeep.change("c0", "session", LOST)
            await trio.testing.wait_all_tasks_blocked()
        assert seen == ["c0"] * 3
        nursery.cancel_scope.cancel()


async def test_one_bus_does_not_keep_another_waiting() -> None:
    upkeep, seen = ContainerServerTable(), []

    async def mend(_spec: SandboxSpec, bus: str) -> None:
        seen.append(bus)
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep.recreate_lost, mend)
        for number in range(MAX_RECREATING + 2):
            upkeep.keep(make_spec(number, session=LOST))
        upkeep.keep(make_spec(number, other=LOST))
        await trio.testing.wait_all_tasks_blocked()
        assert (seen.count("session"), seen.count("other")) == (MAX_RECREATING, 1)
        nursery.cancel_scope.cancel()
