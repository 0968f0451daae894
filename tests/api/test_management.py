import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.api.caller import BusContext
from broker.api.dispatch import Objects
from broker.api.management import Management, describe_denial
from broker.api.subscribers import MAX_SUBSCRIBERS_OF_USER, Subscribers
from broker.bus.values import Variant, pack, plain
from broker.control_protocol.messages import BusSpec, Denied
from broker.supervisor.config import Config, ConfiguredLimits
from broker.supervisor.sandboxes.lifecycle import Cgroup, Event, Process
from broker.supervisor.sandboxes.registry import SandboxId
from broker.supervisor.sandboxes.specs import AddRequest, Caller
from broker.supervisor.storage.recovery import open_state
from broker.supervisor.supervisor import Environment, Supervisor
from broker.wire.interfaces import BROKER_PATH
from policy.rules import AccessList
from policy.text import format_rule, parse_rule
from policy.wall import WALL
from tests.helpers.fakes import FakeAnnouncer, FakeBus, FakeEngine, FakeWatch, make_call
from tests.helpers.records import EMPTY_DICT

CALLER = Caller(bus="session", unique_name=":1.1", uid=os.geteuid(), credentials=EMPTY_DICT)
DENIED = Denied(
    sandbox="c0",
    bus="session",
    direction="send",
    kind="call",
    peer="org.example.X",
    reason="no rule",
    more=2,
)


class World:
    def __init__(self, outside: Environment, engine: FakeEngine, folder: Path) -> None:
        self.engine = engine
        self.supervisor = Supervisor(outside, ConfiguredLimits())
        engine.listener = self.supervisor
        me = CALLER.uid
        self.bus = FakeBus(users={":1.1": me, ":1.2": me + 1, ":1.7": me})
        config = Config(
            scope="user",
            buses=(BusSpec(name="session", address="unix:path=/bus"),),
            runtime_dir=folder,
            limits=ConfiguredLimits(),
        )
        door = BusContext(
            name="session", bus=self.bus, supervisor=self.supervisor, buses=("session",)
        )
        self.watch = FakeWatch([":1.1", ":1.7"])
        self.subscribers = Subscribers(lambda: 0.0)
        management_ = Management(door, engine, config, self.subscribers, self.watch)
        interface = management_.interface()
        self.objects = Objects({BROKER_PATH: [interface]})

    async def add(self, **fields: Any) -> None:
        request = AddRequest(
            type="org.example.Type",
            app="app",
            metadata=pack("a{sv}", [{"k": Variant("s", "v")}]),
            buses=("session",),
            access=AccessList(rules=(parse_rule("send:org.example.X"),)),
            **fields,
        )
        self.supervisor.announce(await self.supervisor.add(request, CALLER))

    async def ask(self, member: str, signature: str = "", *values: Any, **fields: Any) -> Any:
        """Return the plain value of the answer, or the name of the error."""
        self.bus.answers.clear()
        self.bus.errors.clear()
        call = make_call(member, signature, *values, path=BROKER_PATH, **fields)
        await self.objects.serve(self.bus, call)
        if self.bus.errors:
            return self.bus.errors[0][0].rpartition(".")[2]
        return plain((*self.bus.answers[0][1], None)[0])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    engine = FakeEngine()
    with open_state(tmp_path / "state.db") as state:
        outside = Environment(
            engine=engine,
            state=state,
            announcer=FakeAnnouncer(),
            name_watches={"session": FakeWatch([":1.1"])},
            folder=tmp_path,
            now=lambda: 12.5,
        )
        yield World(outside, engine, tmp_path)


