"""Hello, waiting, the remembered verdicts, the budgets of bytes, broken messages."""

from collections.abc import Callable

import pytest

from broker.control_protocol.messages import SandboxLimits
from broker.supervisor.config import SYSTEM_LIMITS, ConfiguredLimits
from broker.wire.errors import PeerProtocolError, PeerQuotaError
from broker.wire.header import FIXED_SIZE, MAX_FIELDS, MessageType
from broker.wire.marshal import make_return
from broker.wire.reader import MAX_ARRAY
from tests.helpers.messages import NO_REPLY, access, big, call, changed, driver_call, names, signal
from tests.helpers.modelbus import ME, Dialogue

SENT_TO_A = access("send:org.a")
OWNERS = {"org.a": ":1.2", "org.b": ":1.3"}


# -- Hello ----------------------------------------------------------------------------------------


def test_hello_tells_who_the_connection_is() -> None:
    talk = Dialogue(hello=False)
    answer, acquired = talk.app(driver_call(1, "Hello"))
    assert answer.body == (ME,)
    assert acquired.text == "signal NameAcquired"
    assert talk.bus.identities == {ME: talk.host.identity}


@pytest.mark.parametrize("order", [bytes, big], ids=["little", "big"])
def test_hello_is_taken_in_both_byte_orders(order: Callable[[bytes], bytes]) -> None:
    talk = Dialogue(hello=False)
    assert names(talk.app(order(driver_call(1, "Hello")))) == ["return", "signal NameAcquired"]


def test_second_hello_is_refused_and_changes_nothing() -> None:
    talk = Dialogue()
    assert names(talk.app(driver_call(2, "Hello"))) == ["error Failed"]
    assert not talk.model.seen
    assert talk.state.unique_name == ME


def test_second_hello_is_refused_while_the_first_is_on_its_way() -> None:
    talk = Dialogue(hello=False)
    talk.paused = True
    assert names(talk.app(driver_call(1, "Hello"), driver_call(2, "Hello"))) == ["error Failed"]
    assert names(talk.resume()) == ["return", "signal NameAcquired"]


def test_hello_that_wants_no_reply_ends_the_connection() -> None:
    with pytest.raises(PeerProtocolError, match="Hello"):
        Dialogue(hello=False).app(driver_call(1, "Hello", flags=NO_REPLY))


def test_hello_that_the_bus_refuses_ends_the_connection() -> None:
    talk = Dialogue(hello=False)
    talk.model.refuse["Hello"] = ("org.freedesktop.DBus.Error.LimitsExceeded", "full")
    with pytest.raises(PeerQuotaError, match="LimitsExceeded"):
        talk.app(driver_call(1, "Hello"))


def test_driver_call_before_hello_is_denied() -> None:
    talk = Dialogue(hello=False)
    assert names(talk.app(driver_call(1, "GetId"))) == ["error AccessDenied"]
    assert not talk.model.seen
    assert not talk.app(driver_call(2, "GetId", flags=NO_REPLY))


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(call(1, "org.a"), id="call"),
        pytest.param(signal(1), id="broadcast"),
        pytest.param(make_return(1, reply_serial=1, destination=":1.2"), id="reply"),
        pytest.param(changed(driver_call(1, "Hello"), destination="org.a"), id="hello-to-other"),
    ],
)
def test_other_message_before_hello_ends_the_connection(message: bytes) -> None:
    with pytest.raises(PeerProtocolError, match="before Hello"):
        Dialogue(hello=False).app(message)


def test_calls_behind_hello_are_held_until_owners_are_known() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS, hello=False)
    talk.paused = True
    talk.app(driver_call(1, "Hello"), call(2, "org.a"), call(3, ":1.2"), call(4, "org.b"))
    assert talk.is_held()
    got = talk.resume()
    assert not talk.is_held()
    assert [m.header.destination for m in talk.arrived] == ["org.a", ":1.2"]
    assert names(got) == ["return", "signal NameAcquired", "error ServiceUnknown"]


def test_unique_name_is_not_judged_before_its_names_are_known() -> None:
    talk = Dialogue(access("send:", deny=["send:org.a"]), owners=OWNERS, hello=False)
    talk.paused = True
    talk.app(driver_call(1, "Hello"))
    # The bus answers Hello and nothing of what the gate asked behind it.
    talk.step()
    talk.app(call(2, ":1.2"))
    talk.resume()
    assert not talk.arrived
    assert names(talk.got)[-1] == "error ServiceUnknown"


