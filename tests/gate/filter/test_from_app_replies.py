"""What an app answers: one reply to each call that waits for it, and nothing else."""

from collections.abc import Callable

import pytest

from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL
from broker.wire.header import MessageType
from broker.wire.interfaces import DRIVER
from broker.wire.marshal import make_error, make_return
from tests.helpers.messages import NO_REPLY, access, big, call, changed, names
from tests.helpers.modelbus import ME, Dialogue

OWNERS = {"org.a": ":1.2", "org.b": ":1.3"}
BOTH_ORDERS = pytest.mark.parametrize("order", [bytes, big], ids=["little", "big"])
Order = Callable[[bytes], bytes]


def answer(serial: int, asked: int, caller: str = ":1.2") -> bytes:
    return make_return(serial, reply_serial=asked, destination=caller)


@BOTH_ORDERS
def test_reply_goes_out_once_for_a_call_that_waits(order: Order) -> None:
    talk = Dialogue()
    for asked in (8, 9, 10):
        talk.deliver(changed(call(asked, ME), sender=":1.2"))
        talk.app(order(answer(2, asked)), order(answer(3, asked)))
    assert [m.header.reply_serial for m in talk.model.seen] == [8, 9, 10]
    assert [denial.kind for denial in talk.host.denials] == ["reply"] * 3


def test_two_callers_may_use_one_serial() -> None:
    talk = Dialogue()
    talk.deliver(changed(call(8, ME), sender=":1.2"), changed(call(8, ME), sender=":1.3"))
    talk.app(answer(2, 8, ":1.3"), answer(3, 8, ":1.2"), answer(4, 8, ":1.2"))
    assert [m.header.destination for m in talk.model.seen] == [":1.3", ":1.2"]


@pytest.mark.parametrize(
    "forged",
    [
        pytest.param(answer(2, 9), id="other-serial"),
        pytest.param(answer(2, 8, ":1.3"), id="other-caller"),
        pytest.param(answer(2, 8, "org.a"), id="name-of-the-caller"),
        pytest.param(make_return(2, reply_serial=8), id="no-destination"),
        pytest.param(answer(2, 8, DRIVER), id="bus"),
        pytest.param(
            make_error(2, reply_serial=9, name="a.b", text="", destination=":1.2"), id="error"
        ),
    ],
)
def test_reply_that_nobody_waits_for_is_dropped(forged: bytes) -> None:
    talk = Dialogue(access("send:"), owners=OWNERS)
    talk.deliver(changed(call(7, ME), sender=":1.2"), changed(call(8, ME), sender=":1.2"))
    talk.app(answer(2, 7))  # from here on this shape is known
    assert not talk.app(forged)
    assert len(talk.model.seen) == 1


def test_call_that_wants_no_reply_gets_none() -> None:
    talk = Dialogue()
    for serial in (8, 9):
        talk.deliver(changed(call(serial, ME, flags=NO_REPLY), sender=":1.2"))
        talk.app(answer(2, serial))
    assert not talk.model.seen


def test_reply_is_let_out_whatever_the_rules_say_by_then() -> None:
    talk = Dialogue()
    talk.deliver(changed(call(8, ME), sender=":1.2"))
    talk.use(access(deny=["send+receive:"], receive_from_host=False))
    talk.app(answer(2, 8))
    assert names(talk.model.seen) == ["return"]


def test_reply_with_descriptors_and_an_odd_serial_is_passed_clean() -> None:
    talk = Dialogue()
    talk.deliver(changed(call(8, ME), sender=":1.2"))
    talk.app(
        changed(
            answer(FIRST_GATE_SERIAL + 1, 8), unix_fds=1, sender=":1.9", extra={11: ("s", "x")}
        ),
        fds=[5],
    )
    (reply,) = talk.model.seen
    assert reply.fds == (5,)
    assert not reply.header.has_unknown
    assert reply.header.sender is None


def test_shapes_of_one_length_do_not_hide_each_other() -> None:
    # Two shapes of one length, with REPLY_SERIAL at different places: both must stay right.
    talk = Dialogue()
    plain = changed(answer(2, 1), path="/aaaa")
    for asked in range(8, 20):
        talk.deliver(changed(call(asked, ME), sender=":1.2"))
        moved = changed(
            plain, reply_serial=asked, type=MessageType.METHOD_RETURN, path="/a" * (1 + asked % 2)
        )
        talk.app(moved, moved)
    assert [m.header.reply_serial for m in talk.model.seen] == list(range(8, 20))
    places = talk.state.verdicts.app_reply_at
    for shape in talk.state.verdicts.app_replies:
        assert len(shape) + 16 in places
