"""What an app sends: who may be called, how a refusal reads, serials, headers, descriptors, replies."""

from collections.abc import Callable

import pytest

from broker.control_protocol.messages import SandboxLimits
from broker.gate.filter.connection_state import REPLY_SERIAL
from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL
from broker.wire import errors
from broker.wire.errors import PeerProtocolError
from broker.wire.header import Flag
from broker.wire.interfaces import DRIVER
from broker.wire.marshal import make_return
from tests.helpers.messages import NO_REPLY, access, big, call, changed, driver_call, names, signal
from tests.helpers.modelbus import APP, ME, OTHER_APP, Dialogue

OWNERS = {"org.a": ":1.2", "org.a2": ":1.2", "org.b": ":1.3"}
SENT_TO_A = access("send:org.a")
BOTH_ORDERS = pytest.mark.parametrize("order", [bytes, big], ids=["little", "big"])
Order = Callable[[bytes], bytes]


# -- who may be called --------------------------------------------------------------------------------


@BOTH_ORDERS
@pytest.mark.parametrize(
    ("destination", "arrives"),
    [
        pytest.param("org.a", True, id="the-name"),
        pytest.param(":1.2", True, id="its-owner"),
        pytest.param("org.a2", True, id="other-name-of-its-owner"),
        pytest.param("org.b", False, id="another-name"),
        pytest.param(":1.3", False, id="another-owner"),
        pytest.param("org.absent", False, id="a-name-that-is-not-there"),
        pytest.param(":1.99", False, id="a-unique-name-that-is-not-there"),
    ],
)
def test_rule_with_a_name_is_about_whoever_owns_it(
    destination: str, arrives: bool, order: Order
) -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    for serial in (2, 3):
        talk.app(order(call(serial, destination)))
    assert len(talk.arrived) == (2 if arrives else 0)
    assert names(talk.got) == ([] if arrives else ["error ServiceUnknown"] * 2)


def test_deny_by_name_is_about_whoever_owns_it() -> None:
    talk = Dialogue(access("send:", deny=["send:org.a"]), owners=OWNERS)
    for serial, destination in enumerate(["org.a", ":1.2", "org.a2", "org.b"], 2):
        talk.app(call(serial, destination))
    assert [m.header.destination for m in talk.arrived] == ["org.b"]


def test_new_owner_gets_the_right_and_the_old_one_loses_it() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(call(2, ":1.2"), call(3, ":1.3"))
    talk.change("org.a", ":1.3")
    talk.app(call(4, ":1.2"), call(5, ":1.3"))
    assert [(m.header.serial, m.header.destination) for m in talk.arrived] == [
        (2, ":1.2"),
        (5, ":1.3"),
    ]


@pytest.mark.parametrize(
    "rule", ["send:,peer=app:org.test/other", "send:org.b,peer=app:org.test/other"]
)
def test_peer_is_who_owns_the_name(rule: str) -> None:
    talk = Dialogue(access(rule), owners=OWNERS)
    talk.bus.connected(":1.3", "c2", OTHER_APP)
    for serial, destination in enumerate(["org.a", ":1.2", "org.b", ":1.3"], 2):
        talk.app(call(serial, destination))
    assert [m.header.destination for m in talk.arrived] == ["org.b", ":1.3"]


def test_same_app_is_a_peer_of_its_own() -> None:
    talk = Dialogue(access("send:,peer=same-app"), owners=OWNERS)
    talk.bus.connected(":1.3", "c2", APP)
    talk.app(call(2, ":1.3"), call(3, ":1.2"))
    assert [m.header.serial for m in talk.arrived] == [2]


@pytest.mark.parametrize("destination", [":1.9", "org.late"])
def test_name_that_becomes_a_sandboxed_app_is_no_host_any_more(destination: str) -> None:
    talk = Dialogue(access("send:,peer=host"), owners={**OWNERS, "org.late": ":1.9"})
    talk.app(call(2, destination), call(3, destination))  # before anybody said Hello there
    talk.bus.connected(":1.9", "c2", OTHER_APP)
    talk.app(call(4, destination))
    assert [m.header.serial for m in talk.arrived] == [2, 3]


