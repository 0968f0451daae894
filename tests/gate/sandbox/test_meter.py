"""What a connection costs: counts on an idle machine, time on a busy one."""

import pytest

from broker.gate.filter.costs import BUSY_SECOND, BYTES_A_MESSAGE, JUDGED_COST
from broker.gate.sandbox.budgets import MessageBudget
from broker.gate.sandbox.meter import EVERY, Meter
from broker.wire.errors import PeerProtocolError
from broker.wire.header import parse_header
from broker.wire.marshal import make_return
from tests.helpers.messages import NO_REPLY, access, call
from tests.helpers.modelbus import ME, Dialogue

RATE = 25_000


class Clock:
    """Time passes by `step` with each look."""

    def __init__(self) -> None:
        self.now = 100.0
        self.step = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class World:
    """A connection whose bus answers when a test says so."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.talk = Dialogue(access("send:org.a"), owners={"org.a": ":1.2"})
        self.talk.app(call(5, "org.a", flags=NO_REPLY))
        self.talk.clear()
        self.filter = self.talk.filter
        self.filter.spent = 0
        self.budget = MessageBudget(RATE, self.clock)
        self.meter = Meter(self.filter, self.budget, self.clock)

    def send(self, count: int = 1) -> list[str]:
        """Send known messages; return what the gate asks the bus behind them."""
        self.meter.feed_app(call(5, "org.a", flags=NO_REPLY) * count, ())
        *_, last = self.filter.state.to_bus
        self.filter.state.to_bus.clear()
        assert isinstance(last, bytes)
        header = parse_header(last)
        return [header.member or ""] if header.destination == "org.freedesktop.DBus" else []

    def hear_reply(self, cost: int, *, pays: bool = False) -> int:
        """Have a reply come that counts so many messages; return what it was counted."""
        self.talk.app(call(6, "org.a"))
        self.filter.spent = 0
        values = ("x" * (cost * BYTES_A_MESSAGE),)
        self.meter.feed_bus(
            make_return(
                9, reply_serial=6, sender=":1.2", destination=ME, signature="s", values=values
            ),
            (),
            pays=pays,
        )
        return self.filter.spent

    def asks(self) -> bool:
        """Whether there is a question to the bus that waits for its answer."""
        return bool(self.filter.state.pending.calls_to_bus)

    def answer(self) -> None:
        """Have the bus answer the question."""
        (entry,) = self.filter.state.pending.calls_to_bus.values()
        self.filter.state.pending.calls_to_bus.clear()
        self.filter.state.handle_reply(entry.action, None, b"", ())  # type: ignore[union-attr, arg-type]


@pytest.fixture
def world() -> World:
    return World()


def test_messages_count_as_they_are_on_an_idle_machine(world: World) -> None:
    world.send(100)
    assert world.filter.spent == 100 + 100 * len(call(5, "org.a")) // BYTES_A_MESSAGE


def test_new_messages_count_more(world: World) -> None:
    world.meter.feed_app(call(5, "org.a", "Other", flags=NO_REPLY), ())
    assert world.filter.spent == JUDGED_COST


def test_bytes_count_as_they_arrive(world: World) -> None:
    half = call(5, "org.a", signature="s", values=("x" * 100 * BYTES_A_MESSAGE,))
    world.meter.feed_app(half[: 50 * BYTES_A_MESSAGE], ())
    assert world.filter.spent == 50


def test_each_read_counts_however_little_it_brings(world: World) -> None:
    message = call(5, "org.a", flags=NO_REPLY)
    for at in range(len(message)):
        world.filter.spent = 0
        world.meter.feed_app(message[at : at + 1], ())
        assert world.filter.spent == 1
    world.filter.spent = 0
    world.meter.resume_reading()
    assert world.filter.spent == 0


def test_what_breaks_the_protocol_counts(world: World) -> None:
    world.clock.step = 0.01
    with pytest.raises(PeerProtocolError):
        world.meter.feed_app(b"?" * 16, ())
    assert world.filter.spent == pytest.approx(0.01 * BUSY_SECOND, abs=1)


def test_time_counts_where_it_is_more(world: World) -> None:
    world.clock.step = 0.01
    world.send(10)
    assert world.filter.spent == pytest.approx(0.01 * BUSY_SECOND, abs=1)


def test_replies_count_by_the_time_they_take_beyond_what_calls_paid(world: World) -> None:
    assert world.hear_reply(100) == 0
    world.clock.step = 0.01
    assert world.hear_reply(100) == pytest.approx(0.01 * BUSY_SECOND - 100, abs=1)
    assert world.hear_reply(0) == 0  # as long as that took, it may be somebody else's doing


def test_who_does_not_read_pays_for_replies(world: World) -> None:
    assert world.hear_reply(100, pays=True) == 100
    world.clock.step = 0.01
    assert world.hear_reply(100, pays=True) == pytest.approx(0.01 * BUSY_SECOND, abs=1)


def test_bus_is_asked_behind_many_replies(world: World) -> None:
    world.hear_reply(EVERY - 1)
    assert not world.asks()
    world.hear_reply(1)
    assert world.asks()
    world.clock.now += 0.1
    before = world.budget.left
    world.answer()
    # They are no payment for the time that the bus took.
    assert before - world.budget.left == pytest.approx(0.1 * BUSY_SECOND, abs=2)
    assert world.meter.ask_from == EVERY


def test_what_passes_without_the_meter_counts_as_well(world: World) -> None:
    world.meter.counted += EVERY
    assert world.meter.counted >= world.meter.ask_from
    assert world.send() == ["GetId"]
    assert world.meter.counted < world.meter.ask_from


def test_bus_is_asked_behind_much_and_once_at_a_time(world: World) -> None:
    assert world.send(EVERY // 2) == []
    world.filter.spent = 0
    assert world.send(EVERY // 2) == ["GetId"]
    world.filter.spent = 0
    assert world.send(EVERY) == []
    world.filter.spent = 0
    world.answer()
    assert world.send(1) == ["GetId"]


@pytest.mark.parametrize(("seconds", "more"), [(0.001, 0), (0.1, 0.1 * BUSY_SECOND - EVERY)])
def test_time_of_the_bus_counts_where_it_is_more(world: World, seconds: float, more: float) -> None:
    world.send(EVERY)
    world.clock.now += seconds
    before = world.budget.left
    world.answer()
    assert before - world.budget.left == pytest.approx(more, abs=0.1 * EVERY)


def test_no_answer_costs_more_than_a_second(world: World) -> None:
    world.send(EVERY)
    world.clock.now += 3600
    world.answer()
    assert world.budget.left == -RATE
    assert world.budget.pause() == pytest.approx(1, rel=0.01)


def test_bus_is_not_asked_where_the_app_would_get_the_answer(world: World) -> None:
    world.filter.state.reply_handlers.clear()
    world.meter = Meter(world.filter, world.budget, world.clock)
    assert world.send(EVERY) == []


def test_answer_to_another_gates_question_is_taken(world: World) -> None:
    world.send(EVERY)
    again = Meter(world.filter, world.budget, world.clock)
    world.answer()
    assert world.budget.left == RATE
    again.feed_app(b"", ())