async def test_a_list_has_what_is_known(world: World) -> None:
    assert await world.ask("List") == []
    await world.add(component="part", plugs=("network",))
    world.engine.connect("c0", ":1.7")
    (listed,) = await world.ask("List")
    path = listed["sockets"]["session"]
    assert Path(path).name.startswith("dbus-")
    assert listed.pop("addresses")["session"].startswith(f"unix:path={path},guid=")
    assert listed == {
        "id": "c0",
        "path": "/org/freedesktop/DBus/Containers1/c0",
        "type": "org.example.Type",
        "app": "app",
        "component": "part",
        "metadata": {"k": "v"},
        "uid": CALLER.uid,
        "creator": ":1.1",
        "listening": True,
        "sockets": {"session": path},
        "connections": [("session", ":1.7")],
        "engine": "gate",
        "engines": {"session": "gate"},
        "instances": {},
        "access": [(False, "send:org.example.X")],
        "receive_from_host": True,
        "portals_as_host": False,
        "keep_after_creator": False,
        "plugs": ["network"],
        "phase": "running",
        "reason": "",
        "process": 0,
        "cgroup": "",
        "time_limit": 0,
        "time_left": 0,
        "close_notify": False,
        "denied": 0,
        "created": 12,
    }


@pytest.mark.parametrize("name", ["c0", "/org/freedesktop/DBus/Containers1/c0"])
async def test_one_is_shown_with_its_refusals(world: World, name: str) -> None:
    await world.add()
    world.supervisor.take_event(DENIED)
    shown = await world.ask("Show", "s", name)
    assert shown["denied"] == 3
    (denial,) = shown["denials"]
    assert denial == plain(describe_denial(DENIED))
    assert denial["more"] == 2
    assert denial["reason"] == "no rule"
    assert "sandbox" not in denial
    assert (True, "send:org.freedesktop.portal.*") in shown["built_in"]


async def test_what_ends_it_is_shown(world: World) -> None:
    process, cgroup = Process(17, 1), Cgroup("/sys/fs/cgroup/x", 7)
    await world.add(process=process, cgroup=cgroup, time_limit=60)
    shown = await world.ask("Show", "s", "c0")
    assert (shown["process"], shown["cgroup"]) == (17, "/sys/fs/cgroup/x")
    assert shown["time_limit"] == 60
    assert 0 < shown["time_left"] <= 60
    world.supervisor.apply_event(SandboxId("c0"), Event.CREATOR_LEFT)
    shown = await world.ask("Show", "s", "c0")
    assert (shown["phase"], shown["reason"]) == ("closing", "creator-gone")
    world.engine.end("c0", "last-connection")
    assert (await world.ask("Status"))["ended"] == {"creator-gone": 1}


async def test_what_insists_on_portals_has_the_wall_alone_built_in(world: World) -> None:
    await world.add(portals_as_host=True)
    shown = await world.ask("Show", "s", "c0")
    assert shown["built_in"] == [(rule.deny, format_rule(rule)) for rule in WALL]
    assert shown["portals_as_host"]


async def test_access_is_changed_and_answered(world: World) -> None:
    await world.add()
    more = await world.ask("ChangeAccess", "sa(bs)b", "c0", [(True, "own:a.b")], False)
    assert more == [(False, "send:org.example.X"), (True, "own:a.b")]
    assert await world.ask("ChangeAccess", "sa(bs)b", "c0", [(False, "see:a.b")], True) == [
        (False, "see:a.b")
    ]
    assert world.engine.access["c0"].rules[0].origin == "ChangeAccess by :1.1"
    before = world.engine.access["c0"]
    bad = [(False, "send:a.b"), (False, "send:a..b")]
    assert await world.ask("ChangeAccess", "sa(bs)b", "c0", bad, True) == "InvalidArgs"
    assert "character 7" in world.bus.errors[0][1]
    assert world.engine.access["c0"] == before


async def test_other_users_see_and_change_nothing(world: World) -> None:
    await world.add()
    assert await world.ask("List", sender=":1.2") == []
    assert await world.ask("Show", "s", "c0", sender=":1.2") == "AccessDenied"
    change = world.ask("ChangeAccess", "sa(bs)b", "c0", [], True, sender=":1.2")
    assert await change == "AccessDenied"


async def test_callers_in_a_sandbox_are_refused(world: World) -> None:
    await world.add()
    world.engine.connect("c0", ":1.7")
    for member, signature, values in (
        ("List", "", ()),
        ("Show", "s", ("c0",)),
        ("Status", "", ()),
        ("Upgrade", "", ()),
        ("ChangeAccess", "sa(bs)b", ("c0", [], True)),
    ):
        assert await world.ask(member, signature, *values, sender=":1.7") == "AccessDenied"