# -- the order of what waits ------------------------------------------------------------------------


def test_messages_of_one_sender_keep_their_order_while_owners_are_asked_for() -> None:
    talk = Dialogue(access("send:", "receive:"), owners=OWNERS)
    known = signal(5, "Known", sender=":1.2")
    assert names(talk.deliver(known)) == ["signal Known"]
    talk.app(call(2, ":1.2"))
    (asked,) = talk.arrived
    talk.paused = True
    talk.app(call(3, "org.unknown"))
    assert talk.is_held()
    assert not talk.deliver(signal(6, "New", sender=":1.2"))
    assert not talk.deliver(known)
    assert not talk.reply(asked, sender=":1.2")
    assert names(talk.resume()) == [
        "signal New",
        "signal Known",
        "return",
        "error ServiceUnknown",
    ]


def test_what_waits_is_within_a_budget() -> None:
    talk = Dialogue(
        access("send:", "receive:"), owners=OWNERS, limits=SandboxLimits(bytes_queued=1000)
    )
    talk.paused = True
    talk.app(call(2, "org.unknown"))
    with pytest.raises(PeerQuotaError, match="too much"):
        for serial in range(1, 30):
            talk.deliver(signal(serial, sender=":1.2"))


def test_close_gives_up_each_descriptor_once() -> None:
    talk = Dialogue(access("send:", "receive:"), owners=OWNERS)
    talk.paused = True
    talk.app(call(2, "org.unknown"))
    talk.deliver(changed(signal(5, sender=":1.2"), unix_fds=2), fds=[10, 11])
    talk.app(changed(call(3, ":1.2"), unix_fds=1), fds=[12])
    assert sorted(talk.filter.close()) == [10, 11, 12]
    assert not talk.filter.close()


# -- remembered verdicts ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [bytes, big], ids=["little", "big"])
@pytest.mark.parametrize("flags", [0, 2, NO_REPLY, NO_REPLY | 4])
def test_repeated_call_is_passed_as_it_is(flags: int, order: Callable[[bytes], bytes]) -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    calls = [order(call(serial, "org.a", flags=flags)) for serial in range(2, 12)]
    talk.app(*calls)
    assert [m.raw for m in talk.arrived] == calls


def test_run_of_known_messages_is_one_slice() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(call(2, "org.a"))
    run = b"".join(call(serial, "org.a") for serial in range(3, 9))
    talk.filter.feed_app(run)
    assert talk.state.to_bus == [run]


def test_known_header_with_serial_zero_ends_the_connection() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(call(2, "org.a"))
    with pytest.raises(PeerProtocolError, match="serial 0"):
        talk.app(changed(call(3, "org.a"), serial=0))


def test_rule_swap_is_for_the_very_next_message() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(call(2, "org.a"), call(3, "org.a"))
    assert len(talk.arrived) == 2
    talk.use(access())
    assert names(talk.app(call(4, "org.a"))) == ["error ServiceUnknown"]
    assert len(talk.arrived) == 2
    talk.use(SENT_TO_A)
    talk.app(call(5, "org.a"))
    assert len(talk.arrived) == 3


def test_rule_swap_before_hello_counts() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS, hello=False)
    talk.use(access("send:org.b"))
    talk.app(driver_call(1, "Hello"))
    talk.app(call(2, "org.a"), call(3, "org.b"))
    assert [m.header.destination for m in talk.arrived] == ["org.b"]


def test_held_call_is_judged_by_the_rules_of_the_moment_it_goes_on() -> None:
    talk = Dialogue(access("send:"), owners={"org.x": ":1.9"})
    talk.paused = True
    talk.app(call(2, "org.x"))
    talk.use(access())
    assert names(talk.resume()) == ["error ServiceUnknown"]
    assert not talk.arrived


def test_remembered_verdicts_are_bounded() -> None:
    talk = Dialogue(access("send:org.a", "receive:"), owners=OWNERS)
    for n in range(2, 1500):
        talk.app(call(n, "org.a", f"M{n}", flags=NO_REPLY), call(n, "org.a", f"M{n}"))
        talk.deliver(signal(n, f"M{n}", sender=":1.2"))
        talk.reply(talk.model.calls[-1], sender=":1.2")
    state = talk.state
    for table in (
        state.verdicts.app_calls,
        state.verdicts.app_mute,
        state.verdicts.bus_signals,
        state.verdicts.bus_replies,
    ):
        assert 0 < len(table) <= 512


