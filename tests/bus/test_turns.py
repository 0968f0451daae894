from hypothesis import given, strategies as st

from broker.bus.turns import FairQueue

ITEMS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc"), st.integers()), max_size=40)


def filled(items: list[tuple[int, str, int]]) -> FairQueue[tuple[int, str, int]]:
    queue = FairQueue[tuple[int, str, int]]()
    for item in items:
        queue.put(item[0], item[1], item)
    return queue


@given(ITEMS)
def test_all_come_out_and_a_callers_in_order(items: list[tuple[int, str, int]]) -> None:
    queue = filled(items)
    assert len(queue) == len(items)
    out = [queue.take() for _ in items]
    assert queue.take() is None
    for key in {item[:2] for item in items}:
        mine = [item for item in items if item[:2] == key]
        assert [item for item in out if item is not None and item[:2] == key] == mine


@given(ITEMS)
def test_users_take_turns(items: list[tuple[int, str, int]]) -> None:
    queue = filled(items)
    users = {item[0] for item in items}
    first = [queue.take() for _ in users]
    assert {item[0] for item in first if item is not None} == users


def test_callers_of_one_user_take_turns() -> None:
    queue = filled([(1, "a", 0), (1, "a", 1), (1, "b", 2), (1, "b", 3), (2, "c", 4), (2, "c", 5)])
    assert [item[2] for _ in range(6) if (item := queue.take())] == [0, 4, 2, 5, 1, 3]


def test_who_may_not_is_passed_over_and_keeps_what_it_has() -> None:
    queue = filled([(1, "a", 0), (1, "b", 1), (2, "c", 2)])
    assert queue.take(lambda user: user != 1) == (2, "c", 2)
    assert queue.take(may=lambda _user, caller: caller != "a") == (1, "b", 1)
    assert queue.take(may=lambda _user, caller: caller != "a") is None
    assert queue.take() == (1, "a", 0)


@given(ITEMS, st.integers(0, 3), st.sampled_from("abc"))
def test_what_is_dropped_or_removed_does_not_come(
    items: list[tuple[int, str, int]], user: int, caller: str
) -> None:
    queue = filled(items)
    mine = [item for item in items if item[:2] == (user, caller)]
    for item in mine[:1]:
        queue.remove(user, caller, item)
    queue.remove(user, caller, (9, "x", 9))
    assert len(queue) == len(items) - len(mine[:1])
    assert queue.drop(user, caller) == [one for one in mine if one is not mine[0]]
    assert queue.drop(user, caller) == []
    assert len(queue) == len(items) - len(mine)
