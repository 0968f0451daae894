from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import trio

from broker.api.dispatch import Interface, Method, Objects, Property, ReturnValues, SignalSpec, args
from broker.bus.connection import Call
from broker.bus.values import Variant
from broker.wire.errors import ACCESS_DENIED, CallRefusedError
from tests.helpers.fakes import FakeBus, lost, make_call

PATH = "/org/example/Thing"
NAME = "org.example.Thing"
PROPERTIES = "org.freedesktop.DBus.Properties"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
PATH_OF_NOTHING = Path("/does/not/exist")
ERROR = "org.freedesktop.DBus.Error."


async def echo(call: Call) -> ReturnValues:
    await trio.lowlevel.checkpoint()
    return ReturnValues(call.values)


def refuse(_call: Call) -> ReturnValues:
    raise CallRefusedError(ACCESS_DENIED, "not you")


def lose(_call: Call) -> ReturnValues:
    raise lost()


def fail(_call: Call) -> ReturnValues:
    raise ZeroDivisionError


def lie(_call: Call) -> ReturnValues:
    return ReturnValues((1,))


THING = Interface(
    name=NAME,
    methods=(
        Method(name="Echo", takes=args("in:s"), gives=args("out:s"), run=echo),
        Method(name="Refuse", run=refuse),
        Method(name="Lose", run=lose),
        Method(name="Fail", run=fail),
        Method(name="Lie", gives=args("out:s"), run=lie),
    ),
    signals=(SignalSpec(name="Happened", args=args("what:a{sv}")),),
    properties=(Property(name="Colours", type="as", value=["red"]),),
)


async def ask(call: Call) -> FakeBus:
    bus = FakeBus()
    await Objects({PATH: [THING]}).serve(bus, call)
    assert len(bus.answers) + len(bus.errors) == 1
    return bus


def call(member: str, signature: str = "", *values: object, **fields: object) -> Call:
    return make_call(member, signature, *values, **{"path": PATH, **fields})


@pytest.mark.parametrize("interface", [None, NAME])
async def test_a_method_is_found_with_and_without_interface(interface: str | None) -> None:
    bus = await ask(call("Echo", "s", "x", interface=interface))
    assert bus.answers == [("s", ("x",))]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (call("Echo", "u", 1), "InvalidArgs"),
        (call("Nothing"), "UnknownMethod"),
        (call("Echo", "s", "x", interface="a.b"), "UnknownInterface"),
        (call("Echo", "s", "x", path="/elsewhere"), "UnknownObject"),
        (call("Refuse"), "AccessDenied"),
        (call("Lose"), "Failed"),
        (call("Fail"), "Failed"),
        (call("Lie"), "Failed"),
        (call("Get", "ss", NAME, "Size"), "UnknownProperty"),
        (call("Get", "ss", "a.b", "Size"), "UnknownInterface"),
        (call("Set", "ssv", NAME, "Colours", Variant("s", "")), "PropertyReadOnly"),
        (call("Introspect", path="/elsewhere", interface=INTROSPECTABLE), "UnknownObject"),
    ],
)
async def test_what_goes_wrong_is_one_error_reply(wrong: Call, error: str) -> None:
    bus = await ask(wrong)
    assert bus.errors[0][0] == ERROR + error


async def test_a_defect_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    bus = await ask(call("Fail"))
    assert bus.errors == [(ERROR + "Failed", "internal error")]
    assert "ZeroDivisionError" in caplog.text


async def test_what_comes_after_the_answer_comes_after_it() -> None:
    bus = FakeBus()
    seen: list[int] = []
    method = Method(
        name="M", run=lambda _call: ReturnValues((), lambda: seen.append(len(bus.answers)))
    )
    await Objects({PATH: [Interface(name=NAME, methods=(method,))]}).serve(bus, call("M"))
    assert seen == [1]


async def test_properties_are_read() -> None:
    bus = await ask(call("Get", "ss", NAME, "Colours", interface=PROPERTIES))
    assert bus.answers == [("v", (Variant("as", ["red"]),))]
    bus = await ask(call("GetAll", "s", NAME))
    assert bus.answers == [("a{sv}", ({"Colours": Variant("as", ["red"])},))]


async def test_ping_is_answered_on_every_path() -> None:
    for path in (PATH, "/", "/elsewhere"):
        bus = await ask(call("Ping", path=path, interface="org.freedesktop.DBus.Peer"))
        assert bus.answers == [("", ())]


async def test_an_object_describes_itself() -> None:
    bus = await ask(call("Introspect", interface=INTROSPECTABLE))
    ((_, (xml,)),) = bus.answers
    node = ET.fromstring(str(xml))
    names = [interface.get("name") for interface in node]
    assert names == [NAME, "org.freedesktop.DBus.Peer", INTROSPECTABLE, PROPERTIES]
    echo_args = [arg.attrib for arg in node.findall(".//method[@name='Echo']/arg")]
    assert echo_args == [
        {"name": "in", "type": "s", "direction": "in"},
        {"name": "out", "type": "s", "direction": "out"},
    ]
    assert node.find(".//signal[@name='Happened']/arg[@type='a{sv}']") is not None
    assert node.find(".//property[@name='Colours'][@access='read']") is not None


async def test_paths_above_an_object_lead_to_it() -> None:
    path = ""
    for element in PATH.split("/")[1:]:
        bus = await ask(call("Introspect", path=path or "/", interface=INTROSPECTABLE))
        ((_, (xml,)),) = bus.answers
        node = ET.fromstring(str(xml))
        assert [child.get("name") for child in node.findall("node")] == [element]
        path += "/" + element


async def test_the_machine_has_an_id_or_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.api.dispatch._MACHINE_ID", PATH_OF_NOTHING)
    bus = await ask(call("GetMachineId", interface="org.freedesktop.DBus.Peer"))
    assert bus.errors == [(ERROR + "Failed", "this machine has no id")]
