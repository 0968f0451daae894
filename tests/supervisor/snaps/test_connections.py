"""Snaps and connections in the supervisor: what is enforced, stored, undone and remembered."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from broker.engines.base import EngineLostError
from broker.supervisor.sandboxes.registry import BUILT_IN
from broker.supervisor.sandboxes.rule_limits import MAX_RULES
from broker.supervisor.snaps import catalogue as snaps_module
from broker.supervisor.storage.state_file import StateFile
from broker.wire.errors import (
    ACCESS_DENIED,
    LIMITS_EXCEEDED,
    NOT_CONTAINER,
    CallRefusedError,
)
from policy.rules import AccessList
from policy.text import parse_rule
from tests.helpers.fakes import lost
from tests.helpers.records import make_snapshot, make_state
from tests.helpers.snapstage import CALLER, ME, OTHER, PAIR, PLAYER, REMOTE, Stage, open_stage


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Stage]:
    with open_stage(tmp_path) as stage:
        yield stage


@pytest.fixture
async def stage(empty: Stage) -> Stage:
    await empty.load(PLAYER, REMOTE, OTHER)
    return empty


async def test_a_snaps_app_has_its_compiled_rules_and_what_was_given(stage: Stage) -> None:
    given = parse_rule("send:org.example.Mine")
    id_ = await stage.add(access=AccessList(rules=(given,)))
    access = stage.engine.access[id_]
    compiled = stage.supervisor.snaps.ready().access("snap.remote.remote")
    assert compiled.rules
    assert access.rules == (given, *compiled.rules, *BUILT_IN)
    assert not access.receive_from_host
    assert stage.supervisor.registry.find(id_).record.access.rules == (given,)
    # A change of what was given leaves the others.
    await stage.supervisor.set_access(CALLER, id_, ())
    assert stage.engine.access[id_].rules == (*compiled.rules, *BUILT_IN)


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "org.example.Other"},
        {"component": "no-such-app"},
        {"app": "nobody"},
        {"app": "remote.x"},
    ],
)
async def test_others_have_what_they_were_given_alone(stage: Stage, fields: dict[str, str]) -> None:
    id_ = await stage.add(**fields)
    assert stage.engine.access[id_].rules == BUILT_IN
    assert stage.engine.access[id_].receive_from_host


async def test_a_connection_reaches_only_the_sandboxes_concerned(stage: Stage) -> None:
    ids = {name: await stage.add(name) for name in ("player", "remote", "other")}
    second = await stage.add("remote")
    changes = await stage.policy.connect(ME, *PAIR)
    assert [change.tag for change in changes] == [
        "snap.player.player",
        "snap.player.second",
        "snap.remote.remote",
    ]
    assert stage.changed() == [ids["player"], ids["remote"], second]
    assert stage.has(second)
    assert not stage.has(ids["other"])
    assert await stage.policy.connect(ME, *PAIR) == ()
    assert stage.changed() == []
    await stage.policy.disconnect(ME, *PAIR)
    assert stage.changed() == [ids["player"], ids["remote"], second]
    assert not stage.has(second)


async def test_connections_survive_a_restart(stage: Stage) -> None:
    id_ = await stage.add()
    await stage.policy.connect(ME, *PAIR)
    world = stage.state.load_world()
    assert world.connections == (PAIR,)
    assert [snap.name for snap in world.snaps] == ["other", "player", "remote"]
    supervisor = stage.restart()
    record = supervisor.registry.find(id_).record
    assert supervisor.in_force(record) == stage.engine.access[id_]
    await stage.policy.disconnect(ME, *PAIR)
    assert stage.state.load_world().connections == ()


async def test_a_gate_with_rules_of_before_is_given_those_of_now(stage: Stage) -> None:
    id_ = await stage.add()
    old = stage.engine.access[id_]
    await stage.policy.connect(ME, *PAIR)
    now = stage.engine.access[id_]
    record = stage.supervisor.registry.find(id_).record
    spec = msgspec.structs.replace(stage.engine.specs[id_], access=old)
    stage.supervisor.take_snapshot(make_snapshot(make_state(record, spec=spec)))
    stage.engine.access[id_] = old
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.supervisor.run_jobs)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert stage.engine.access[id_] == now


@pytest.mark.parametrize("error", [lost(), CallRefusedError(ACCESS_DENIED, "no"), ValueError("x")])
async def test_what_the_gate_does_not_take_is_undone(stage: Stage, error: Exception) -> None:
    player, remote = await stage.add("player"), await stage.add("remote")
    stage.engine.refuse = error
    with pytest.raises(type(error)):
        await stage.policy.connect(ME, *PAIR)
    assert not stage.has(player)
    assert not stage.has(remote)
    assert stage.state.load_world().connections == ()
    assert not stage.supervisor.snaps.ready().connections
    await stage.policy.connect(ME, *PAIR)
    stage.engine.refuse = error
    with pytest.raises(type(error)):
        await stage.policy.disconnect(ME, *PAIR)
    assert stage.has(player)
    assert stage.has(remote)
    assert stage.state.load_world().connections == (PAIR,)
    stage.engine.refuse = error
    with pytest.raises(type(error)):
        await stage.load()
    assert stage.has(remote)
    assert len(stage.state.load_world().snaps) == 3


async def test_an_undoing_that_the_gate_does_not_take_is_left_to_its_next_snapshot(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = await stage.add("remote")

    async def refuse(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise lost()

    with monkeypatch.context() as patch:
        patch.setattr(stage.engine, "set_access", refuse)
        with pytest.raises(EngineLostError):
            await stage.policy.connect(ME, *PAIR)
    record = stage.supervisor.registry.find(remote).record
    assert stage.supervisor.in_force(record) == stage.engine.access[remote]
    assert stage.state.load_world().connections == ()


async def test_what_cannot_be_stored_is_undone(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = await stage.add("remote")

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(StateFile, "put_connection", full)
    with pytest.raises(sqlite3.OperationalError):
        await stage.policy.connect(ME, *PAIR)
    assert len(stage.changed()) == 2
    assert not stage.has(remote)


async def test_a_caller_who_goes_away_in_between_leaves_the_old_rules(stage: Stage) -> None:
    remote = await stage.add("remote")
    stage.engine.before_answer = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.policy.connect, ME, *PAIR)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        stage.engine.before_answer.set()
    assert not stage.has(remote)
    assert not stage.supervisor.snaps.ready().connections


async def test_a_sandbox_that_ended_meanwhile_keeps_nobody_from_connecting(stage: Stage) -> None:
    await stage.add("player")
    remote = await stage.add("remote")
    stage.engine.refuse = CallRefusedError(NOT_CONTAINER, "c0")
    assert len(await stage.policy.connect(ME, *PAIR)) == 3
    assert stage.has(remote)


async def test_a_sandbox_that_is_added_meanwhile_has_the_rules_of_after(stage: Stage) -> None:
    await stage.add("player")
    stage.engine.before_answer = trio.Event()
    added: list[str] = []

    async def add() -> None:
        added.append(await stage.add("remote"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.policy.connect, ME, *PAIR)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(add)
        await trio.testing.wait_all_tasks_blocked()
        stage.engine.before_answer.set()
    assert stage.has(added[0])


async def test_a_list_that_would_be_too_long_is_refused(stage: Stage) -> None:
    compiled = stage.supervisor.snaps.ready().access("snap.remote.remote")
    room = MAX_RULES - len(compiled.rules) - len(BUILT_IN)
    rules = tuple(parse_rule(f"send:org.example.n{n}") for n in range(room))
    remote = await stage.add("remote", access=AccessList(rules=rules))
    with pytest.raises(CallRefusedError, match="max_rules"):
        await stage.policy.connect(ME, *PAIR)
    assert not stage.has(remote)
    assert not stage.supervisor.snaps.ready().connections
    with pytest.raises(CallRefusedError, match="max_rules"):
        await stage.supervisor.set_access(
            CALLER, remote, (parse_rule("send:org.x.Y"),), replace=False
        )


async def test_attack_c4_a_connection_whose_rules_would_cost_too_much_is_refused(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = await stage.add("remote")
    before = list(stage.engine.done)
    monkeypatch.setattr(stage.policy, "_rule_steps", 1)
    with pytest.raises(CallRefusedError, match="rule_steps=1 would be exceeded") as caught:
        await stage.policy.connect(ME, *PAIR)
    assert caught.value.dbus_name == LIMITS_EXCEEDED
    assert not stage.has(remote)
    assert not stage.supervisor.snaps.ready().connections
    assert [what for what in stage.engine.done[len(before) :] if what[0] != "set_access"] == []
    monkeypatch.undo()
    await stage.policy.connect(ME, *PAIR)
    assert stage.has(remote)


async def test_attack_c4_rules_that_would_cost_too_much_are_refused(stage: Stage) -> None:
    remote = await stage.add("remote")
    slow = tuple(parse_rule(f"send:@/**a*{n}b*") for n in range(6000))
    with pytest.raises(CallRefusedError, match="rule_steps=32768 would be exceeded: a message"):
        await stage.supervisor.set_access(CALLER, remote, slow)
    with pytest.raises(CallRefusedError, match="rule_steps="):
        await stage.add("remote", access=AccessList(rules=slow))
    assert stage.supervisor.registry.find(remote).record.access == AccessList()


async def test_only_the_brokers_user_and_root_may_change(stage: Stage) -> None:
    for change in (stage.policy.connect, stage.policy.disconnect):
        with pytest.raises(CallRefusedError, match="only the broker's own user"):
            await change(ME + 1, *PAIR)
    with pytest.raises(CallRefusedError, match="only the broker's own user"):
        await stage.policy.load(ME + 1, "{}")
    await stage.policy.connect(0, *PAIR)


async def test_loading_keeps_connections_that_make_sense(stage: Stage) -> None:
    remote, other = await stage.add("remote"), await stage.add("other")
    await stage.policy.connect(ME, *PAIR)
    await stage.policy.connect(ME, "other:control", "player:control")
    stage.changed()
    await stage.load(PLAYER, REMOTE)
    assert stage.changed() == [other]  # its app is no more
    assert stage.engine.access[other].rules == BUILT_IN
    assert stage.has(remote)
    assert stage.state.load_world().connections == (PAIR,)
    await stage.load(PLAYER, OTHER, connections=[("other:control", "player:control")])
    assert stage.changed() == [remote, other]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"snap": []}',
        '{"snaps": [{"name": "A"}]}',
        '{"snaps": [{"name": "a", "plugs": {"p": {"interface": "dbus"}}}]}',
        '{"connections": [["a:b", "c:d"]]}',
        '{"connections": [["a", "c"]]}',
        '{"snaps": [{"name": "a"}, {"name": "a"}]}',
        "[" * 100_000,
    ],
)
async def test_snaps_that_make_no_sense_are_refused_whole(stage: Stage, text: str) -> None:
    await stage.policy.connect(ME, *PAIR)
    before = stage.state.load_world()
    with pytest.raises(CallRefusedError) as caught:
        await stage.policy.load(ME, text)
    assert caught.value.dbus_name.endswith("InvalidArgs")
    assert stage.state.load_world() == before
    assert stage.supervisor.snaps.ready().connections


async def test_too_long_a_text_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snaps_module, "MAX_WORLD", 10)
    with pytest.raises(CallRefusedError, match="more than 10"):
        await stage.load()


async def test_the_system_has_its_slots_unless_a_snap_is_the_system(empty: Stage) -> None:
    plug = {"network-manager": {"interface": "network-manager"}}
    await empty.load({"name": "nm-applet", "apps": ["a"], "plugs": plug})
    assert await empty.policy.connect(ME, "nm-applet:network-manager", "snapd:network-manager")
    assert len(empty.restart().snaps.ready().connections) == 1
    await empty.load({"name": "core", "system": True})
    assert list(empty.supervisor.snaps.ready().snaps) == ["core"]
