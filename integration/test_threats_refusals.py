"""Threats C27 to C30: flags, how a refusal looks, and who is let in."""

import pytest

from broker.wire.header import Flag, MessageType
from integration.harness.messages import make_header, make_message
from integration.harness.rawclient import BUS, RawClient
from integration.harness.stage import (
    DENIED,
    INTERFACE,
    PASSED,
    PATH,
    UNKNOWN,
    Stage,
    arrivals,
    call,
    settle,
    signal,
)
from integration.harness.threats import Scene

ABSENT = "org.example.Absent"
ABSENT_UNIQUE = ":1.4000000"


@pytest.fixture
def stage(scene: Scene) -> Stage:
    """More apps and hosts, on the same gate."""
    return Stage(scene.warden)


def test_c27_flags_are_passed_as_far_as_they_are_known(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    for flags in (0xFC, Flag.ALLOW_INTERACTIVE_AUTHORIZATION, 0xF8, 0):
        header = make_header(
            MessageType.METHOD_CALL,
            app.next_serial(),
            path=PATH,
            interface=INTERFACE,
            member="Do",
            destination=name,
        )
        data = bytearray(make_message(header))
        data[2] = flags
        app.send_raw(bytes(data))
        got = host.wait_call("Do")
        assert got.header.flags == flags & Flag.ALLOW_INTERACTIVE_AUTHORIZATION
        host.reply(got)
        assert app.wait_reply(header.serial).error is None


def test_c28_refused_calls_that_want_no_reply_leave_nothing(scene: Scene, stage: Stage) -> None:
    name = stage.name()
    host, client = stage.host(name), scene.attack()
    header = make_header(
        MessageType.METHOD_CALL,
        7,
        flags=Flag.NO_REPLY_EXPECTED,
        path=PATH,
        interface=INTERFACE,
        member="Do",
        destination=name,
    )
    for _ in range(10):
        client.send_raw(make_message(header) * 500)
        settle(client)
    assert arrivals(client) == []
    assert arrivals(host) == []


def _error_of(client: RawClient, name: str, flags: int = 0) -> tuple[object, ...]:
    """Return all that an error tells, but its serials and who asked."""
    reply = client.call(name, PATH, INTERFACE, "Do", flags=flags)
    header = reply.header
    assert header.destination == client.unique_name
    text = str(reply.values[0]).replace(name, "NAME")
    return header.type, header.sender, header.flags, header.signature, header.error_name, text


@pytest.mark.parametrize("rules", [(), ("send:org.example.Else",), ("send:,peer=same-app",)])
def test_c29_hidden_is_as_absent(stage: Stage, rules: tuple[str, ...]) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(*rules)
    for flags in (0, Flag.NO_AUTO_START):
        for hidden, absent in ((name, ABSENT), (host.unique_name, ABSENT_UNIQUE)):
            told = _error_of(app, hidden, flags)
            assert told[1] == BUS
            assert told == _error_of(app, absent, flags)
            known = _error_of(host, absent, flags)
            assert (told[0], told[1], *told[3:]) == (known[0], known[1], *known[3:])
    # Answers come in the order of the questions, whichever it is that they are about.
    serials = [app.start_call(each, PATH, INTERFACE, "Do") for each in (ABSENT, name) * 5]
    settle(app)
    assert [each.header.reply_serial for each in app.queue if each.error] == serials


@pytest.mark.parametrize("from_host", [True, False])
def test_c30_callers_are_let_in_or_not_and_seen_while_they_live(
    stage: Stage, *, from_host: bool
) -> None:
    host, app = stage.host(), stage.app(from_host=from_host)
    name = host.unique_name
    assert call(app, host, name) == UNKNOWN
    assert call(host, app, app.unique_name) == (PASSED if from_host else DENIED)
    assert signal(host, app, app.unique_name) is from_host
    assert app.driver("NameHasOwner", "s", name) == (from_host,)
    assert call(app, host, name) == (DENIED if from_host else UNKNOWN)
    host.close()
    while stage.warden.host.driver("NameHasOwner", "s", name)[0]:
        pass
    assert app.driver("NameHasOwner", "s", name) == (False,)
    assert app.call(name, PATH, INTERFACE, "Do").error == UNKNOWN
