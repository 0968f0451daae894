import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.api.caller import BusContext
from broker.api.containers1 import Containers1
from broker.api.dispatch import Objects
from broker.bus.values import Variant
from broker.supervisor.config import ConfiguredLimits
from broker.supervisor.storage.recovery import open_state
from broker.supervisor.supervisor import Environment, Supervisor
from broker.wire.interfaces import CONTAINERS1, DRIVER_PATH
from policy.rules import Access, Rule
from tests.helpers.fakes import FakeAnnouncer, FakeBus, FakeEngine, FakeWatch, make_call

ME = os.geteuid()
USOS = (2, "org.example.X", "/", "")


class World:
    """The interface on a bus with some users, and a supervisor behind it."""

    def __init__(self, outside: Environment, engine: FakeEngine, watch: FakeWatch) -> None:
        self.engine = engine
        self.watch = watch
        self.supervisor = Supervisor(outside, ConfiguredLimits())
        engine.listener = self.supervisor
        self.bus = FakeBus(users={":1.1": ME, ":1.2": ME + 1, ":1.7": ME})
        door = BusContext(
            name="session",
            bus=self.bus,
            supervisor=self.supervisor,
            buses=("session", "system"),
        )
        interface = Containers1(door, watch).interface()
        self.objects = Objects({DRIVER_PATH: [interface]})

    async def ask(self, member: str, signature: str = "", *values: Any, **fields: Any) -> Any:
        """Return the values of the answer, or the name of the error."""
        self.bus.answers.clear()
        self.bus.errors.clear()
        await self.objects.serve(self.bus, make_call(member, signature, *values, **fields))
        if self.bus.errors:
            return self.bus.errors[0][0].rpartition(".")[2]
        return self.bus.answers[0][1]

    async def add(self, **named: Variant) -> str:
        (path, _, _) = await self.ask(
            "AddServer", "ssa{sv}a{sv}", "org.example.Type", "app", {"k": Variant("u", 1)}, named
        )
        return str(path)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    engine, watch = FakeEngine(), FakeWatch()
    folder = tmp_path / "containers"
    folder.mkdir()
    with open_state(tmp_path / "state.db") as state:
        outside = Environment(
            engine=engine,
            state=state,
            announcer=FakeAnnouncer(),
            name_watches={"session": watch, "system": FakeWatch()},
            folder=folder,
        )
        yield World(outside, engine, watch)


@pytest.mark.parametrize("member", ["AddServer", "AddContainerServer"])
async def test_adding_answers_path_socket_and_address(world: World, member: str) -> None:
    path, sock, address = await world.ask(
        member, "ssa{sv}a{sv}", "org.example.Type", "app", {}, {"Allow": Variant("a(usos)", [USOS])}
    )
    assert path == "/org/freedesktop/DBus/Containers1/c0"
    assert sock.endswith(b"\0")
    assert address.startswith(f"unix:path={sock[:-1].decode()},guid=")
    rule = world.engine.access["c0"].rules[0]
    assert (rule.name, rule.origin) == ("org.example.X", "AddServer by :1.1")
    assert world.watch.names == [":1.1"]


async def test_the_bus_of_the_call_is_the_bus_of_the_sandbox(world: World) -> None:
    await world.add()
    assert [one.bus for one in world.engine.specs["c0"].listeners] == ["session"]
    await world.add(Buses=Variant("as", ["system", "session"]))
    assert [one.bus for one in world.engine.specs["c1"].listeners] == ["system", "session"]


async def test_a_refused_adding_leaves_nobody_watched(world: World) -> None:
    answer = await world.ask("AddServer", "ssa{sv}a{sv}", "bad", "app", {}, {})
    assert answer == "InvalidArgs"
    assert world.watch.names == []


async def test_its_creator_can_stop_it_and_others_cannot(world: World) -> None:
    path = await world.add()
    for member in ("StopInstance", "RemoveContainerServer", "StopListening"):
        assert await world.ask(member, "o", path, sender=":1.2") == "AccessDenied"
    assert await world.ask("StopListening", "o", path) == ()
    path = await world.add()
    assert await world.ask("RemoveContainerServer", "o", path) == ()
    assert await world.ask("StopInstance", "o", path) == "NotContainer"
    assert await world.ask("StopInstance", "o", "/else/where") == "NotContainer"


@pytest.mark.parametrize("by_path", [True, False])
async def test_rules_are_set_by_id_and_by_path(world: World, by_path: bool) -> None:
    path = await world.add()
    target = path if by_path else "c0"
    assert await world.ask("SetContainerAccess", "sa(usos)", target, [USOS]) == ()
    assert world.engine.access["c0"].rules[0] == Rule(
        access=frozenset({Access.SEND}),
        name="org.example.X",
        path="/",
        origin="SetContainerAccess by :1.1",
    )
    before = world.engine.access["c0"]
    bad = [USOS, (0, "", "/", "")]
    assert await world.ask("SetContainerAccess", "sa(usos)", target, bad) == "InvalidArgs"
    assert world.engine.access["c0"] == before


