"""The unfinished end of a stream: nothing lost, everything counted, descriptors with their bytes."""

import pytest

from broker.gate.filter.receive_buffer import MAX_UNCLAIMED_FDS, SMALL, ReceiveBuffer
from broker.wire.errors import PeerProtocolError


class Account:
    bytes_held = 0


def test_whole_input_is_given_at_once() -> None:
    account = Account()
    intake = ReceiveBuffer(account)
    assert intake.feed(b"abc", ()) == b"abc"
    intake.consume(b"abc", 3)
    assert (intake.held, account.bytes_held) == (0, 0)


def test_rest_is_held_until_there_is_as_much_as_needed() -> None:
    account = Account()
    intake = ReceiveBuffer(account)
    data = intake.feed(b"abcd", ())
    assert data is not None
    intake.expect(4)
    intake.consume(data, 1)
    assert account.bytes_held == 3
    assert intake.feed(b"", ()) is None
    assert intake.feed(b"e", ()) == b"bcde"
    assert account.bytes_held == 0


def test_trickle_is_put_together() -> None:
    intake = ReceiveBuffer(None)
    intake.expect(3 * SMALL)
    assert intake.feed(b"x", ()) == b"x"
    intake.expect(3 * SMALL)
    intake.consume(b"x", 0)
    for _ in range(SMALL):
        assert intake.feed(b"yz", ()) is None
    assert len(intake._parts) <= 3
    whole = intake.feed(b"w" * SMALL, ())
    assert whole == b"x" + b"yz" * SMALL + b"w" * SMALL
    assert type(whole) is bytes


def test_skipped_bytes_are_not_held() -> None:
    account = Account()
    intake = ReceiveBuffer(account)
    intake.skip(5)
    assert intake.feed(b"abc", ()) is None
    assert account.bytes_held == 0
    assert intake.feed(b"defg", ()) == b"fg"


def test_what_was_taken_can_be_put_back() -> None:
    intake = ReceiveBuffer(None)
    intake.unread(b"ab")
    intake.unread(b"cd")
    assert intake.held == 4
    assert intake.feed(b"", ()) == b"abcd"


def test_descriptors_belong_to_a_message_that_has_bytes_of_their_read() -> None:
    intake = ReceiveBuffer(None)
    assert intake.feed(b"abcd", [5, 6]) == b"abcd"
    assert intake.peek_fds(1) == (5,)
    assert intake.peek_fds(2) == (5, 6)
    intake.drop_fds(1)
    intake.consume(b"abcd", 2)
    assert intake.feed(b"e", ()) == b"cde"
    assert intake.has_fds
    intake.drop_fds(1)
    intake.consume(b"cde", 3)
    assert not intake.has_fds


def test_descriptors_that_belong_to_no_message_are_an_error() -> None:
    intake = ReceiveBuffer(None)
    intake.feed(b"abcd", [5])
    with pytest.raises(PeerProtocolError, match="no message"):
        intake.consume(b"abcd", 4)
    assert intake.take_fds() == [5]


def test_descriptors_do_not_go_to_a_later_message_of_the_same_read() -> None:
    intake = ReceiveBuffer(None)
    intake.feed(b"ab", [5])
    intake.expect(4)
    intake.consume(b"ab", 0)
    assert intake.feed(b"cdef", ()) == b"abcdef"
    assert intake.peek_fds(0, 0) == ()
    with pytest.raises(PeerProtocolError, match="no message"):
        intake.peek_fds(1, 4)
    assert intake.peek_fds(1, 1) == (5,)


def test_descriptors_of_a_later_read_wait_for_their_message() -> None:
    intake = ReceiveBuffer(None)
    intake.feed(b"ab", ())
    intake.expect(4)
    intake.consume(b"ab", 0)
    assert intake.feed(b"cdef", [5]) == b"abcdef"
    intake.consume(b"abcdef", 4)  # a message without descriptors, of which the end came with them
    assert intake.peek_fds(1) == (5,)


def test_more_descriptors_than_came_are_an_error() -> None:
    intake = ReceiveBuffer(None)
    assert intake.peek_fds(0) == ()
    with pytest.raises(PeerProtocolError, match="1 descriptors, 0 came"):
        intake.peek_fds(1)


def test_descriptors_are_bounded_and_given_up_at_the_end() -> None:
    account = Account()
    intake = ReceiveBuffer(account)
    intake.feed(b"ab", range(MAX_UNCLAIMED_FDS))
    intake.consume(b"ab", 1)
    with pytest.raises(PeerProtocolError, match="more file descriptors"):
        intake.feed(b"c", [999])
    assert len(intake.take_fds()) == MAX_UNCLAIMED_FDS + 1
    assert (intake.take_fds(), intake.held, account.bytes_held) == ([], 0, 0)
