import pytest

from broker.supervisor.lifetime import Creators, follows_creator
from tests.records import make_record


@pytest.mark.parametrize(
    ("close_notify", "keep", "follows"),
    [(False, False, True), (True, False, False), (False, True, False), (True, True, False)],
)
def test_who_follows_its_creator(close_notify: bool, keep: bool, follows: bool) -> None:
    record = make_record(close_notify=close_notify, keep_after_creator=keep)
    assert follows_creator(record) is follows
    assert Creators().add(record) is follows


def test_followers_are_told_once_by_bus_and_name() -> None:
    creators = Creators()
    for number in (0, 1):
        creators.add(make_record(number))
    creators.add(make_record(2, creator=":1.2"))
    creators.add(make_record(3, creator_bus="system"))
    assert creators.left("session", ":1.1") == ("c0", "c1")
    assert creators.left("session", ":1.1") == ()
    assert set(creators) == {("session", ":1.2"), ("system", ":1.1")}


def test_what_ended_follows_nobody() -> None:
    creators = Creators()
    record = make_record()
    creators.add(record)
    assert creators.remove(record)
    assert not creators.remove(record)
    assert list(creators) == []
    assert not creators.remove(make_record(5))
