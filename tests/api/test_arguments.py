import os
from collections.abc import Iterator
from typing import Any

import pytest

from broker.api.arguments import MAX_PLUGS, MAX_TEXT, NAMED, Context, reading_request
from broker.bus.values import Variant, unpack
from broker.supervisor.sandboxes.lifecycle import Cgroup
from broker.supervisor.sandboxes.specs import AddRequest
from broker.supervisor.watches import cgroups
from broker.supervisor.watches.processes import identify
from broker.wire.errors import INVALID_ARGS, LIMITS_EXCEEDED, CallRefusedError
from policy.rules import Access, AccessList, Rule
from tests.helpers.steps import at_once

ORIGIN = "AddServer by :1.1"
ME = identify(os.getpid(), os.getuid())


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def parse(
    fds: tuple[int, ...] = (),
    type_: str = "org.example.Type",
    app: str = "app",
    metadata: dict[str, Variant] | None = None,
    **named: Variant,
) -> AddRequest:
    context = Context(
        bus="system", buses=("session", "system"), fds=fds, uid=os.getuid(), origin=ORIGIN
    )
    return at_once(reading_request([type_, app, metadata or {}, named], context))


def test_without_named_arguments_there_are_defaults() -> None:
    request = parse(metadata={"k": Variant("s", "v")})
    assert request == AddRequest(
        type="org.example.Type",
        app="app",
        metadata=request.metadata,
        buses=("system",),
        access=AccessList(),
    )
    assert unpack("a{sv}", request.metadata) == [{"k": Variant("s", "v")}]


def test_every_named_argument_is_understood(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = pipe
    values: dict[str, Any] = {
        "Allow": [(2, "org.example.X", "/a", "")],
        "Buses": ["session", "system"],
        "Cgroup": "/sys/fs/cgroup/x",
        "CloseNotify": 0,
        "Component": "part",
        "KeepAfterCreator": True,
        "Plugs": ["network", "network", "home"],
        "PortalsAsHost": True,
        "Process": os.getpid(),
        "ProcessFd": 3,
        "ReadyNotify": 1,
        "ReceiveFromHost": False,
        "Rules": [(True, "own:org.example.Y")],
        "Socket": 2,
        "TimeLimit": 60,
    }
    assert values.keys() == NAMED.keys()
    # The one is another way to say the other; and a cgroup there has to be.
    del values["ProcessFd"]
    monkeypatch.setattr(cgroups, "identify", lambda path: Cgroup(path, 7))
    named: dict[str, Any] = {name: Variant(NAMED[name], value) for name, value in values.items()}
    request = parse((read, write, 99), **named)
    allow = Rule(access=frozenset({Access.SEND}), name="org.example.X", path="/a", origin=ORIGIN)
    deny = Rule(access=frozenset({Access.OWN}), deny=True, name="org.example.Y", origin=ORIGIN)
    assert request == AddRequest(
        type="org.example.Type",
        app="app",
        component="part",
        metadata=request.metadata,
        buses=("session", "system"),
        access=AccessList(rules=(allow, deny), receive_from_host=False),
        plugs=("network", "home"),
        portals_as_host=True,
        keep_after_creator=True,
        process=ME,
        cgroup=Cgroup("/sys/fs/cgroup/x", 7),
        time_limit=60,
        close_notify=read,
        ready_notify=write,
        socket=99,
    )


def test_an_empty_component_is_none() -> None:
    assert parse(Component=Variant("s", "")).component is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"type_": "nodots"}, "nodots"),
        ({"type_": ""}, "interface name"),
        ({"metadata": {"k": Variant("h", 0)}}, "descriptors"),
        ({"Colour": Variant("s", "red")}, "Colour"),
        ({"Allow": Variant("s", "x")}, "a\\(usos\\)"),
        ({"Allow": Variant("a(usos)", [(0x8000, "", "/", "")])}, "rule 0"),
        ({"Rules": Variant("a(bs)", [(False, "shout:x.y")])}, "shout"),
        ({"Buses": Variant("as", [])}, "empty"),
        ({"Buses": Variant("as", ["session", "session"])}, "twice"),
        ({"Buses": Variant("as", ["moon"])}, "moon"),
        ({"Plugs": Variant("as", [""])}, "Plugs"),
        ({"CloseNotify": Variant("h", 0)}, "no descriptor 0"),
        ({"Socket": Variant("h", 3)}, "no descriptor 3"),
    ],
)
def test_what_is_wrong_is_named(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(CallRefusedError, match=problem) as caught:
        parse(**arguments)
    assert caught.value.dbus_name == INVALID_ARGS


def test_the_wrong_end_of_a_pipe_is_refused(pipe: tuple[int, int]) -> None:
    with pytest.raises(CallRefusedError, match="CloseNotify"):
        parse(pipe, CloseNotify=Variant("h", 1))
    with pytest.raises(CallRefusedError, match="ReadyNotify"):
        parse(pipe, ReadyNotify=Variant("h", 0))


@pytest.mark.parametrize(
    "arguments",
    [
        {"app": "x" * (MAX_TEXT + 1)},
        {"Component": Variant("s", "x" * (MAX_TEXT + 1))},
        {"Plugs": Variant("as", ["x"] * (MAX_PLUGS + 1))},
        {"Plugs": Variant("as", ["x" * (MAX_TEXT + 1)])},
    ],
)
def test_what_is_too_much_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(CallRefusedError) as caught:
        parse(**arguments)
    assert caught.value.dbus_name == LIMITS_EXCEEDED


def test_metadata_nested_too_deeply_is_refused() -> None:
    value = Variant("s", "x")
    for _ in range(29):
        value = Variant("v", value)
    assert parse(metadata={"k": value}).metadata
    with pytest.raises(CallRefusedError, match="max_metadata_nesting=32") as caught:
        parse(metadata={"k": Variant("v", value)})
    assert caught.value.dbus_name == LIMITS_EXCEEDED


def test_a_process_is_given_by_pidfd_as_well() -> None:
    fd = os.pidfd_open(os.getpid())
    try:
        assert parse((fd,), ProcessFd=Variant("h", 0)).process == ME
        with pytest.raises(CallRefusedError, match="only one of Process and ProcessFd"):
            parse((fd,), ProcessFd=Variant("h", 0), Process=Variant("u", os.getpid()))
        with pytest.raises(CallRefusedError, match="ProcessFd: there is no descriptor 1"):
            parse((fd,), ProcessFd=Variant("h", 1))
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("name", "variant", "why"),
    [
        ("Process", Variant("u", 0), "there is no process 0"),
        ("Process", Variant("u", 2**32 - 1), "there is no process"),
        ("Cgroup", Variant("s", "/tmp"), "is in no cgroup filesystem"),
        ("Cgroup", Variant("s", ""), "is not a plain absolute path"),
        ("TimeLimit", Variant("t", 0), "TimeLimit must be 1 to"),
        ("TimeLimit", Variant("t", 2**32), "TimeLimit must be 1 to"),
    ],
)
def test_what_cannot_end_it_is_refused(name: str, variant: Any, why: str) -> None:
    with pytest.raises(CallRefusedError, match=why) as caught:
        parse(**{name: variant})
    assert caught.value.dbus_name == INVALID_ARGS
