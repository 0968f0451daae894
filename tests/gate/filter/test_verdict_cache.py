"""Remembered verdicts: bounded, and forgotten with what they rest on and nothing else."""

from hypothesis import given, strategies as st

from broker.gate.filter.verdict_cache import (
    MAX_LINKS,
    MAX_REMEMBERED,
    MAX_REMEMBERED_BYTES,
    VerdictTable,
)


def test_they_are_bounded_in_number_and_size() -> None:
    table: VerdictTable[bool] = VerdictTable()
    for n in range(MAX_REMEMBERED + 1):
        table.remember(n.to_bytes(4, "little"), True, ":1.2")
    assert len(table) == 1
    table.remember(bytes(MAX_REMEMBERED_BYTES + 1), True)
    assert len(table) == 1


def test_names_of_verdicts_that_are_forgotten_are_bounded() -> None:
    table: VerdictTable[bool] = VerdictTable()
    for n in range(10 * MAX_LINKS):
        table.remember(n.to_bytes(4, "little"), True, "org.a", ":1.2")
        table.forget_about(":1.2")
    assert not table
    assert sum(map(len, table._resting.values())) <= MAX_LINKS


NAMES = st.sampled_from("abcd")


@given(
    st.lists(
        st.one_of(
            st.tuples(st.binary(max_size=1), st.sets(NAMES)),
            st.sets(NAMES, min_size=1),
        )
    )
)
def test_what_rests_on_other_names_stays(steps: list[object]) -> None:
    table: VerdictTable[int] = VerdictTable()
    kept: dict[bytes, set[str]] = {}
    rests: dict[bytes, set[str]] = {}  # on whatever it has rested since it was forgotten
    for step in steps:
        if isinstance(step, tuple):
            key, names = step
            table.remember(key, 1, *names)
            kept[key] = names
            rests[key] = rests.get(key, set()) | names
        else:
            assert isinstance(step, set)
            table.forget_about(*step)
            kept = {key: names for key, names in kept.items() if not names & step}
        assert kept.keys() >= table.keys()  # nothing stays that is to go
        # One that rested on another name before may go with that one: it is judged anew.
        assert all(key in table for key in kept if rests[key] == kept[key])
