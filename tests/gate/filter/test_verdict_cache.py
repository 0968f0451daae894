"""Remembered verdicts: bounded, and forgotten with what they rest on and nothing else."""

from hypothesis import given, strategies as st

from broker.gate.filter.pending_calls import Replier
from broker.gate.filter.verdict_cache import (
    MAX_LINKS,
    MAX_REMEMBERED,
    MAX_REMEMBERED_BYTES,
    VerdictCache,
    VerdictTable,
    remember_shape,
)
from broker.wire.header import parse_header
from broker.wire.marshal import make_return
from tests.helpers.messages import changed


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


def shaped(path: str, serial: int = 7) -> bytes:
    plain = make_return(1, reply_serial=serial, destination=":1.2", sender=":1.3")
    return changed(plain, extra={10: ("o", path)})


def test_shapes_of_one_length_lack_the_same_bytes() -> None:
    shapes: dict[bytes, str] = {}
    positions: dict[int, int] = {}
    near, far = shaped("/a"), changed(shaped("/a"), path=None, error_name="a.b2345678")
    far = changed(far, error_name="a.bcdefgh")
    first, second = parse_header(near), parse_header(far)
    assert first.size != second.size or first.reply_serial_at != second.reply_serial_at
    # As if both had one length: the second place drops what was remembered with the first.
    remember_shape(shapes, positions, first, near, ":1.3")
    positions[first.size] += 8
    remember_shape(shapes, positions, first, near, ":1.4")
    assert list(shapes.values()) == [":1.4"]
    assert positions == {first.size: first.reply_serial_at}


def test_shape_that_is_too_long_leaves_nothing() -> None:
    shapes: dict[bytes, str] = {}
    positions: dict[int, int] = {}
    long = shaped("/" + "a" * 1000)
    remember_shape(shapes, positions, parse_header(long), long, ":1.3")
    assert not shapes
    assert not positions


def test_stranger_that_was_judged_as_host_drops_the_verdicts() -> None:
    verdicts = VerdictCache()
    verdicts.app_calls.remember(b"key", Replier(":1.5"), ":1.5")
    verdicts.forget_about(":1.6")
    assert verdicts.app_calls
    verdicts.forget_about(":1.5")
    assert not verdicts.app_calls
