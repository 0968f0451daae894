import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from broker.control_protocol.messages import Denied, Listener, SandboxSpec, Usage
from broker.supervisor.config import ConfiguredLimits
from broker.supervisor.sandboxes.registry import BUILT_IN
from broker.supervisor.sandboxes.rule_limits import MAX_RULES, WHAT_TO_DO
from broker.supervisor.sandboxes.specs import AddRequest, Behind, Caller
from broker.supervisor.storage.recovery import open_state
from broker.supervisor.storage.state_file import StateFile
from broker.supervisor.supervisor import Environment, Supervisor
from broker.wire.errors import ACCESS_DENIED, LIMITS_EXCEEDED, NOT_CONTAINER, CallRefusedError
from policy.rules import NO_ACCESS, Access, AccessList, Rule
from policy.wall import WALL
from tests.helpers.fakes import FakeAnnouncer, FakeEngine, FakeWatch, lost
from tests.helpers.records import EMPTY_DICT, make_record, make_snapshot, make_state

ME = os.geteuid()
CALLER = Caller(bus="session", unique_name=":1.1", uid=ME, credentials=EMPTY_DICT)
STRANGER = Caller(bus="session", unique_name=":1.2", uid=ME + 1)
ROOT = Caller(bus="session", unique_name=":1.3", uid=0)
SEND_X = Rule(access=frozenset({Access.SEND}), name="org.example.X", origin="a")
SEND_Y = Rule(access=frozenset({Access.SEND}), name="org.example.Y", origin="a")


