"""How a bus that labels is talked to: its description read, bodies made and read."""

import contextlib
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from broker.bus.values import Variant, pack, unpack
from broker.control_protocol.messages import Called, SandboxSpec
from broker.engines.containers1_dialect import (
    ADD_TAKES,
    COMPONENT,
    MAX_DESCRIPTION,
    Dialect,
    make_add_body,
    parse_dialect,
    read_address,
    read_arguments,
    read_instance,
)
from broker.wire.errors import CallRefusedError
from policy.rules import Identity
from tests.helpers.fake_driver import FakeDriver
from tests.helpers.records import make_record, make_state

# As the real one puts it, where it matters.
REAL = """<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"
"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">
<node>
  <interface name="org.freedesktop.DBus.Containers1">
    <method name="AddServer">
      <arg direction="in" type="s"/>
      <arg direction="in" type="s"/>
      <arg direction="in" type="a{sv}"/>
      <arg direction="in" type="a{sv}"/>
      <arg direction="out" type="o"/>
      <arg direction="out" type="ay"/>
      <arg direction="out" type="s"/>
    </method>
    <method name="StopInstance">
      <arg direction="in" type="o"/>
    </method>
    <method name="StopListening">
      <arg direction="in" type="o"/>
    </method>
    <method name="RequestHeader">
    </method>
    <signal name="InstanceRemoved">
      <arg type="o"/>
    </signal>
    <property name="SupportedArguments" type="as" access="read"/>
  </interface>
</node>
"""
PLAIN = Dialect(
    add="AddServer",
    stop="StopInstance",
    stop_listening="StopListening",
    set_access="",
    arguments=frozenset(),
)


def make_spec(**changes: Any) -> SandboxSpec:
    return msgspec.structs.replace(make_state(make_record()).spec, **changes)


def test_the_description_of_the_real_one_is_read() -> None:
    assert parse_dialect(REAL, ()) == PLAIN


def test_the_names_of_the_proposal_are_read() -> None:
    driver = FakeDriver(
        add="AddContainerServer",
        stop="RemoveContainerServer",
        stop_listening="",
        set_access="SetContainerAccess",
    )
    assert parse_dialect(driver.xml, ["Allow"]) == Dialect(
        add="AddContainerServer",
        stop="RemoveContainerServer",
        stop_listening="",
        set_access="SetContainerAccess",
        arguments=frozenset({"Allow"}),
    )


@pytest.mark.parametrize(
    "xml",
    [
        "<node/>",
        f"<node><node>{REAL.partition('<node>')[2]}</node>",
        REAL.replace("Containers1", "Containers2"),
        REAL.replace("AddServer", "Add"),
        REAL.replace("StopInstance", "Stop"),
        REAL.replace('type="ay"', 'type="s"'),
        REAL.replace('direction="in" type="o"', 'direction="in" type="s"'),
        FakeDriver(mode="none").xml,
    ],
)
def test_another_interface_is_none_that_we_know(xml: str) -> None:
    assert parse_dialect(xml, ()) is None


@pytest.mark.parametrize(
    ("xml", "why"),
    [
        ("", "no element found"),
        ("nonsense", "syntax error"),
        ("<node>", "no element found"),
        ("<node></interface>", "mismatched tag"),
        (REAL + "<node/>", "junk after document element"),
        (REAL.replace("<node>", "<node>&x;").replace("<!DOCTYPE", "<!DOCTYP"), "syntax error"),
        ("<!DOCTYPE node [<!ENTITY a 'b'>]><node>&a;</node>", "declares elements of its own"),
        ("<!DOCTYPE node SYSTEM 'x' [<!ATTLIST node a CDATA 'b'>]><node/>", "declares elements"),
        (REAL + " " * MAX_DESCRIPTION, f"of {MAX_DESCRIPTION} at most"),
    ],
)
def test_what_is_no_description_is_refused_in_one_line(xml: str, why: str) -> None:
    with pytest.raises(CallRefusedError, match=why) as caught:
        parse_dialect(xml, ())
    assert "\n" not in str(caught.value)


def test_a_description_may_be_as_long_as_is_said() -> None:
    assert parse_dialect(REAL.ljust(MAX_DESCRIPTION), ()) == PLAIN


