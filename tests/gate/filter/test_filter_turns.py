"""A filter that lets others have their turn, counts what messages cost, and knows of half ones."""

import pytest

from broker.gate.filter.costs import BYTES_A_MESSAGE, JUDGED_COST
from broker.wire.errors import PeerProtocolError
from broker.wire.marshal import make_return
from tests.helpers.messages import NO_REPLY, access, call, changed, names, signal
from tests.helpers.modelbus import ME, Dialogue

A_TURN = 3


@pytest.fixture
def talk() -> Dialogue:
    talk = Dialogue(access("send:org.a"), owners={"org.a": ":1.2"})
    talk.app(call(5, "org.a"))
    talk.clear()
    talk.filter.spent = 0
    talk.filter._turn = A_TURN * JUDGED_COST
    return talk


def go_on(talk: Dialogue) -> None:
    talk.filter.spent = 0
    talk.filter.resume_reading()
    talk.app()


def is_held(talk: Dialogue) -> bool:
    return talk.filter.held


def half(talk: Dialogue) -> int:
    return talk.filter.from_app.unfinished


def new_calls(count: int) -> bytes:
    return b"".join(call(10 + n, "org.a", f"New{n}", flags=NO_REPLY) for n in range(count))


def test_messages_that_are_new_come_in_turns_and_in_order(talk: Dialogue) -> None:
    talk.app(new_calls(8))
    expected = [f"call New{n}" for n in range(8)]
    assert names(talk.model.seen) == expected[:A_TURN]
    assert is_held(talk)
    assert talk.filter.yielded
    assert talk.host.bytes_held
    talk.filter.spent = 0
    talk.filter.resume_reading()
    talk.app()
    assert names(talk.model.seen) == expected[: 2 * A_TURN]
    talk.app(call(99, "org.a", "Behind", flags=NO_REPLY))
    go_on(talk)
    assert names(talk.model.seen) == [*expected, "call Behind"]
    assert not is_held(talk)
    assert not talk.host.bytes_held
    go_on(talk)
    assert len(talk.model.seen) == 9


def test_messages_that_are_known_are_all_done_at_once(talk: Dialogue) -> None:
    talk.app(b"".join(call(10 + n, "org.a") for n in range(20)))
    assert len(talk.model.seen) == 20
    assert talk.filter.spent == 20
    assert not is_held(talk)


def test_new_and_refused_messages_cost_more(talk: Dialogue) -> None:
    talk.app(call(10, "org.a", "New"))
    assert talk.filter.spent == JUDGED_COST
    talk.app(call(11, "org.hidden"))
    assert talk.filter.spent == 2 * JUDGED_COST


def test_bytes_of_replies_count_apart(talk: Dialogue) -> None:
    body = ("x" * 10 * BYTES_A_MESSAGE,)

    def answer(*serials: int, sender: str = ":1.2") -> int:
        """Return what replies from that sender to these calls count, all in one read."""
        talk.app(b"".join(call(serial, "org.a") for serial in serials))
        talk.filter.spent = talk.filter.answered = 0
        talk.deliver(
            b"".join(
                make_return(
                    serial,
                    reply_serial=serial,
                    sender=sender,
                    destination=ME,
                    signature="s",
                    values=body,
                )
                for serial in serials
            )
        )
        assert talk.filter.spent == 0
        return talk.filter.answered

    assert answer(10) == 10  # of a shape that is new
    assert answer(11, 12) == 20
    assert answer(13, sender=":1.9") == 0  # nobody asked that one


def test_what_else_the_bus_brings_is_not_counted() -> None:
    talk = Dialogue(access("receive:"), owners={"org.a": ":1.2"})
    talk.filter.spent = talk.filter.answered = 0
    values = ("x" * 10 * BYTES_A_MESSAGE,)
    for member in ("Tell", "Tell", "Other"):
        told = call(7, ME, member, signature="s", values=values)
        assert talk.deliver(changed(told, sender=":1.2"))
    assert (talk.filter.spent, talk.filter.answered) == (0, 0)


def test_what_breaks_the_protocol_is_found_in_its_turn(talk: Dialogue) -> None:
    talk.app(new_calls(3) + signal(20) + b"X" * 32)
    with pytest.raises(PeerProtocolError):
        go_on(talk)


def test_half_a_message_has_a_number_of_its_own(talk: Dialogue) -> None:
    data = call(10, "org.a")
    assert not half(talk)
    talk.app(data[:10])
    first = half(talk)
    assert first
    talk.app(data[10:50])
    assert half(talk) == first
    talk.app(data[50:] + data[:20])
    assert half(talk) not in (0, first)
    talk.filter.spent = 0
    talk.app(data[20:])
    assert not half(talk)