class World:
    """A supervisor in a folder, with fakes around it."""

    def __init__(self, folder: Path, state: StateFile) -> None:
        self.folder = folder
        self.state = state
        self.engine = FakeEngine()
        self.announcer = FakeAnnouncer()
        self.watches = {"session": FakeWatch([":1.1"]), "system": FakeWatch()}
        self.supervisor = self.restart()

    def restart(self, **limits: int) -> Supervisor:
        outside = Environment(
            engine=self.engine,
            state=self.state,
            announcer=self.announcer,
            name_watches=self.watches,
            folder=self.folder,
            now=lambda: 12.5,
        )
        self.supervisor = Supervisor(outside, ConfiguredLimits(**limits))
        self.engine.listener = self.supervisor
        return self.supervisor

    async def add(self, **fields: Any) -> str:
        record = await self.supervisor.add(request(**fields), CALLER)
        self.supervisor.announce(record)
        return record.id

    async def do_jobs(self) -> None:
        """Do what is to be done, until nothing is left."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.supervisor.run_jobs)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    def stored(self) -> list[str]:
        return [record.id for record in self.state.load()[0]]

    def files(self) -> list[Path]:
        return list(self.folder.glob("dbus-*"))


def request(**fields: Any) -> AddRequest:
    defaults: dict[str, Any] = {
        "type": "org.example.Type",
        "app": "app",
        "metadata": EMPTY_DICT,
        "buses": ("session",),
        "access": NO_ACCESS,
    }
    return AddRequest(**{**defaults, **fields})


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    folder = tmp_path / "containers"
    folder.mkdir()
    with open_state(tmp_path / "state.db") as state:
        yield World(folder, state)


async def test_a_sandbox_is_served_and_stored_before_the_answer(world: World) -> None:
    record = await world.supervisor.add(request(component="part", plugs=("p",)), CALLER)
    spec = world.engine.specs["c0"]
    assert spec.identity == record.identity
    assert spec.uid == ME
    (listener,) = spec.listeners
    info = os.stat(record.sockets["session"])  # noqa: PTH116 - the path is a string on the wire
    assert stat.S_ISSOCK(info.st_mode)
    assert listener == Listener(
        bus="session",
        fd=0,
        path=record.sockets["session"],
        device=info.st_dev,
        inode=info.st_ino,
        guid=record.addresses["session"].rpartition("=")[2],
    )
    ((stored,), next_number) = world.state.load()
    assert stored == record
    assert (next_number, stored.created, stored.plugs) == (1, 12.5, ("p",))


async def test_what_is_built_in_is_in_force_but_not_in_the_list(world: World) -> None:
    id_ = await world.add()
    assert world.engine.access[id_].rules == BUILT_IN
    assert world.supervisor.registry.find(id_).record.access == NO_ACCESS
    id_ = await world.add(portals_as_host=True)
    assert world.engine.access[id_].rules == WALL


async def test_descriptors_are_lent_and_never_kept(world: World) -> None:
    read, write = os.pipe()
    ready, ready_there = os.pipe()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted, not read
    id_ = await world.add(buses=("session", "system"), close_notify=read, ready_notify=ready_there)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert world.engine.done[-1] == ("add", "c0", "3")
    assert world.engine.specs[id_].close_notify == 2
    assert os.read(ready, 9) == b"\0"
    assert not world.supervisor.registry.find(id_).record.keep_after_creator
    for fd in (read, write, ready, ready_there):
        os.close(fd)


async def test_what_is_changed_while_it_is_added_is_stored(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = world.engine.add

    async def add_and_change(spec: SandboxSpec, fds: Sequence[int]) -> None:
        await add(spec, fds)
        await world.supervisor.set_access(CALLER, spec.id, [SEND_X])
        if spec.identity.app == "refused":
            raise CallRefusedError(LIMITS_EXCEEDED, "no")

    monkeypatch.setattr(world.engine, "add", add_and_change)
    id_ = await world.add()
    ((stored,), _) = world.state.load()
    assert stored.access.rules == (SEND_X,)
    assert stored == world.supervisor.registry.find(id_).record
    with pytest.raises(CallRefusedError, match="no"):
        await world.add(app="refused")
    assert world.stored() == [id_]


async def test_ready_is_not_told_if_it_failed(world: World) -> None:
    ready, ready_there = os.pipe()
    world.engine.refuse = lost()
    with pytest.raises(type(lost())):
        await world.add(ready_notify=ready_there)
    os.close(ready_there)
    assert os.read(ready, 9) == b""
    os.close(ready)


async def test_what_the_gate_refuses_leaves_nothing(world: World) -> None:
    world.engine.refuse = CallRefusedError(LIMITS_EXCEEDED, "no")
    with pytest.raises(CallRefusedError, match="no"):
        await world.add()
    assert not any((world.stored(), world.files()))
    assert await world.add() == "c1"  # c0 was in use for a moment


async def test_what_may_have_reached_a_gate_that_went_away_is_stopped(world: World) -> None:
    world.engine.refuse = lost()
    with pytest.raises(type(lost())):
        await world.add()
    await world.do_jobs()  # it is not there, which is fine
    assert ("stop", "c0") not in world.engine.done
    assert world.announcer.ended == []


async def test_limits_are_checked_before_anything_is_made(world: World) -> None:
    world.restart(max_containers_per_user=0)
    with pytest.raises(CallRefusedError, match="max_containers_per_user"):
        await world.add()
    many = AccessList(rules=(SEND_X,) * (MAX_RULES + 1))
    with pytest.raises(CallRefusedError, match="max_rules="):
        await world.add(access=many)
    long = [Rule(access=SEND_X.access, path=f"/{n}/{'x' * 10_000}") for n in range(1000)]
    with pytest.raises(CallRefusedError, match="max_rules_bytes=8388608 would be exceeded"):
        await world.add(access=AccessList(rules=tuple(long)))
    assert world.engine.done == []


# -- rules ----------------------------------------------------------------------------------------


async def test_rules_are_in_force_and_stored_when_it_returns(world: World) -> None:
    id_ = await world.add(access=AccessList(receive_from_host=False))
    access = await world.supervisor.set_access(CALLER, id_, [SEND_X])
    assert access.rules == (SEND_X,)
    assert not access.receive_from_host
    assert world.engine.access[id_].rules[0] == SEND_X
    assert world.state.load()[0][0].access == access


async def test_rules_are_replaced_or_added(world: World) -> None:
    id_ = await world.add(access=AccessList(rules=(SEND_X,)))
    again = msgspec.structs.replace(SEND_X, origin="b")
    access = await world.supervisor.set_access(CALLER, id_, [again, SEND_Y], replace=False)
    assert access.rules == (again, SEND_Y)
    access = await world.supervisor.set_access(CALLER, id_, [SEND_Y])
    assert access.rules == (SEND_Y,)


async def test_rules_the_gate_refuses_change_nothing(world: World) -> None:
    id_ = await world.add(access=AccessList(rules=(SEND_X,)))
    world.engine.refuse = CallRefusedError(LIMITS_EXCEEDED, "no")
    with pytest.raises(CallRefusedError):
        await world.supervisor.set_access(CALLER, id_, [SEND_Y])
    assert world.supervisor.registry.find(id_).record.access.rules == (SEND_X,)
    with pytest.raises(CallRefusedError, match="max_rules"):
        await world.supervisor.set_access(
            CALLER, id_, [Rule(access=SEND_X.access, name=f"a.b{n}") for n in range(MAX_RULES + 1)]
        )


async def test_a_sandbox_that_ends_while_its_rules_change_is_none(world: World) -> None:
    id_ = await world.add()
    world.engine.before_answer = trio.Event()

    async def change() -> None:
        with pytest.raises(CallRefusedError) as caught:
            await world.supervisor.set_access(CALLER, id_, [SEND_X])
        assert caught.value.dbus_name == NOT_CONTAINER

    async with trio.open_nursery() as nursery:
        nursery.start_soon(change)
        await trio.testing.wait_all_tasks_blocked()
        world.engine.end(id_, "stopped")
        world.engine.before_answer.set()
    assert world.stored() == []


async def test_only_the_creators_user_and_root_may_change_it(world: World) -> None:
    id_ = await world.add()
    for change in (
        world.supervisor.stop(STRANGER, id_),
        world.supervisor.stop_listening(STRANGER, id_),
        world.supervisor.set_access(STRANGER, id_, []),
    ):
        with pytest.raises(CallRefusedError) as caught:
            await change
        assert caught.value.dbus_name == ACCESS_DENIED
    await world.supervisor.stop(ROOT, id_)


# -- ends -----------------------------------------------------------------------------------------


async def test_stopping_is_told_before_it_returns(world: World) -> None:
    id_ = await world.add()
    await world.supervisor.stop(CALLER, id_)
    assert world.announcer.ended == [id_]
    assert world.stored() == []
    with pytest.raises(CallRefusedError):
        await world.supervisor.stop(CALLER, id_)


async def test_a_sandbox_that_stops_listening_lives_on_with_its_connections(world: World) -> None:
    id_ = await world.add()
    world.engine.connect(id_, ":1.7")
    await world.supervisor.stop_listening(CALLER, id_)
    assert not world.supervisor.registry.find(id_).record.listening
    assert not world.state.load()[0][0].listening
    other = await world.add()
    await world.supervisor.stop_listening(CALLER, other)
    assert world.announcer.ended == [other]


async def test_it_stops_listening_when_its_creator_leaves(world: World) -> None:
    id_ = await world.add()
    kept = await world.add(keep_after_creator=True)
    assert world.watches["session"].names == [":1.1", ":1.1"]
    world.supervisor.name_gone("session", ":1.1")
    await world.do_jobs()
    assert world.announcer.ended == [id_]
    assert world.stored() == [kept]


async def test_a_creator_that_leaves_meanwhile_is_noticed(world: World) -> None:
    record = await world.supervisor.add(request(), CALLER)
    world.watches["session"].names.clear()
    world.supervisor.announce(record)
    await world.do_jobs()
    assert world.announcer.ended == [record.id]


async def test_an_end_before_the_answer_is_told_after_it(world: World) -> None:
    record = await world.supervisor.add(request(), CALLER)
    world.engine.end(record.id, "close-notify")
    assert world.announcer.ended == []
    world.supervisor.announce(record)
    assert world.announcer.ended == [record.id]
    assert world.stored() == []


async def test_whose_end_is_watched_for_is_forgotten_with_the_sandbox(world: World) -> None:
    id_ = await world.add()
    await world.supervisor.stop(CALLER, id_)
    assert world.watches["session"].names == [":1.1"]


# -- questions --------------------------------------------------------------------------------------


async def test_who_is_what_the_gate_says(world: World) -> None:
    id_ = await world.add()
    world.engine.connect(id_, ":1.7")
    behind = await world.supervisor.who("session", ":1.7")
    assert behind.sandbox is not None
    assert behind.sandbox.record.id == id_
    assert behind.is_there
    assert list(behind.sandbox.connections) == [("session", ":1.7")]
    host = await world.supervisor.who("session", ":1.8")
    assert host == Behind(is_inside=False, sandbox=None, is_there=False)
    assert await world.supervisor.is_inside("session", ":1.7")
    world.engine.connections["session", ":1.9"] = "c99"  # a stranger's, about to be stopped
    lost = Behind(is_inside=True, sandbox=None, is_there=False)
    assert await world.supervisor.who("session", ":1.9") == lost
    world.engine.connections["session", ":1.9"] = ""  # of a gate that died
    assert await world.supervisor.who("session", ":1.9") == lost


async def test_refusals_are_kept_and_told(world: World) -> None:
    id_ = await world.add()
    event = Denied(sandbox=id_, bus="session", direction="send", kind="call", peer="org.example.X")
    world.supervisor.take_event(event)
    world.supervisor.take_event(msgspec.structs.replace(event, sandbox="c99"))
    assert world.announcer.refused == [event]
    assert list(world.supervisor.registry.find(id_).denials) == [event]


async def test_header_wishes_are_passed_on_and_repeated_to_a_new_gate(world: World) -> None:
    await world.supervisor.request_instance_field(CALLER)
    await world.supervisor.request_instance_field(CALLER)
    world.supervisor.take_snapshot(make_snapshot())
    await world.do_jobs()
    assert world.engine.done.count(("request_instance_field", "session", ":1.1")) == 3
    world.supervisor.name_gone("session", ":1.1")
    world.supervisor.take_snapshot(make_snapshot())
    await world.do_jobs()
    assert world.engine.done.count(("request_instance_field", "session", ":1.1")) == 3


# -- restarts ---------------------------------------------------------------------------------------


async def test_a_new_supervisor_finds_everything(world: World) -> None:
    id_ = await world.add(access=AccessList(rules=(SEND_X,)))
    supervisor = world.restart()
    state = make_state(supervisor.registry.find(id_).record, connections=(("session", ":1.7"),))
    supervisor.take_snapshot(make_snapshot(state))
    await world.do_jobs()
    assert world.announcer.ended == []
    assert world.engine.done == [("add", id_, "1")]
    assert len(world.files()) == 1
    supervisor.name_gone("session", ":1.1")
    await world.do_jobs()
    assert ("stop_listening", id_) in world.engine.done


async def test_a_gate_that_was_lost_ends_its_sandboxes_and_their_sockets(world: World) -> None:
    id_ = await world.add()
    (world.folder / "dbus-older").touch()
    world.supervisor.take_snapshot(make_snapshot())
    assert world.announcer.ended == [id_]
    assert not any((world.stored(), world.files()))


async def test_attack_c4_rules_over_a_limit_that_was_lowered_stay_and_are_told(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    id_ = await world.add(access=AccessList(rules=(SEND_X,)))
    supervisor = world.restart()
    state = make_state(supervisor.registry.find(id_).record)
    most = ConfiguredLimits().rule_steps
    lines: list[str] = []
    for steps, told in ((most, 0), (most + 1, 1)):
        caplog.clear()
        slow = msgspec.structs.replace(state, usage=Usage(rule_steps=steps))
        supervisor.take_snapshot(make_snapshot(slow))
        await world.do_jobs()
        lines = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
        assert len(lines) == told
    assert lines[0].startswith(f"{id_}: a message takes {most + 1} steps, over rule_steps={most}")
    assert lines[0].endswith(WHAT_TO_DO)
    assert world.announcer.ended == []
    assert SEND_X in world.engine.access[id_].rules


async def test_attack_c4_rules_that_the_gate_does_not_take_again_are_told(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    id_ = await world.add()
    ours = make_state(make_record(0, portals_as_host=True))
    world.supervisor.take_snapshot(make_snapshot(ours))
    world.engine.refuse = CallRefusedError(LIMITS_EXCEEDED, "rule_steps=9 would be exceeded")
    await world.do_jobs()
    (line,) = [one.getMessage() for one in caplog.records if one.levelname == "ERROR"]
    assert line.startswith(f"{id_}: the gate keeps the old rules: rule_steps=9 would be")
    assert line.endswith(WHAT_TO_DO)
    assert id_ in world.stored()


async def test_strangers_are_stopped_and_other_rules_set_again(world: World) -> None:
    id_ = await world.add()
    stranger = make_record(9)
    world.state.set_pending_recovery(None)
    world.supervisor.registry.next_number = 10  # it was given once
    world.engine.specs["c9"] = make_state(stranger).spec
    ours = make_state(make_record(0, portals_as_host=True), listening=False)
    world.supervisor.take_snapshot(make_snapshot(ours, make_state(stranger)))
    world.engine.access.clear()
    await world.do_jobs()
    assert ("stop", "c9") in world.engine.done
    record = world.supervisor.registry.find(id_).record
    assert world.engine.access[id_] == record.access_in_force
    ((stored,), next_number) = world.state.load()
    assert not stored.listening
    assert next_number == 10  # nobody gets a stranger's, not even from another supervisor
