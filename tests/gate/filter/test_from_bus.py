"""What the bus delivers: replies to whoever asked, calls and signals by the rules, nothing forged."""

from collections.abc import Callable

import pytest

from broker.control_protocol.messages import SandboxLimits
from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL
from broker.wire import errors
from broker.wire.errors import PeerProtocolError
from broker.wire.interfaces import DRIVER
from broker.wire.marshal import make_error, make_return
from tests.helpers.messages import (
    NO_REPLY,
    Message,
    access,
    big,
    call,
    changed,
    driver_call,
    make_reply,
    names,
    signal,
)
from tests.helpers.modelbus import APP, ME, OTHER_APP, Dialogue, make_bus

OWNERS = {"org.a": ":1.2", "org.b": ":1.3"}
SENT_TO_A = access("send:org.a")
BOTH_ORDERS = pytest.mark.parametrize("order", [bytes, big], ids=["little", "big"])
Order = Callable[[bytes], bytes]


def from_peer(serial: int, sender: str = ":1.2", *, flags: int = 0, member: str = "Do") -> bytes:
    return changed(call(serial, ME, member, flags=flags), sender=sender)


# -- replies -----------------------------------------------------------------------------------------


@BOTH_ORDERS
@pytest.mark.parametrize("destination", ["org.a", ":1.2"])
def test_reply_comes_in_once_from_whom_was_asked(destination: str, order: Order) -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    for serial in (2, 3, 4):
        talk.app(call(serial, destination))
        asked = talk.arrived[-1]
        assert not talk.deliver(order(make_reply(asked, sender=":1.3", destination=ME)))
        assert names(talk.deliver(order(make_reply(asked, sender=":1.2", destination=ME)))) == [
            "return"
        ]
        assert not talk.deliver(order(make_reply(asked, sender=":1.2", destination=ME)))
    assert {denial.direction for denial in talk.host.denials} == {"receive"}


def test_forged_replies_of_a_known_shape_are_dropped() -> None:
    talk = Dialogue(access("send:"), owners=OWNERS)
    for serial, destination in enumerate(["org.a", "org.b"], 2):  # both shapes become known
        talk.app(call(serial, destination))
        talk.reply(talk.arrived[-1], sender=OWNERS[destination])
    talk.app(call(9, "org.a"))
    assert not talk.reply(talk.arrived[-1], sender=":1.3")
    assert not talk.deliver(make_return(8, reply_serial=77, sender=":1.2", destination=ME))
    assert names(talk.reply(talk.arrived[-1], sender=":1.2")) == ["return"]


def test_the_bus_may_answer_any_call_in_the_place_of_who_was_asked() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(call(2, "org.a"), call(3, ":1.2"))
    for serial in (2, 3):
        error = make_error(9, reply_serial=serial, name=errors.FAILED, text="", sender=DRIVER)
        assert names(talk.deliver(error, error)) == ["error Failed"]
    assert not talk.host.denials


def test_reply_of_the_bus_without_a_sender_is_the_buss() -> None:
    talk = Dialogue()
    talk.app(driver_call(2, "Peer"))
    talk.app(call(3, None, "Ping", interface="org.freedesktop.DBus.Peer"))
    assert names(talk.got) == ["error AccessDenied", "return"]
    talk.paused = True
    talk.app(call(4, None, "Ping", interface=None))
    assert names(talk.deliver(make_return(9, reply_serial=4))) == ["return"]


def test_former_owner_may_answer_what_it_was_asked() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(call(2, "org.a"), call(3, "org.a"), call(4, "org.a"))
    first, second, third = talk.arrived
    talk.change("org.a", ":1.3")
    assert names(talk.reply(first, sender=":1.2")) == ["return"]
    # The change may have come before the call reached the bus.
    assert names(talk.reply(second, sender=":1.3")) == ["return"]
    assert not talk.reply(third, sender=":1.4")
    talk.app(call(5, "org.a"))
    assert not talk.reply(talk.arrived[-1], sender=":1.2")


def test_owner_after_next_may_answer_too() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(call(2, "org.a"), call(FIRST_GATE_SERIAL + 9, "org.a"))
    talk.change("org.a", "")
    talk.change("org.a", ":1.4")
    for asked in talk.arrived:
        assert names(talk.reply(asked, sender=":1.4")) == ["return"]


def test_service_that_was_started_for_the_call_may_answer() -> None:
    talk = Dialogue(SENT_TO_A)
    talk.model.owners["org.a"] = "starting"  # so that the model does not answer itself
    talk.app(call(2, "org.a"))
    del talk.model.owners["org.a"]
    talk.change("org.a", ":1.4")
    assert names(talk.reply(talk.arrived[0], sender=":1.4")) == ["return"]


