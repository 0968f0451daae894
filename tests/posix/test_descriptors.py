import os
import resource
import socket

import pytest

from broker.posix.descriptors import (
    ANCILLARY_SIZE,
    SCM_MAX_FD,
    close_fds,
    raise_descriptor_limit,
    received_fds,
    rights,
)


@pytest.mark.parametrize("count", [0, 1, SCM_MAX_FD])
def test_descriptors_arrive_with_their_message(count: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendmsg([b"x"], rights([0] * count))
        data, ancillary, flags, _ = theirs.recvmsg(1, ANCILLARY_SIZE)
        fds = received_fds(ancillary)
        assert (data, len(fds), flags & socket.MSG_CTRUNC) == (b"x", count, 0)
        close_fds(fds)


def test_other_ancillary_data_and_half_a_number_are_left_out() -> None:
    number = (7).to_bytes(4, "little")
    assert received_fds(
        [
            (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, number),
            (socket.SOL_SOCKET, socket.SCM_RIGHTS, number + number[:3]),
        ]
    ) == [7]


def test_all_are_closed_also_after_one_that_is_closed_already() -> None:
    ends = os.pipe()
    os.close(ends[0])
    close_fds(ends)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ends[1])


def test_limit_is_raised_as_far_as_it_may() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
