"""Rules on real buses: a reply passes exactly once, for a call that waits for it, whatever the rules say then."""

import pytest

from broker.wire.header import Flag, MessageType
from integration.harness.buses import DAEMON
from integration.harness.messages import Message, make_header, make_message
from integration.harness.rawclient import RawClient
from integration.harness.stage import INTERFACE, PASSED, PATH, Stage, arrivals, call, settle

WISHED = "org.example.Error.Wished"


def _forge(
    sender: RawClient, destination: str, serial: int, *, error: str | None = None, flags: int = 0
) -> None:
    """Send a reply out of the blue."""
    header = make_header(
        MessageType.ERROR if error else MessageType.METHOD_RETURN,
        sender.next_serial(),
        flags=flags,
        error_name=error,
        reply_serial=serial,
        destination=destination,
        signature="s",
    )
    sender.send_raw(make_message(header, ("forged",)))
    settle(sender)


def _wait_call(client: RawClient) -> Message:
    return client.wait_call("Do")


# replies to apps


@pytest.mark.parametrize("error", [None, WISHED])
def test_reply_comes_once(stage: Stage, error: str | None) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    serial = app.start_call(name, PATH, INTERFACE, "Do")
    got = _wait_call(host)
    for _ in range(3):
        host.reply(got, "s", ("real",), error=error)
    settle(host)
    replies = arrivals(app)
    assert [(each.header.reply_serial, each.values) for each in replies] == [(serial, ("real",))]
    assert replies[0].error == error


def test_forged_reply_of_another_does_not_come(stage: Stage) -> None:
    name = stage.name()
    host, forger = stage.host(name), stage.host()
    app = stage.app("send+receive:")
    serial = app.start_call(name, PATH, INTERFACE, "Do")
    got = _wait_call(host)
    for flags in (0, Flag.NO_REPLY_EXPECTED):
        _forge(forger, app.unique_name, serial, flags=flags)
        _forge(forger, app.unique_name, serial, error=WISHED, flags=flags)
    assert arrivals(app) == []
    host.reply(got, "s", ("real",))
    assert app.wait_reply(serial).values == ("real",)


def test_reply_that_nobody_asked_for_does_not_come(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app("send+receive:")
    assert call(app, host, name) == PASSED
    for serial in (1, app.next_serial() - 1, app.next_serial() + 5):
        _forge(host, app.unique_name, serial)
        _forge(host, app.unique_name, serial, error=WISHED)
    assert arrivals(app) == []


def test_reply_to_a_call_that_wants_none_does_not_come(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    app.start_call(name, PATH, INTERFACE, "Do", flags=Flag.NO_REPLY_EXPECTED)
    host.reply(_wait_call(host), "s", ("unwanted",))
    settle(host)
    assert arrivals(app) == []


def test_forged_reply_for_the_bus_does_not_come(stage: Stage) -> None:
    forger, app = stage.host(), stage.app("send+receive:")
    # Serials of the gate's own calls, and of Hello.
    for serial in (1, 0xFFFFFF00, 0xFFFFFFFF, 0xFFFF0000, 0xFFFFFFFE):
        _forge(forger, app.unique_name, serial)
    assert arrivals(app) == []
    assert app.driver("GetId")


def test_forged_replies_are_reported(stage: Stage) -> None:
    forger, app = stage.host(), stage.app()
    _forge(forger, app.unique_name, 77)
    settle(app)
    # dbus-broker does not deliver them in the first place.
    expected = [(forger.unique_name, "reply")] if stage.warden.bus.kind == DAEMON else []
    assert [(each["peer"], each["kind"]) for each in stage.denials(app)] == expected


def test_reply_comes_after_the_rules_are_gone(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    serial = app.start_call(name, PATH, INTERFACE, "Do")
    got = _wait_call(host)
    stage.set_rules(app, deny=["send+receive+see+own:"])
    host.reply(got, "s", ("late",))
    assert app.wait_reply(serial).values == ("late",)


def test_reply_comes_from_who_was_asked_after_the_name_moved(stage: Stage) -> None:
    name = stage.name()
    first, second, app = stage.host(name), stage.host(), stage.app(f"send:{name}")
    serial = app.start_call(name, PATH, INTERFACE, "Do")
    got = _wait_call(first)
    assert first.release_name(name) == 1
    assert second.request_name(name) == 1
    first.reply(got, "s", ("from the first",))
    assert app.wait_reply(serial).values == ("from the first",)


def test_error_comes_when_the_callee_leaves(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    serial = app.start_call(name, PATH, INTERFACE, "Do")
    _wait_call(host)
    host.close()
    assert app.wait_reply(serial).error == "org.freedesktop.DBus.Error.NoReply"


def test_replies_find_their_calls_in_any_order(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}")
    serials = [app.start_call(name, PATH, INTERFACE, "Do", "s", (str(n),)) for n in range(50)]
    calls = [_wait_call(host) for _ in serials]
    for each in reversed(calls):
        host.reply(each, "s", each.values)
    for number, serial in enumerate(serials):
        assert app.wait_reply(serial).values == (str(number),)


# replies of apps


def test_reply_of_an_app_goes_out_once(stage: Stage) -> None:
    host, app = stage.host(), stage.app()
    serial = host.start_call(app.unique_name, PATH, INTERFACE, "Do")
    got = _wait_call(app)
    for _ in range(3):
        app.reply(got, "s", ("real",))
    settle(app)
    replies = arrivals(host)
    assert [(each.header.reply_serial, each.values) for each in replies] == [(serial, ("real",))]
    assert {(each["direction"], each["kind"]) for each in stage.denials(app)} == {("send", "reply")}


def test_app_cannot_answer_what_it_was_not_asked(stage: Stage) -> None:
    name = stage.name()
    asker, callee, app = stage.host(), stage.host(name), stage.app("send+receive:")
    serial = asker.start_call(name, PATH, INTERFACE, "Do")
    got = _wait_call(callee)
    _forge(app, asker.unique_name, serial)
    _forge(app, asker.unique_name, serial, error=WISHED)
    _forge(app, name, serial)
    assert arrivals(asker) == []
    assert arrivals(callee) == []
    callee.reply(got, "s", ("real",))
    assert asker.wait_reply(serial).values == ("real",)


def test_app_answers_under_rules_that_came_since(stage: Stage) -> None:
    host, app = stage.host(), stage.app()
    serial = host.start_call(app.unique_name, PATH, INTERFACE, "Do")
    got = _wait_call(app)
    stage.set_rules(app, deny=["send+receive+see:"])
    app.reply(got, "s", ("late",))
    assert host.wait_reply(serial).values == ("late",)


def test_refused_call_cannot_be_answered(stage: Stage) -> None:
    host, app = stage.host(), stage.app(from_host=False)
    serial = host.start_call(app.unique_name, PATH, INTERFACE, "Do")
    assert host.wait_reply(serial).error == "org.freedesktop.DBus.Error.AccessDenied"
    _forge(app, host.unique_name, serial)
    assert arrivals(host) == []


def test_forged_reply_between_sandboxes_does_not_come(stage: Stage) -> None:
    name = stage.name()
    callee = stage.owner(name)
    app, forger = stage.app("send:"), stage.app("send+receive:", app="org.example.Forger")
    serial = app.start_call(name, PATH, INTERFACE, "Do")
    got = _wait_call(callee)
    _forge(forger, app.unique_name, serial)
    assert arrivals(app) == []
    callee.reply(got, "s", ("real",))
    assert app.wait_reply(serial).values == ("real",)