def test_reply_is_let_in_whatever_the_rules_say_by_then() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(call(2, "org.a"))
    talk.use(access(deny=["send+receive:"], receive_from_host=False))
    assert names(talk.reply(talk.arrived[0], sender=":1.2")) == ["return"]


def test_owner_is_followed_after_the_rules_forgot_the_name() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(call(2, "org.a"), call(FIRST_GATE_SERIAL + 9, "org.a"))
    talk.use(access())
    talk.change("org.a", ":1.4")
    for asked in talk.arrived:
        assert names(talk.reply(asked, sender=":1.4")) == ["return"]


def test_driver_answer_that_nobody_wanted_is_dropped_without_a_report() -> None:
    talk = Dialogue()
    talk.app(driver_call(2, "GetId", flags=NO_REPLY))
    assert not talk.deliver(make_return(9, reply_serial=2, sender=DRIVER, destination=ME))
    assert not talk.host.denials


def test_reply_to_a_waiting_call_of_the_gate_does_not_come_from_a_peer() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.paused = True
    talk.use(access("send:org.a", "send:org.b"))
    for serial in talk.state.pending.calls_to_bus:
        forged = make_return(
            9, reply_serial=serial, sender=":1.2", destination=ME, signature="s", values=(":1.2",)
        )
        assert not talk.deliver(forged)
    talk.resume()
    talk.app(call(3, ":1.2"), call(4, ":1.3"))
    assert len(talk.arrived) == 2


def test_unknown_fields_of_a_reply_are_stripped() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(call(2, "org.a"), call(FIRST_GATE_SERIAL + 9, "org.a"))
    for asked in talk.arrived:
        plain = make_reply(asked, sender=":1.2", destination=ME)
        # In front of the others, so that REPLY_SERIAL is not where a clean header has it.
        field = b"\x0a\x01o\0\x05\0\0\0/evil\0\0\0"
        size = int.from_bytes(plain[12:16], "little")
        longer = (size + len(field)).to_bytes(4, "little")
        (reply,) = talk.deliver(plain[:12] + longer + field + plain[16:])
        assert not reply.header.has_unknown
        assert reply.header.sender == ":1.2"
    assert [m.header.reply_serial for m in talk.got] == [2, FIRST_GATE_SERIAL + 9]


def test_reply_of_the_bus_in_another_form_ends_the_connection() -> None:
    talk = Dialogue()
    talk.paused = True
    talk.app(driver_call(2, "ListNames"))
    serial = max(talk.state.pending.calls_to_bus)
    with pytest.raises(PeerProtocolError, match="instead of"):
        talk.deliver(make_return(9, reply_serial=serial, sender=DRIVER, destination=ME))


def test_owner_change_in_another_form_is_dropped() -> None:
    talk = Dialogue(access("see:"))
    talk.subscribe()
    assert not talk.deliver(signal(8, "NameOwnerChanged", sender=DRIVER, interface=DRIVER))


def test_reply_with_descriptors_is_passed_whole() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(call(2, "org.a"), call(3, "org.a"))
    made = [changed(make_reply(m, sender=":1.2", destination=ME), unix_fds=2) for m in talk.arrived]
    got = talk.deliver(*made, fds=[5, 6, 7, 8])
    assert [m.fds for m in got] == [(5, 6), (7, 8)]


def test_reply_with_descriptors_that_the_app_cannot_take_becomes_an_error() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS, app_takes_fds=False)
    talk.app(call(2, "org.a"))
    reply = changed(make_reply(talk.arrived[0], sender=":1.2", destination=ME), unix_fds=2)
    (error,) = talk.deliver(reply, fds=[5, 6])
    assert (error.text, error.header.reply_serial) == ("error NotSupported", 2)
    assert (error.header.sender, error.header.unix_fds, error.fds) == (":1.2", 0, ())
    assert talk.host.closed == [5, 6]


# -- calls -------------------------------------------------------------------------------------------


@BOTH_ORDERS
def test_host_may_call_unless_the_list_says_otherwise(order: Order) -> None:
    talk = Dialogue()
    for serial in (8, 9):
        assert names(talk.deliver(order(from_peer(serial)))) == ["call Do"]
    talk = Dialogue(access(receive_from_host=False))
    for serial in (8, 9):
        assert not talk.deliver(order(from_peer(serial)))
    assert names(talk.model.seen) == ["error AccessDenied"] * 2
    assert [m.header.reply_serial for m in talk.model.seen] == [8, 9]
    assert talk.model.seen[0].header.destination == ":1.2"