def test_absent_name_that_may_be_called_is_the_buss_to_answer() -> None:
    talk = Dialogue(access("send:org.absent"))
    assert names(talk.app(call(2, "org.absent"))) == ["error ServiceUnknown"]
    assert talk.got[0].header.serial != REPLY_SERIAL
    assert not talk.host.denials


def test_rule_with_interface_does_not_let_a_call_without_one_through() -> None:
    talk = Dialogue(access("send:org.a:org.example.I.*"), owners=OWNERS)
    talk.app(call(2, "org.a"), call(3, "org.a", interface=None))
    assert [m.header.serial for m in talk.arrived] == [2]


# -- refusals ----------------------------------------------------------------------------------------


def test_refusal_of_what_may_be_seen_says_why() -> None:
    talk = Dialogue(access("see:org.a", deny=["send:org.a"]), owners=OWNERS)
    (error,) = talk.app(call(2, "org.a"))
    assert error.header.error_name == errors.ACCESS_DENIED
    assert "org.example.I.Do" in str(error.body[0])
    assert "test-deny" in str(error.body[0])
    assert (error.header.sender, error.header.destination) == (DRIVER, ME)
    assert (error.header.serial, error.header.reply_serial) == (REPLY_SERIAL, 2)


@pytest.mark.parametrize("flags", [0, int(Flag.NO_AUTO_START)])
@pytest.mark.parametrize(
    ("hidden", "absent"),
    [
        pytest.param("org.b", "org.absent", id="name"),
        pytest.param(":1.3", ":1.99", id="unique-name"),
    ],
)
def test_hidden_is_worded_as_the_bus_words_absent(hidden: str, absent: str, flags: int) -> None:
    denied = Dialogue(owners=OWNERS).app(call(2, hidden, flags=flags))[0]
    told = Dialogue(access("send:"), owners=OWNERS).app(call(2, absent, flags=flags))[0]
    assert denied.header.error_name == told.header.error_name
    assert str(denied.body[0]).replace(hidden, absent) == told.body[0]
    assert denied.header.sender == told.header.sender


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(call(2, "org.b", flags=NO_REPLY), id="call"),
        pytest.param(signal(2, destination="org.b"), id="signal"),
        pytest.param(signal(2), id="broadcast"),
    ],
)
def test_refused_message_that_wants_no_reply_vanishes_and_is_reported(message: bytes) -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    for _ in range(3):
        assert not talk.app(message)
    assert not talk.sent
    assert len(talk.host.denials) == 3
    assert not talk.state.pending.calls_to_bus


def test_report_of_a_refusal_says_what_was_refused() -> None:
    talk = Dialogue(access(deny=["send:org.a"]), owners=OWNERS)
    talk.app(call(2, "org.a", path="/p"))
    (denial,) = talk.host.denials
    assert denial[:6] == ("send", "call", "org.a", "/p", "org.example.I", "Do")
    assert denial.origin == "test-deny"


# -- signals -----------------------------------------------------------------------------------------


def test_broadcast_goes_out_by_a_rule_without_name() -> None:
    talk = Dialogue(access("send:@/ok"))
    talk.app(signal(2, path="/ok"), signal(3, path="/ok"), signal(4, path="/no"))
    assert [m.header.serial for m in talk.model.seen] == [2, 3]


def test_broadcast_does_not_go_out_by_a_rule_with_a_name() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(signal(2))
    assert not talk.model.seen


def test_unicast_signal_is_judged_like_a_call() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(signal(2, destination="org.a"), signal(3, destination=":1.2"))
    talk.app(signal(4, destination="org.a"), signal(5, destination=":1.3"))
    assert [m.header.serial for m in talk.model.seen] == [2, 3, 4]


def test_signal_to_the_bus_itself_is_dropped() -> None:
    talk = Dialogue(access("send:"))
    forged = signal(2, "ActivationFailure", destination=DRIVER)
    assert not talk.app(changed(forged, unix_fds=1), fds=[7])
    assert not talk.model.seen
    assert talk.host.closed == [7]


# -- serials -----------------------------------------------------------------------------------------