async def test_a_sandbox_that_is_not_there_is_none(world: World) -> None:
    assert await world.ask("Show", "s", "c0") == "NotContainer"
    assert await world.ask("ChangeAccess", "sa(bs)b", "c0", [], True) == "NotContainer"


async def test_an_upgrade_is_for_root_and_ourselves(world: World) -> None:
    old = world.engine.pid
    assert await world.ask("Upgrade") == old
    assert list(world.bus.answers[0][1]) == [old, old + 1]
    assert await world.ask("Upgrade", sender=":1.2") == "AccessDenied"
    world.bus.users[":1.2"] = 0
    assert await world.ask("Upgrade", sender=":1.2") == old + 1


async def test_status_says_what_runs(world: World, tmp_path: Path) -> None:
    await world.add()
    world.engine.connect("c0", ":1.7")
    status = await world.ask("Status")
    assert status["version"]
    assert status["limits"]["max_containers"] == 10_000
    assert status["use"]["max_containers"] == 1
    assert status["use"]["max_connections_per_container"] == 1
    assert status["use"]["pending_calls"] == 3
    assert set(status["limits"]) - set(status["use"]) == {
        "max_containers_per_user",
        "max_container_metadata_bytes",
    }
    del status["version"], status["limits"], status["use"]
    assert status == {
        "scope": "user",
        "pid": os.getpid(),
        "gate_pid": 4711,
        "engine": "fake",
        "buses": {"session": "unix:path=/bus"},
        "sandboxes": 1,
        "connections": 1,
        "runtime_dir": str(tmp_path),
        "ended": {},
        "watched": {"processes": "0 by pidfds", "cgroups": "0 by inotify"},
        "last_crash": "",
        "engines": {"session": "fake"},
    }


async def test_use_is_shown_if_the_gate_can_tell(world: World) -> None:
    await world.add()
    assert (await world.ask("Show", "s", "c0"))["use"]["pending_calls"] == 3
    world.engine.cannot_tell = True
    assert (await world.ask("Show", "s", "c0"))["use"] == {}
    assert (await world.ask("Status"))["use"] == {"max_containers": 1}


async def test_a_bus_that_labels_is_shown(world: World) -> None:
    world.engine.labelled = ("session",)
    await world.add()
    shown = await world.ask("Show", "s", "c0")
    assert shown["engine"] == "containers1"
    assert shown["engines"] == {"session": "containers1"}
    assert shown["instances"] == {"session": "/bus/c0"}
    assert (await world.ask("Status"))["engines"] == {"session": "containers1"}


async def test_a_bus_that_is_to_label_again_is_shown(world: World) -> None:
    world.engine.labelled = world.engine.awaited = ("session",)
    await world.add()
    shown = await world.ask("Show", "s", "c0")
    assert shown["engine"] == "containers1"
    assert shown["engines"] == {"session": "containers1"}
    assert shown["instances"] == {}


async def test_who_subscribes_is_watched_and_counted_once(world: World) -> None:
    await world.add()
    world.engine.connect("c0", ":1.7")
    assert await world.ask("Subscribe", sender=":1.7") == "AccessDenied"
    assert await world.ask("Subscribe") is None
    assert await world.ask("Subscribe") is None
    assert ("session", ":1.1") in world.subscribers
    assert len(world.subscribers) == 1
    assert await world.ask("Unsubscribe") is None
    assert await world.ask("Unsubscribe") is None
    assert len(world.subscribers) == 0


async def test_a_subscriber_too_many_is_refused_and_not_watched(world: World) -> None:
    for number in range(MAX_SUBSCRIBERS_OF_USER):
        world.subscribers.add(replace(CALLER, unique_name=f":2.{number}"))
    assert await world.ask("Subscribe") == "LimitsExceeded"
    assert len(world.subscribers) == MAX_SUBSCRIBERS_OF_USER
