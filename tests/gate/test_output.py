"""The data on its way out of a connection."""

import pytest

from broker.gate.output import EMPTY_QUEUE, Chunk, descriptors_of


def test_descriptors_are_found() -> None:
    assert descriptors_of([b"a", Chunk(b"b", (3, 4)), Chunk(b"c", ()), Chunk(b"d", (5,))]) == [
        3,
        4,
        5,
    ]


def test_shared_empty_queue_cannot_be_filled() -> None:
    with pytest.raises(AssertionError, match="replaced"):
        EMPTY_QUEUE.append(1)
    with pytest.raises(AssertionError, match="replaced"):
        EMPTY_QUEUE.extend([1])
    assert not EMPTY_QUEUE