def test_sandboxed_caller_needs_a_rule() -> None:
    talk = Dialogue(access("receive:,peer=same-app"))
    talk.bus.connected(":1.2", "c2", OTHER_APP)
    talk.bus.connected(":1.3", "c3", APP)
    assert not talk.deliver(from_peer(8, ":1.2"))
    assert names(talk.deliver(from_peer(8, ":1.3"))) == ["call Do"]


def test_attack_i1_backlog_of_one_that_hung_up_is_its_own() -> None:
    shared = make_bus()
    caller = Dialogue(shared=shared, me=":1.8", identity=OTHER_APP)
    rules = access("receive:,peer=host", "receive:@/app,peer=app:org.test/other")
    talk = Dialogue(rules, shared=shared)
    shared.members.discard(caller.state.verdicts)
    backlog = [from_peer(8, ":1.8"), changed(from_peer(9, ":1.8"), path="/app")]
    got = talk.deliver(*talk.model.hang_up(shared, ":1.8", *backlog))
    assert [(m.header.serial, m.header.path) for m in got] == [(9, "/app")]
    assert names(talk.model.seen) == ["error AccessDenied"]
    assert shared.who(":1.8") == "c1"


def test_nobody_of_a_sandbox_that_is_not_known_any_more_is_a_host() -> None:
    # Its messages come later than 4096 others have left, or its gate has died.
    shared = make_bus()
    shared.ledger.add(":1.8")
    rules = access("receive:,peer=host", "receive:,peer=app:org.test/other", "receive:org.a")
    talk = Dialogue(rules, shared=shared, owners={"org.a": ":1.8", "org.b": ":1.9"})
    talk.subscribe()
    assert len(talk.deliver(from_peer(8, ":1.9"), signal(9, sender=":1.9"))) == 2
    # A rule that is about nobody in particular lets it in, and its broadcasts nobody hears.
    assert names(talk.deliver(from_peer(8, ":1.8"), signal(9, sender=":1.8"))) == ["call Do"]
    talk.use(access("receive:,peer=host", "receive:,peer=app:org.test/other"))
    assert not talk.deliver(from_peer(10, ":1.8"), signal(11, destination=ME, sender=":1.8"))
    talk.use(access())
    assert not talk.deliver(from_peer(12, ":1.8"))


def test_guessed_name_that_says_hello_later_is_no_host_any_more() -> None:
    talk = Dialogue()
    assert len(talk.deliver(from_peer(8, ":1.8"), from_peer(9, ":1.8"))) == 2
    talk.bus.connected(":1.8", "c2", OTHER_APP)
    assert not talk.deliver(from_peer(10, ":1.8"))


def test_deny_by_name_of_the_caller() -> None:
    talk = Dialogue(access(deny=["receive:org.a"]), owners=OWNERS)
    assert not talk.deliver(from_peer(8, ":1.2"))
    assert len(talk.deliver(from_peer(8, ":1.3"), from_peer(9, ":1.3"))) == 2
    talk.change("org.a", ":1.3")
    assert not talk.deliver(from_peer(10, ":1.3"))
    assert len(talk.deliver(from_peer(11, ":1.2"))) == 1


def test_call_in_is_refused_in_the_apps_place_only_if_a_reply_is_wanted() -> None:
    talk = Dialogue(access(receive_from_host=False))
    assert not talk.deliver(from_peer(8, flags=NO_REPLY), signal(9, destination=ME, sender=":1.2"))
    assert not talk.model.seen
    assert [denial.direction for denial in talk.host.denials] == ["receive", "receive"]


def test_call_with_descriptors_that_the_app_cannot_take_is_refused() -> None:
    talk = Dialogue(app_takes_fds=False)
    talk.deliver(changed(from_peer(8), unix_fds=1), fds=[5])
    talk.deliver(changed(signal(9, destination=ME, sender=":1.2"), unix_fds=1), fds=[6])
    assert not talk.got
    assert names(talk.model.seen) == ["error NotSupported"]
    assert talk.host.closed == [5, 6]


def test_descriptors_come_in_with_their_message() -> None:
    talk = Dialogue(access("receive:"))
    got = talk.deliver(
        from_peer(7),
        changed(from_peer(8), unix_fds=1),
        changed(signal(9, sender=":1.2"), unix_fds=2),
        fds=[5, 6, 7],
    )
    assert [m.fds for m in got] == [(), (5,), (6, 7)]