@BOTH_ORDERS
@pytest.mark.parametrize("serial", [FIRST_GATE_SERIAL, FIRST_GATE_SERIAL + 1, 0xFFFFFFFF])
def test_serial_of_the_gates_range_is_translated_and_back(serial: int, order: Order) -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    for _ in range(2):
        talk.app(order(call(serial, "org.a")))
        (asked,) = talk.arrived
        assert not talk.reply(asked, sender=":1.3")
        (reply,) = talk.reply(asked, sender=":1.2")
        assert reply.header.reply_serial == serial
        assert not talk.reply(asked, sender=":1.2")
        talk.clear()


@BOTH_ORDERS
def test_driver_calls_serial_is_translated_and_back(order: Order) -> None:
    talk = Dialogue(access("see:org.a"), owners=OWNERS)
    for member in ("AddMatch", "GetNameOwner"):
        text = "" if member == "AddMatch" else "org.a"
        (reply,) = talk.app(order(driver_call(FIRST_GATE_SERIAL + 5, member, "s", text)))
        assert (reply.text, reply.header.reply_serial) == ("return", FIRST_GATE_SERIAL + 5)
    (reply,) = talk.app(order(driver_call(FIRST_GATE_SERIAL + 5, "ListNames")))
    assert reply.header.reply_serial == FIRST_GATE_SERIAL + 5


def test_hellos_serial_is_translated_and_back() -> None:
    talk = Dialogue(hello=False)
    reply = talk.app(driver_call(FIRST_GATE_SERIAL, "Hello"))[0]
    assert (reply.header.reply_serial, reply.body) == (FIRST_GATE_SERIAL, (ME,))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(signal, id="signal"),
        pytest.param(lambda serial: call(serial, "org.a", flags=NO_REPLY), id="no-reply"),
    ],
)
def test_other_serials_of_the_gates_range_are_translated(make: Callable[[int], bytes]) -> None:
    talk = Dialogue(access("send:"), owners=OWNERS)
    talk.app(make(5), make(FIRST_GATE_SERIAL + 100), make(6))
    first, translated, last = talk.model.seen[-3:]
    assert (first.header.serial, last.header.serial) == (5, 6)
    assert translated.header.serial not in (5, FIRST_GATE_SERIAL + 100)
    assert translated.header.member == first.header.member


def test_serial_of_the_gates_range_waits_once() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    serial = FIRST_GATE_SERIAL + 100
    assert names(talk.app(call(serial, "org.a"), call(serial, "org.a"))) == ["error AccessDenied"]
    (asked,) = talk.arrived
    (reply,) = talk.reply(asked, sender=":1.2")
    assert reply.header.reply_serial == serial
    assert not talk.state.pending.translated_serials
    talk.app(driver_call(serial, "GetId", flags=NO_REPLY))
    assert not talk.state.pending.translated_serials


def test_serial_of_a_waiting_call_of_the_gate_is_not_taken_for_the_apps() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.paused = True
    talk.use(access("send:org.a", "send:org.b"))
    waiting = next(iter(talk.state.pending.calls_to_bus))
    assert waiting >= FIRST_GATE_SERIAL
    talk.app(driver_call(waiting, "GetId"))
    (answer,) = talk.resume()
    assert (answer.text, answer.header.reply_serial) == ("return", waiting)


@BOTH_ORDERS
def test_serial_of_a_waiting_call_is_refused(order: Order) -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(call(2, "org.a"))
    for again in (call(2, "org.a"), driver_call(2, "GetId")):
        (error,) = talk.app(order(again))
        assert (error.text, error.header.reply_serial) == ("error AccessDenied", 2)
    assert len(talk.model.seen) == 1


def test_serial_may_be_used_again_when_its_call_was_answered() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    for _ in range(3):
        talk.app(call(2, "org.a"))
        assert names(talk.reply(talk.arrived[-1], sender=":1.2")) == ["return"]


