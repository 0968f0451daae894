"""What a waiting call knows of who owned its name since it was made."""

import gc
import weakref

from hypothesis import given, strategies as st

from broker.gate.filter.pending_calls import OwnerHistory, OwnersSince

OWNERS = st.sampled_from(["", ":1.1", ":1.2", ":1.3", ":1.4", ":1.5"])


@given(st.lists(OWNERS, max_size=20), st.integers(0, 20))
def test_it_is_whoever_owned_it_from_then_on(owners: list[str], start: int) -> None:
    history, changes = OwnerHistory(100), list(zip(["", *owners], [*owners, ""], strict=True))
    for change in changes[:start]:
        history.add(*change)
    others = OwnersSince(history)
    for change in changes[start:]:
        history.add(*change)
    expected = {owner for change in changes[start:] for owner in change if owner}
    assert {*others} == expected
    assert len(others) == len(expected)
    assert all((each in others) == (each in expected) for each in (":1.1", ":1.2", ":1.9"))


def test_old_changes_are_forgotten() -> None:
    history = OwnerHistory(3)
    first = OwnersSince(history)
    for number in range(10):
        history.add(f":1.{number}", f":1.{number + 1}")
    last = OwnersSince(history)
    assert sorted(first) == [":1.10", ":1.7", ":1.8", ":1.9"]
    assert not last
    history.add(":1.10", "")
    assert {*last} == {":1.10"}


def test_it_lives_as_long_as_somebody_reads_it() -> None:
    history = OwnerHistory(3)
    others, gone = OwnersSince(history), weakref.ref(history)
    del history
    assert gone() is not None
    del others
    gc.collect()
    assert gone() is None
