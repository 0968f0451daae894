"""Runs of messages that differ in their serials alone, against looking at each one."""

import pytest
from hypothesis import given, strategies as st

from broker.gate.dumps import ReplyAction
from broker.gate.filter.message_runs import match_call_run, match_reply_run
from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL, InterceptedCall, Replier
from broker.wire.fixed_header import U32
from broker.wire.header import measure_header, parse_header
from broker.wire.marshal import make_return
from tests.helpers.messages import NO_REPLY, access, call, changed, names
from tests.helpers.modelbus import ME, Dialogue

TARGET = Replier(":1.2", "org.a")
ROOM = 100


def place_of(first: bytes) -> tuple[int, int, int]:
    return 0, measure_header(first), len(first)


def calls(*messages: bytes, room: int = ROOM, waiting: tuple[int, ...] = ()) -> list[int]:
    """Return the serials that wait when the first call was let through and those like it behind it were taken."""
    pending: dict[int, Replier | InterceptedCall] = dict.fromkeys(waiting, Replier(":1.9"))
    pending[parse_header(messages[0]).serial] = TARGET
    before = set(pending)
    count = match_call_run(b"".join(messages), place_of(messages[0]), pending, room)
    taken = [serial for serial in pending if serial not in before]
    assert len(taken) == count
    assert all(pending[serial] is TARGET for serial in taken)
    return taken


def a_call(serial: int, member: str = "Do", text: str = "") -> bytes:
    return call(
        serial, "org.a", member, signature="s" if text else "", values=(text,) if text else ()
    )


def test_a_run_is_taken_whole() -> None:
    assert calls(*(a_call(n) for n in range(5, 12))) == [6, 7, 8, 9, 10, 11]
    assert calls(*(a_call(n, text=f"body {n % 3}") for n in range(5, 12))) == [6, 7, 8, 9, 10, 11]


def test_what_is_not_whole_is_left() -> None:
    data = [a_call(n) for n in range(5, 10)]
    assert calls(*data[:-1], data[-1][:-1]) == [6, 7, 8]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(a_call(8, "No"), id="fields-of-the-same-size"),
        pytest.param(a_call(8, "Other"), id="fields-of-another-size"),
        pytest.param(a_call(8, text="x"), id="body"),
        pytest.param(call(8, "org.a", flags=NO_REPLY), id="flags"),
        pytest.param(changed(a_call(8), sender=":1.1"), id="more-fields"),
        pytest.param(a_call(7), id="serial-that-waits"),
        pytest.param(a_call(FIRST_GATE_SERIAL), id="serial-of-the-gate"),
        pytest.param(U32.pack(0).join((a_call(8)[:8], a_call(8)[12:])), id="serial-0"),
    ],
)
def test_what_is_otherwise_ends_it(other: bytes) -> None:
    assert calls(a_call(5), a_call(6), a_call(7), other, *(a_call(n) for n in range(9, 13))) == [
        6,
        7,
    ]


def test_no_more_wait_than_may() -> None:
    assert calls(*(a_call(n) for n in range(5, 12)), room=4) == [6, 7, 8]
    assert calls(*(a_call(n) for n in range(5, 12)), room=4, waiting=(90, 91)) == [6]


def test_a_few_are_no_run() -> None:
    assert calls(a_call(5), a_call(6), a_call(7)) == []
    assert calls(a_call(5), a_call(6, "No"), *(a_call(n) for n in range(7, 12))) == []


def a_reply(to: int, *, sender: str = ":1.2", text: str = "") -> bytes:
    return make_return(
        900 + to,
        reply_serial=to,
        sender=sender,
        destination=ME,
        signature="s" if text else "",
        values=(text,) if text else (),
    )


def replies(*messages: bytes, waiting: dict[int, Replier | InterceptedCall]) -> list[int]:
    """Return the serials that were answered behind the first reply."""
    pending = dict(waiting)
    at = parse_header(messages[0]).reply_serial_at
    count = match_reply_run(b"".join(messages), place_of(messages[0]), at, pending, ":1.2")
    answered = [serial for serial in waiting if serial not in pending]
    assert len(answered) == count
    return answered


WAITING: dict[int, Replier | InterceptedCall] = dict.fromkeys(range(1, 20), TARGET)


def test_replies_in_a_run_are_let_through_once_each() -> None:
    assert replies(*(a_reply(n) for n in range(20, 14, -1)), waiting=WAITING) == [
        15,
        16,
        17,
        18,
        19,
    ]
    assert replies(*(a_reply(n) for n in (20, 3, 4, 3, 5)), waiting=WAITING) == [3, 4]


@pytest.mark.parametrize(
    ("other", "waiting"),
    [
        pytest.param(a_reply(7, sender=":1.3"), {}, id="sender"),
        pytest.param(a_reply(7, text="x"), {}, id="body"),
        pytest.param(a_reply(40), {}, id="nobody-asked"),
        pytest.param(a_reply(7), {7: Replier(":1.3", "org.b")}, id="another-was-asked"),
        pytest.param(a_reply(7), {7: InterceptedCall(ReplyAction("ignore"), TARGET)}, id="special"),
    ],
)
def test_reply_that_is_otherwise_ends_it(
    other: bytes, waiting: dict[int, Replier | InterceptedCall]
) -> None:
    run = (a_reply(20), a_reply(5), a_reply(6), other, a_reply(8), a_reply(9), a_reply(10))
    assert replies(*run, waiting=WAITING | waiting) == [5, 6]


SERIALS = st.integers(1, 12)
FROM_APP = st.one_of(
    st.builds(a_call, SERIALS, st.sampled_from(["Do", "No"]), st.sampled_from(["", "x", "yy"])),
    st.builds(lambda n: call(n, "org.a", flags=NO_REPLY), SERIALS),
)


@given(st.lists(FROM_APP, max_size=30), st.booleans())
def test_a_read_is_judged_as_each_message_by_itself(messages: list[bytes], answers: bool) -> None:
    together, apart = (Dialogue(access("send:org.a"), owners={"org.a": ":1.2"}) for _ in range(2))
    for talk in (together, apart):
        for warm in (a_call(50), a_call(51, "No"), a_call(52, text="x"), a_call(53, text="yy")):
            talk.app(warm)
        talk.clear()
    together.app(b"".join(messages))
    for message in messages:
        apart.app(message)
    assert names(together.model.seen) == names(apart.model.seen)
    assert together.state.pending.calls_to_bus.keys() == apart.state.pending.calls_to_bus.keys()
    if answers:
        answer = [a_reply(m.header.serial) for m in apart.model.calls for _ in range(2)]
        together.deliver(*answer)
        for message in answer:
            apart.deliver(message)
    assert together.state.pending.calls_to_bus.keys() == apart.state.pending.calls_to_bus.keys()
    assert [m.raw for m in together.got] == [m.raw for m in apart.got]