def test_pending_calls_have_a_budget() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS, limits=SandboxLimits(pending_calls=3))
    talk.app(*(call(serial, "org.a") for serial in range(2, 7)))
    assert names(talk.got) == ["error LimitsExceeded"] * 2
    assert names(talk.app(driver_call(9, "GetId"))) == ["error LimitsExceeded"]
    assert not talk.app(call(10, "org.a", flags=NO_REPLY))
    talk.reply(talk.arrived[0], sender=":1.2")
    assert not talk.app(call(7, "org.a"))
    assert [m.header.serial for m in talk.arrived] == [2, 3, 4, 10, 7]


# -- headers -----------------------------------------------------------------------------------------


@BOTH_ORDERS
def test_what_an_app_may_not_say_is_stripped(order: Order) -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    plain = order(call(2, "org.a", signature="s", values=("body",)))
    forged = changed(plain, extra={10: ("o", "/evil"), 200: ("s", "x")}, sender=":1.9")
    for serial in (2, 3):
        talk.app(changed(forged, serial=serial, extra={10: ("o", "/evil")}))
        assert talk.arrived[-1].raw == changed(plain, serial=serial)


def test_reply_serial_on_a_call_or_signal_means_nothing() -> None:
    talk = Dialogue(access("send:"), owners=OWNERS)
    (asked,) = talk.deliver(changed(call(8, ME), sender=":1.2"))
    assert asked.header.serial == 8
    # A reader could take these for the reply; serialise_header would not write the field.
    field = b"\x05\x01u\0\x08\0\0\0"
    for message in (call(2, ":1.2"), signal(3, destination=":1.2")):
        size = int.from_bytes(message[12:16], "little") + 7 & ~7
        talk.app(message[:12] + (size + 8).to_bytes(4, "little") + message[16 : 16 + size] + field)
    assert [m.header.reply_serial for m in talk.model.seen] == [None, None]
    assert (":1.2", 8) in talk.state.pending.calls_to_app


def test_unknown_flags_are_masked() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    message = bytearray(call(2, "org.a"))
    message[2] = 0xF6
    talk.app(bytes(message))
    assert talk.arrived[0].header.flags == 6


def test_connection_that_asked_for_it_is_told_the_sandbox() -> None:
    talk = Dialogue(access("send:org.a"), owners=OWNERS)
    talk.app(call(2, "org.a"))
    talk.bus.wants_instance_field.add(":1.2")
    talk.state.verdicts.forget_all()
    for serial in (3, 4):
        talk.app(call(serial, "org.a"))
        assert b"/org/freedesktop/DBus/Containers1/c1\0" in talk.arrived[-1].raw
    assert b"Containers1" not in talk.arrived[0].raw


TAG = b"/org/freedesktop/DBus/Containers1/c1\0"


def test_attack_i2_name_that_nobody_owns_may_be_of_who_will_want_the_tag() -> None:
    talk = Dialogue(access("send:"), owners=OWNERS)
    talk.model.activatable.append("org.new")
    talk.app(call(2, "org.new"), call(3, "org.new", flags=NO_REPLY), call(4, "org.a"))
    assert [TAG in m.raw for m in talk.model.seen if m.header.destination == "org.new"] == [
        True
    ] * 2
    assert [TAG in m.raw for m in talk.arrived] == [False]


def test_attack_i2_while_anybody_wants_tags_whatever_could_reach_them_has_one() -> None:
    talk = Dialogue(access("send:"), owners=OWNERS)
    messages = (
        call(2, "org.a"),
        call(3, ":1.3"),
        call(4, "org.a", flags=NO_REPLY),
        signal(5),
        signal(6, destination="org.a"),
        signal(7, destination=":1.3"),
        signal(8, destination=":1.2"),
    )
    talk.app(*messages)
    assert not any(TAG in m.raw for m in talk.model.seen)
    talk.clear()
    # Somebody who owns none of these names yet.
    talk.bus.wants_instance_field.add(":1.2")
    talk.state.verdicts.forget_all()
    talk.change("org.a", ":1.4")
    for number in (100, 200):
        talk.app(*(changed(m, serial=number + n) for n, m in enumerate(messages)))
    said = [m for m in talk.model.seen if m.header.serial < 0xFFF00000]
    assert [TAG in m.raw for m in said] == [True, False, True, True, True, False, True] * 2


