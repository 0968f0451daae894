"""A snapshot is cut between sandboxes, and nothing of it is lost."""

import msgspec
from hypothesis import given, strategies as st

from broker.control_protocol.framing import split_snapshot
from tests.helpers.records import make_record, make_snapshot, make_state

STATES = [make_state(make_record(number)) for number in range(8)]
SIZE = max(len(msgspec.msgpack.encode(state)) for state in STATES)


@given(count=st.integers(0, len(STATES)), most=st.integers(0, 10 * SIZE))
def test_each_part_is_as_short_as_it_can_be_and_all_together_are_whole(
    count: int, most: int
) -> None:
    parts = list(split_snapshot(make_snapshot(), STATES[:count], most))
    assert [state for part in parts for state in part.sandboxes] == STATES[:count]
    assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]
    for part in parts:
        size = sum(len(msgspec.msgpack.encode(state)) for state in part.sandboxes)
        assert size <= most or len(part.sandboxes) == 1
    if most >= count * SIZE:
        assert len(parts) == 1
