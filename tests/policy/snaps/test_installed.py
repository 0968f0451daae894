import msgspec
import pytest

from policy.snaps.catalogue_schema import Attribute, Attributes, Interface
from policy.snaps.installed import (
    Port,
    Snap,
    SnapError,
    World,
    app_values,
    attribute_values,
    check_snap,
    parse_connection,
    parse_world,
    snap_values,
)

ATTRIBUTES = Attributes(
    plug={
        "bus": Attribute(type="bus", required=True),
        "name": Attribute(type="bus-name"),
        "part": Attribute(type="name-element", default="<snap>"),
        "free": Attribute(type="text"),
    }
)
THING = Interface(summary="A thing.", attributes=ATTRIBUTES)


def values(attributes: dict[str, object]) -> dict[str, str]:
    port = Port(interface="thing", attributes=attributes)
    return attribute_values(THING, "plug", Snap(name="foo-bar"), "end", port)


def test_attributes_become_values() -> None:
    found = values({"bus": "system", "name": "org.example.X", "unknown": 5})
    assert found == {
        "plug.bus": "system",
        "plug.bus:path": "/system",
        "plug.name": "org.example.X",
        "plug.name:path": "/org/example/X",
        "plug.part": "foo-bar",
        "plug.part:path": "/foo-bar",
    }


@pytest.mark.parametrize(
    ("attributes", "problem"),
    [
        ({}, "plug foo-bar:end: attribute 'bus' is missing"),
        ({"bus": 5}, "attribute 'bus' is not a text"),
        ({"bus": ["session"]}, "attribute 'bus' is not a text"),
        ({"bus": "sessions"}, "attribute 'bus' is neither 'session' nor 'system': 'sessions'"),
        ({"bus": "session", "name": "x"}, "attribute 'name' is no bus name: bus name of a single"),
        ({"bus": "session", "name": ":1.5"}, "attribute 'name' is a unique name"),
        ({"bus": "session", "name": "org.example.*"}, "attribute 'name' is no bus name"),
        ({"bus": "session", "name": "org.{a,b}"}, "attribute 'name' is no bus name"),
        ({"bus": "session", "part": "a*"}, "attribute 'part' has other characters than"),
        ({"bus": "session", "part": "a.b"}, "attribute 'part' has other characters than"),
        ({"bus": "session", "free": ""}, "attribute 'free' is empty or longer"),
        ({"bus": "session", "free": "x" * 256}, "attribute 'free' is empty or longer"),
    ],
)
def test_bad_attributes_are_refused(attributes: dict[str, object], problem: str) -> None:
    with pytest.raises(SnapError) as caught:
        values(attributes)
    assert problem in str(caught.value)


def test_values_of_snaps_and_apps() -> None:
    assert snap_values(Snap(name="foo-bar_x")) == {
        "snap": "foo-bar_x",
        "snap:desktop": "foo_bar_x",
    }
    assert app_values("snap.foo-bar.app") == {"tag:path": "snap_2efoo_2dbar_2eapp"}


@pytest.mark.parametrize(
    "snap",
    [
        Snap(name="foo"),
        Snap(name="0ad"),
        Snap(name="foo-bar_key1", apps=("app", "hook.configure", "A-1")),
        Snap(name="x", apps=("a",), plugs={"p": Port(interface="i", apps=("a",))}),
    ],
)
def test_good_snaps(snap: Snap) -> None:
    check_snap(snap)


@pytest.mark.parametrize(
    ("snap", "problem"),
    [
        (Snap(name=""), "not a snap's name: ''"),
        (Snap(name="Foo"), "not a snap's name: 'Foo'"),
        (Snap(name="foo*"), "not a snap's name"),
        (Snap(name="foo--bar"), "not a snap's name"),
        (Snap(name="foo.bar"), "not a snap's name"),
        (Snap(name="x" * 52), "not a snap's name"),
        (Snap(name="foo", apps=("a.b",)), "snap foo: not an app's name: 'a.b'"),
        (Snap(name="foo", plugs={"P": Port(interface="i")}), "snap foo: not a plug's name: 'P'"),
        (Snap(name="foo", slots={"s:": Port(interface="i")}), "snap foo: not a slot's name"),
        (
            Snap(name="foo", apps=("a",), slots={"s": Port(interface="i", apps=("b",))}),
            "slot foo:s: the snap has no app 'b'",
        ),
        (Snap(name="snapd", system=True, apps=("a",)), "the system's snap has no apps"),
    ],
)
def test_bad_snaps(snap: Snap, problem: str) -> None:
    with pytest.raises(SnapError) as caught:
        check_snap(snap)
    assert problem in str(caught.value)


def test_connections_are_read_and_shown() -> None:
    connection = parse_connection("a:b", "c:d")
    assert str(connection) == "a:b c:d"
    for bad in ("a", ":b", "a:", ""):
        with pytest.raises(SnapError, match="not SNAP:PLUG"):
            parse_connection(bad, "c:d")
        with pytest.raises(SnapError, match="not SNAP:SLOT"):
            parse_connection("a:b", bad)


def test_a_world_is_read() -> None:
    world = World(
        system="core",
        snaps=(Snap(name="a", apps=("x",), plugs={"p": Port(interface="i")}),),
        connections=(("a:p", "b:s"),),
    )
    assert parse_world(msgspec.to_builtins(world)) == world
    bad_ones: list[object] = [
        {"snaps": [{"nam": "x"}]},
        {"system": "mac"},
        [],
        {"connections": [["a:b"]]},
    ]
    for bad in bad_ones:
        with pytest.raises(SnapError):
            parse_world(bad)