def test_header_that_is_very_long_is_not_remembered() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    talk.app(call(2, "org.a", path="/" + "a" * 1000))
    assert len(talk.arrived) == 1
    assert not talk.state.verdicts.app_calls


# -- budgets of bytes ------------------------------------------------------------------------------


def large(serial: int, size: int, destination: str = "org.a", flags: int = 0) -> bytes:
    return call(serial, destination, signature="s", values=("x" * size,), flags=flags)


def test_unfinished_message_is_counted_and_given_back() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    message = large(2, 5000)
    talk.app(message[:3000])
    assert talk.host.bytes_held == 3000
    assert not talk.model.seen
    talk.app(message[3000:])
    assert talk.host.bytes_held == 0
    assert [m.raw for m in talk.arrived] == [message]


@pytest.mark.parametrize("cut", [16, 20, 100, 4000])
def test_message_over_the_budget_is_refused_and_skipped(cut: int) -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS, limits=SandboxLimits(bytes_held=2000))
    data = large(2, 5000) + call(3, "org.a")
    talk.app(data[:cut])
    talk.app(data[cut:4500])
    talk.app(data[4500:])
    assert names(talk.got) == ["error LimitsExceeded"]
    assert [m.header.serial for m in talk.arrived] == [3]
    assert talk.host.bytes_held == 0


def test_message_over_the_budget_that_wants_no_reply_vanishes() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS, limits=SandboxLimits(bytes_held=2000))
    assert not talk.app(large(2, 5000, flags=NO_REPLY)[:3000])


def test_who_waits_for_a_reply_over_the_budget_is_told() -> None:
    talk = Dialogue(limits=SandboxLimits(bytes_held=2000))
    (asked,) = talk.deliver(changed(call(8, ME), sender=":1.2"))
    reply = changed(
        large(2, 5000),
        type=MessageType.METHOD_RETURN,
        reply_serial=asked.header.serial,
        destination=":1.2",
    )
    talk.app(reply[:3000])
    talk.app(reply[3000:])
    (told,) = talk.model.seen
    assert told.text == "error LimitsExceeded"
    assert (told.header.destination, told.header.reply_serial) == (":1.2", 8)


def test_other_connections_of_the_sandbox_share_the_budget() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS, limits=SandboxLimits(bytes_held=8000))
    message = large(2, 5000)
    talk.app(message[:3000])
    talk.host.bytes_held += 6000  # by another connection
    assert names(talk.app(message[3000:3010])) == ["error LimitsExceeded"]
    assert talk.host.bytes_held == 6000
    talk.app(message[3010:], call(3, "org.a"))
    assert [m.header.serial for m in talk.arrived] == [3]


def test_message_over_the_budget_with_descriptors_ends_the_connection() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS, limits=SandboxLimits(bytes_held=2000))
    with pytest.raises(PeerQuotaError, match="file descriptors"):
        talk.app(changed(large(2, 5000), unix_fds=1)[:3000], fds=[9])


# -- broken messages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "value"),
    [
        pytest.param(0, b"x", id="byte-order"),
        pytest.param(1, b"\0", id="type-0"),
        pytest.param(3, b"\2", id="version"),
        pytest.param(4, b"\xff\xff\xff\xff", id="body-length"),
        pytest.param(12, b"\xff\xff\xff\x7f", id="fields-length"),
        pytest.param(16, b"\0", id="field-0"),
    ],
)
def test_broken_message_ends_the_connection(at: int, value: bytes) -> None:
    message = call(2, "org.a")
    with pytest.raises(PeerProtocolError):
        Dialogue(SENT_TO_A, owners=OWNERS).app(message[:at] + value + message[at + len(value) :])


def test_message_of_unknown_type_is_ignored() -> None:
    talk = Dialogue(SENT_TO_A, owners=OWNERS)
    assert not talk.app(changed(call(2, "org.a"), type=9))
    assert not talk.deliver(changed(call(2, ME), type=9, sender=":1.2"))
    assert not talk.model.seen


def test_bug_9_budget_holds_the_largest_array_with_the_largest_header() -> None:
    # The body is an array of structs with its length and padding, beside a few other arguments.
    largest = FIXED_SIZE + MAX_FIELDS + 8 + MAX_ARRAY + 4096
    assert SandboxLimits().bytes_held >= largest
    assert ConfiguredLimits().for_sandbox().bytes_held >= largest
    assert SYSTEM_LIMITS.for_sandbox().bytes_held >= largest
