import fcntl
import os
from collections.abc import Iterator

import pytest

from broker.engines.held_sockets import PIPE, HeldSockets


class Kept:
    """Pipes, and what is told of them."""

    def __init__(self) -> None:
        self.held = HeldSockets()
        self.told: list[tuple[str, str, bool]] = []
        self.held.on_change = lambda sandbox, bus, fd: self.told.append(
            (sandbox, bus, fd is not None)
        )
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)

    def is_open(self) -> bool:
        """Whether somebody still has the write end, once ours is closed."""
        try:
            return os.read(self.read, 1) != b""
        except BlockingIOError:
            return True


@pytest.fixture
def kept() -> Iterator[Kept]:
    kept = Kept()
    yield kept
    kept.held.close()
    os.close(kept.read)


def test_a_duplicate_outlives_what_it_is_of(kept: Kept) -> None:
    kept.held.keep("c1", "session", kept.write)
    os.close(kept.write)
    assert kept.is_open()
    assert "c1" in kept.held
    assert list(kept.held) == ["c1"]
    (fd,) = kept.held.of("c1").values()
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    kept.held.drop("c1")
    kept.held.drop("c1")
    assert not kept.is_open()
    assert "c1" not in kept.held
    assert kept.told == [("c1", "session", True), ("c1", "session", False)]


def test_who_listens_no_more_keeps_its_pipe(kept: Kept) -> None:
    kept.held.keep("c1", "session", kept.write)
    kept.held.adopt("c1", PIPE, kept.write)
    kept.held.drop_listeners("c1")
    assert dict(kept.held.of("c1")) == {PIPE: kept.write}
    kept.held.drop("c1", PIPE)
    assert not kept.is_open()
    assert not kept.held.of("c1")


def test_of_each_there_is_one(kept: Kept) -> None:
    kept.held.keep("c1", "session", kept.write)
    kept.held.adopt("c1", "session", kept.write)
    kept.held.drop("c1")
    assert not kept.is_open()


def test_at_the_end_nobody_is_told(kept: Kept) -> None:
    kept.held.adopt("c1", "session", kept.write)
    kept.held.close()
    assert not kept.is_open()
    assert kept.told == [("c1", "session", True)]


def test_what_cannot_be_duplicated_is_not_held(
    kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    os.close(kept.write)
    kept.held.keep("c1", "session", kept.write)
    assert "c1" not in kept.held
    assert "cannot hold its listening socket" in caplog.text