def test_waiting_calls_of_others_have_a_budget() -> None:
    talk = Dialogue(limits=SandboxLimits(pending_calls=3))
    talk.model.uniques.add(":1.2")
    for serial in range(1, 6):
        talk.deliver(from_peer(serial))
    assert len(talk.got) == 3
    refused = [m.header.error_name for m in talk.model.seen if m.text.startswith("error")]
    assert refused == [errors.LIMITS_EXCEEDED] * 2
    talk.app(make_return(2, reply_serial=1, destination=":1.2"))
    assert len(talk.deliver(from_peer(6))) == 1


def test_callers_that_are_gone_do_not_use_the_budget_up() -> None:
    talk = Dialogue(limits=SandboxLimits(pending_calls=3))
    talk.model.uniques.add(":1.3")
    talk.deliver(from_peer(1, ":1.2"), from_peer(2, ":1.2"), from_peer(3, ":1.3"))
    assert not talk.deliver(from_peer(4, ":1.3"))
    assert len(talk.deliver(from_peer(5, ":1.3"), from_peer(6, ":1.3"))) == 2


def test_unknown_fields_of_a_call_or_signal_are_stripped() -> None:
    talk = Dialogue(access("receive:"))
    for message in (from_peer(8), signal(9, sender=":1.2"), from_peer(10)):
        (got,) = talk.deliver(changed(message, extra={10: ("o", "/evil")}))
        assert got.raw == message


# -- signals -----------------------------------------------------------------------------------------


@BOTH_ORDERS
def test_broadcast_comes_in_by_a_rule_even_from_the_host(order: Order) -> None:
    talk = Dialogue(access("receive:org.a@/ok"), owners=OWNERS)
    talk.subscribe()
    for serial in (8, 9):
        for sender, path in ((":1.2", "/ok"), (":1.2", "/no"), (":1.3", "/ok")):
            talk.deliver(order(signal(serial, sender=sender, path=path)))
    assert [(m.header.serial, m.header.path) for m in talk.got] == [(8, "/ok"), (9, "/ok")]


def test_broadcast_right_ends_with_the_rule() -> None:
    talk = Dialogue(access("receive:"))
    assert len(talk.deliver(signal(8, sender=":1.2"), signal(9, sender=":1.2"))) == 2
    talk.use(access())
    assert not talk.deliver(signal(10, sender=":1.2"))


def test_broadcast_of_a_sandboxed_app_is_judged_by_its_peer() -> None:
    talk = Dialogue(access("receive:,peer=host"))
    talk.bus.connected(":1.2", "c2", OTHER_APP)
    assert not talk.deliver(signal(8, sender=":1.2"))
    assert len(talk.deliver(signal(8, sender=":1.3"))) == 1


def test_broadcast_of_a_sandboxed_app_is_heard_by_whom_its_rules_say() -> None:
    shared = make_bus()
    rules = access("send:@/ok,peer=app:org.test/other", "send:@/all", receive_from_host=False)
    speaker = Dialogue(rules, shared=shared, me=":1.8")
    meant = Dialogue(access("receive:"), shared=shared, identity=OTHER_APP)
    others = Dialogue(access("receive:"), shared=shared, me=":1.9")
    for serial in (8, 9):
        for path in ("/ok", "/all", "/no"):
            message = signal(serial, sender=":1.8", path=path)
            meant.deliver(message)
            others.deliver(message)
    assert [m.header.path for m in meant.got] == ["/ok", "/all"] * 2
    assert [m.header.path for m in others.got] == ["/all"] * 2
    speaker.use(access("send:@/all"))
    assert len(meant.deliver(signal(10, sender=":1.8", path="/all"))) == 1
    speaker.use(access("send:@/all,peer=same-app"))
    assert not meant.deliver(signal(11, sender=":1.8", path="/all"))


def test_signal_of_the_bus_needs_a_rule_if_it_is_a_broadcast() -> None:
    changed_services = signal(8, "ActivatableServicesChanged", sender=DRIVER, interface=DRIVER)
    assert not Dialogue().deliver(changed_services)
    assert len(Dialogue(access("receive:org.freedesktop.DBus")).deliver(changed_services)) == 1


def test_peer_cannot_play_the_bus() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    forged = signal(
        8, "NameOwnerChanged", sender=":1.3", interface=DRIVER, values=("org.a", ":1.2", ":1.3")
    )
    assert not talk.deliver(forged)
    talk.app(call(2, ":1.3"), call(3, ":1.2"))
    assert [m.header.destination for m in talk.arrived] == [":1.2"]


def serials(messages: list[Message]) -> list[int]:
    return [message.header.serial for message in messages]


def test_known_and_new_messages_come_in_order() -> None:
    talk = Dialogue(access("receive:"))
    stream = [signal(serial, f"M{serial % 3}", sender=":1.2") for serial in range(1, 20)]
    assert serials(talk.deliver(*stream)) == list(range(1, 20))