def test_proxy_tags_nothing() -> None:
    talk = Dialogue(access("send:"), owners=OWNERS)
    talk.bus.gives_instance_field = False
    talk.app(call(2, "org.new"))
    assert not any(TAG in m.raw for m in talk.model.seen)


# -- descriptors ---------------------------------------------------------------------------------------


def test_descriptors_go_with_their_message() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    first, second = (changed(call(n, "org.a"), unix_fds=n) for n in (1, 2))
    talk.app(call(9, "org.a"), first, second, call(10, "org.a"), fds=[5, 6, 7])
    assert [m.fds for m in talk.arrived] == [(), (5,), (6, 7), ()]
    assert not talk.host.closed


def test_refused_messages_descriptors_are_closed() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(changed(call(2, "org.b"), unix_fds=1), fds=[5])
    talk.app(changed(signal(3), unix_fds=1), fds=[6])
    talk.app(changed(signal(3, destination="org.b"), unix_fds=1), fds=[7])
    talk.app(changed(driver_call(4, "GetId"), unix_fds=1), fds=[8])
    talk.app(changed(make_return(5, reply_serial=9, destination=":1.2"), unix_fds=1), fds=[9])
    talk.app(changed(call(6, "org.a"), unix_fds=1, type=9), fds=[10])
    assert talk.host.closed == [5, 6, 7, 8, 9, 10]


def test_waiting_messages_descriptors_are_closed_once() -> None:
    talk = Dialogue(access("send:"), owners={"org.x": ":1.9"})
    talk.paused = True
    talk.app(changed(driver_call(2, "StartServiceByName", "su", "org.x", 0), unix_fds=1), fds=[5])
    assert talk.is_held()
    assert not talk.host.closed
    assert names(talk.resume()) == ["return"]
    assert talk.host.closed == [5]
    assert not talk.filter.close()


def test_too_many_descriptors_are_refused() -> None:
    talk = Dialogue(access("send:"), owners=OWNERS)
    (error,) = talk.app(changed(call(2, "org.a"), unix_fds=17), fds=range(100, 117))
    assert error.text == "error LimitsExceeded"
    assert not talk.app(changed(signal(3), unix_fds=17), fds=range(200, 217))
    assert talk.host.closed == [*range(100, 117), *range(200, 217)]


@pytest.mark.parametrize(
    ("announced", "came", "negotiated", "why"),
    [
        pytest.param(2, 1, True, "2 descriptors, 1 came", id="too-few"),
        pytest.param(0xFFFFFFFF, 1, True, "descriptors, 1 came", id="absurd"),
        pytest.param(1, 0, True, "1 descriptors, 0 came", id="none"),
        pytest.param(0, 1, True, "belong to no message", id="unannounced"),
        pytest.param(1, 2, True, "belong to no message", id="left-over"),
        pytest.param(1, 1, False, "not negotiated", id="not-negotiated"),
        pytest.param(0, 300, True, "than any message", id="in-bulk"),
    ],
)
def test_wrong_number_of_descriptors_ends_the_connection(
    announced: int, came: int, negotiated: bool, why: str
) -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS, app_takes_fds=negotiated)
    message = changed(call(2, "org.a"), unix_fds=announced)
    fds = list(range(50, 50 + came))
    with pytest.raises(PeerProtocolError, match=why):
        talk.filter.feed_app(message, fds)
    passed = [fd for item in talk.state.to_bus if not isinstance(item, bytes) for fd in item.fds]
    assert sorted([*talk.filter.close(), *talk.host.closed, *passed]) == fds


def test_the_app_itself_is_no_host() -> None:
    """A rule about hosts says nothing of a name that the app has taken over from one."""
    rules = access("send:,peer=host", "own:org.a", receive_from_host=False)
    talk = Dialogue(rules, owners={"org.a": ":1.2"})
    talk.app(call(5, "org.a"))
    assert len(talk.arrived) == 1
    talk.change("org.a", ME)
    talk.arrived.clear()
    (refused,) = talk.app(call(6, "org.a"))
    assert refused.header.error_name in (errors.ACCESS_DENIED, errors.SERVICE_UNKNOWN)
    assert not talk.arrived
