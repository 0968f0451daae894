import pytest

from broker.api.subscribers import (
    MAX_SUBSCRIBERS,
    MAX_SUBSCRIBERS_OF_USER,
    SIGNALS_PER_SECOND,
    Subscribers,
)
from broker.supervisor.sandboxes.specs import Caller
from broker.wire.errors import LIMITS_EXCEEDED, CallRefusedError
from tests.helpers.records import make_record


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def caller(name: str, uid: int = 1000, bus: str = "session") -> Caller:
    return Caller(bus=bus, unique_name=name, uid=uid)


def test_refusals_are_told_to_the_sandboxs_user_and_root() -> None:
    subscribers = Subscribers(Clock())
    for name, uid in ((":1.1", 1000), (":1.2", 1001), (":1.3", 0)):
        subscribers.add(caller(name, uid))
    subscribers.add(caller(":1.1", 1000))
    heard = list(subscribers.hearers(make_record(uid=1000)))
    assert heard == [("session", ":1.1"), ("session", ":1.3")]
    assert subscribers.discard("session", ":1.1")
    assert not subscribers.discard("session", ":1.1")
    subscribers.lose_bus("session")
    assert len(subscribers) == 0


def test_attack_c8_how_many_are_told_is_bounded() -> None:
    subscribers = Subscribers(Clock())
    for uid in range(100):
        for number in range(MAX_SUBSCRIBERS_OF_USER + 1):
            if len(subscribers) < MAX_SUBSCRIBERS and number < MAX_SUBSCRIBERS_OF_USER:
                subscribers.add(caller(f":{uid}.{number}", uid))
                continue
            with pytest.raises(CallRefusedError, match="max_subscribers") as caught:
                subscribers.add(caller(f":{uid}.{number}", uid))
            assert caught.value.dbus_name == LIMITS_EXCEEDED
    assert len(subscribers) == MAX_SUBSCRIBERS


def test_attack_c8_how_much_is_told_in_a_second_is_bounded() -> None:
    clock = Clock()
    subscribers = Subscribers(clock)
    for number in range(10):
        subscribers.add(caller(f":1.{number}"))
    record = make_record(uid=1000)

    def told(events: int) -> int:
        return sum(len(list(subscribers.hearers(record))) for _ in range(events))

    assert told(200) == SIGNALS_PER_SECOND
    clock.now += 0.5
    assert told(200) == SIGNALS_PER_SECOND // 2
    clock.now += 100
    assert told(200) == SIGNALS_PER_SECOND