async def test_callers_in_a_sandbox_change_nothing(world: World) -> None:
    path = await world.add()
    world.engine.connect("c0", ":1.7")
    for member, signature, values in (
        ("AddServer", "ssa{sv}a{sv}", ("a.b", "x", {}, {})),
        ("StopInstance", "o", (path,)),
        ("StopListening", "o", (path,)),
        ("SetContainerAccess", "sa(usos)", ("c0", [])),
        ("RequestHeader", "", ()),
    ):
        answer = await world.ask(member, signature, *values, sender=":1.7")
        assert answer == "AccessDenied", member
    assert world.watch.names == [":1.1"]


async def test_who_is_behind_a_connection_is_told(world: World) -> None:
    path = await world.add()
    world.engine.connect("c0", ":1.7")
    world.bus.owners["org.example.App"] = ":1.7"
    about = (
        {"UnixUserID": Variant("u", ME)},
        "org.example.Type",
        "app",
        {"k": Variant("u", 1)},
    )
    for name in (":1.7", "org.example.App"):
        assert await world.ask("GetConnectionInstance", "s", name) == (path, *about)
    assert await world.ask("GetInstanceInfo", "o", path) == about


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (":1.2", "NotContainer"),
        ("org.freedesktop.DBus", "NotContainer"),
        (":1.99", "NameHasNoOwner"),
        ("org.example.Nobody", "NameHasNoOwner"),
        ("no name", "InvalidArgs"),
        ("", "InvalidArgs"),
    ],
)
async def test_who_is_in_no_sandbox_is_said_exactly(world: World, name: str, error: str) -> None:
    assert await world.ask("GetConnectionInstance", "s", name) == error


async def test_an_instance_that_is_not_there_is_none(world: World) -> None:
    for path in ("/org/freedesktop/DBus/Containers1/c7", "/c7"):
        assert await world.ask("GetInstanceInfo", "o", path) == "NotContainer"


async def test_attack_i3_info_is_for_root_and_its_own_user(world: World) -> None:
    path = await world.add()
    world.bus.users[":1.8"] = 0
    for sender in (":1.1", ":1.8"):
        assert len(await world.ask("GetInstanceInfo", "o", path, sender=sender)) == 4
    absent = "/org/freedesktop/DBus/Containers1/c7"
    texts = []
    world.engine.connect("c0", ":1.7")  # of the same user, and in a sandbox
    for sender in (":1.2", ":1.7"):
        for asked in (path, absent):
            assert await world.ask("GetInstanceInfo", "o", asked, sender=sender) == "NotContainer"
            texts.append(world.bus.errors[0][1].replace(asked, "it"))
    assert len(set(texts)) == 1


async def test_attack_i1_who_was_in_a_sandbox_is_never_said_to_be_in_none(world: World) -> None:
    path = await world.add()
    # It has left, as the gate told, and the bus lists it still; then no more.
    world.engine.connections["session", ":1.7"] = "c0"
    assert (await world.ask("GetConnectionInstance", "s", ":1.7"))[0] == path
    del world.bus.users[":1.7"]
    assert await world.ask("GetConnectionInstance", "s", ":1.7") == "NameHasNoOwner"
    # Its sandbox has ended, or its gate has died.
    for sandbox in ("c9", ""):
        world.engine.connections["session", ":1.2"] = sandbox
        assert await world.ask("GetConnectionInstance", "s", ":1.2") == "Failed"
        answer = await world.ask("StopInstance", "o", path, sender=":1.2")
        assert answer == "AccessDenied"


async def test_headers_are_tagged_only_where_they_get_through(world: World) -> None:
    assert await world.ask("RequestHeader") == ()
    assert ("request_instance_field", "session", ":1.1") in world.engine.done
    assert world.watch.names == [":1.1"]
    world.bus.forwards = False
    assert await world.ask("RequestHeader") == "NotSupported"
    assert world.watch.names == [":1.1"]  # for the first one


async def test_supported_arguments_are_a_property(world: World) -> None:
    ((name, value),) = (await world.ask("GetAll", "s", CONTAINERS1))[0].items()
    assert (name, value.signature) == ("SupportedArguments", "as")
    assert "CloseNotify" in value.value


async def test_a_caller_whom_the_bus_does_not_know_is_refused(world: World) -> None:
    world.bus.users[":1.1"] = "nobody"  # type: ignore[assignment]
    call = world.ask("AddServer", "ssa{sv}a{sv}", "a.b", "x", {}, {})
    assert await call == "AccessDenied"