CONTAINERS1 = '<node><interface name="org.freedesktop.DBus.Containers1">'


@pytest.mark.parametrize(
    "piece",
    ["<method name='a'>", "<method name='a'><arg type='s'/></method>", "<a>", "&amp;", "<!--", "<"],
)
def test_the_longest_nonsense_is_read_at_once(piece: str) -> None:
    begun = time.process_time()
    with contextlib.suppress(CallRefusedError):
        parse_dialect(CONTAINERS1 + piece * ((MAX_DESCRIPTION - 100) // len(piece)), ())
    assert time.process_time() - begun < 1


@given(st.text(max_size=200) | st.text("<>/=\"' abn!&;[]", max_size=200))
def test_any_description_is_read_or_refused(text: str) -> None:
    for xml in (text, f"{CONTAINERS1}{text}</interface></node>"):
        with contextlib.suppress(CallRefusedError):
            parse_dialect(xml, ())


KEYS = st.text("abc.", min_size=1, max_size=8)
VALUES = st.one_of(
    st.builds(lambda text: Variant("s", text), st.text("xyz", max_size=12)),
    st.builds(lambda number: Variant("t", number), st.integers(0, 2**64 - 1)),
    st.builds(lambda data: Variant("ay", data), st.binary(max_size=20)),
)


@given(
    st.text("ab", max_size=9),
    st.dictionaries(KEYS, VALUES, max_size=4),
    st.none() | st.text("cd", min_size=1, max_size=9),
)
def test_the_body_says_what_it_should(
    app: str, metadata: dict[str, Variant], component: str | None
) -> None:
    identity = Identity(type="org.example.T", app=app, component=component)
    spec = make_spec(identity=identity, metadata=pack("a{sv}", [metadata]))
    more = {} if component is None else {COMPONENT: Variant("s", component)}
    expected = ["org.example.T", app, metadata | more, {}]
    body = make_add_body(spec, "session", PLAIN)
    assert unpack(ADD_TAKES, body) == expected
    assert body == pack(ADD_TAKES, expected)


@pytest.mark.parametrize("component", [None, "right"])
def test_nobody_else_says_what_the_component_is(component: str | None) -> None:
    identity = Identity(type="org.example.T", app="a", component=component)
    metadata = pack("a{sv}", [{COMPONENT: Variant("s", "wrong"), "k": Variant("s", "v")}])
    body = make_add_body(make_spec(identity=identity, metadata=metadata), "session", PLAIN)
    (_, _, given_metadata, _) = unpack(ADD_TAKES, body)
    ours = {} if component is None else {COMPONENT: Variant("s", component)}
    assert given_metadata == {"k": Variant("s", "v"), **ours}


def test_no_metadata_at_all() -> None:
    body = make_add_body(make_spec(metadata=b""), "session", PLAIN)
    assert unpack(ADD_TAKES, body)[2:] == [{}, {}]


def called(signature: str, *values: Any) -> Called:
    return Called(signature=signature, body=pack(signature, values), little=True)


def test_what_was_added_is_read() -> None:
    answer = called("oays", "/i", b"/socket\0", "unix:path=/socket,guid=" + "0" * 32)
    assert read_instance(answer) == "/i"
    assert read_address(answer) == "unix:path=/socket,guid=" + "0" * 32


@pytest.mark.parametrize(
    "answer",
    [
        called("s", "x"),
        called("oay", "/i", b"/socket\0"),
        Called(signature="oays", body=b"\xff" * 8, little=True),
        Called(signature="oays", body=b"", little=True),
    ],
)
def test_nonsense_is_refused(answer: Called) -> None:
    with pytest.raises(CallRefusedError):
        read_address(answer)


def test_supported_arguments() -> None:
    assert read_arguments(called("v", Variant("as", ["Allow", "X"]))) == ["Allow", "X"]
    with pytest.raises(CallRefusedError):
        read_arguments(called("v", Variant("s", "Allow")))


def test_an_instance_is_found_in_an_answer_of_another_form() -> None:
    assert read_instance(called("o", "/i")) == "/i"
    assert read_instance(called("s", "/i")) == ""
    assert read_instance(Called(signature="oays", body=b"", little=True)) == ""
