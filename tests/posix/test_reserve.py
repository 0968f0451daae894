import fcntl
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from broker.posix.reserve import RESERVE, is_reserved


@pytest.fixture
def limit() -> Iterator[int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield 1024
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def opened(count: int) -> Iterator[list[int]]:
    """Open descriptors until the process has `count`."""
    fds: list[int] = []
    try:
        while (now := len(os.listdir("/proc/self/fd")) - 1) < count:  # noqa: PTH208 - counted
            fds += [os.dup(1) for _ in range(count - now)]
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def test_attack_c9_the_last_descriptors_are_kept(limit: int) -> None:
    for count, reserved in ((limit - RESERVE - 1, False), (limit - RESERVE + 1, True)):
        with opened(count) as fds:
            assert is_reserved([max(fds)]) is reserved
            # A hole may be what a new one takes: it is counted all the same.
            assert is_reserved([min(fds)]) is reserved
    assert not is_reserved([])


def test_attack_c9_with_none_left_it_is_told_all_the_same(limit: int) -> None:
    with opened(limit - 1) as fds:
        fds.append(os.dup(1))
        assert is_reserved([])


def test_holes_below_a_high_number_are_room(limit: int) -> None:
    with open("/dev/null", "rb") as file:  # noqa: PTH123 - for its descriptor
        fd = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, limit - RESERVE)
        assert not is_reserved([fd])
        os.close(fd)
