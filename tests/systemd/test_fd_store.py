import os
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from broker.engines.held_sockets import PIPE, HeldSockets
from broker.systemd.fd_store import restore_and_store, stay_alive
from broker.systemd.notify import Notifier


@dataclass
class FakeNotifier(Notifier):
    """Keeps what it would tell."""

    watchdog: float = 0.0  # type: ignore[misc]
    wanted: bool = True
    told: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def is_wanted(self) -> bool:
        return self.wanted

    def store(self, name: str, fd: int) -> None:
        os.fstat(fd)  # it is open
        self.told.append(("store", name))

    def remove(self, name: str) -> None:
        self.told.append(("remove", name))

    def alive(self) -> None:
        self.told.append(("alive",))


def a_descriptor() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def test_what_is_held_is_kept_and_what_is_not_is_not() -> None:
    notifier, held = FakeNotifier(), HeldSockets()
    restore_and_store(notifier, held, [])
    fd = a_descriptor()
    held.keep("c12", "session", fd)
    held.keep("c12", PIPE, fd)
    held.drop_listeners("c12")
    held.drop("c12")
    assert notifier.told == [
        ("store", "c12.session"),
        ("store", "c12."),
        ("remove", "c12.session"),
        ("remove", "c12."),
    ]
    held.keep("c13", "session", fd)
    notifier.told.clear()
    held.close()  # we end: who comes after us wants it
    assert notifier.told == []
    os.close(fd)


def test_what_was_kept_comes_back_and_is_not_stored_again() -> None:
    notifier, held = FakeNotifier(), HeldSockets()
    fds = [a_descriptor() for _ in range(3)]
    names = ["c1.session", "c1.", "stored"]
    restore_and_store(notifier, held, list(zip(names, fds, strict=True)))
    assert dict(held.of("c1")) == {"session": fds[0], PIPE: fds[1]}
    assert notifier.told == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fds[2])  # nobody knows what it is
    held.drop("c1")
    assert notifier.told == [("remove", "c1.session"), ("remove", "c1.")]


def test_without_systemd_nobody_is_told_of_it() -> None:
    notifier, held = FakeNotifier(wanted=False), HeldSockets()
    restore_and_store(notifier, held, [])
    fd = a_descriptor()
    held.keep("c1", "session", fd)
    held.close()
    os.close(fd)
    assert notifier.told == []


async def test_it_is_alive_while_whoever_is_asked_answers(
    autojump_clock: trio.testing.MockClock,
) -> None:
    notifier = FakeNotifier(watchdog=30.0)
    answers = iter([0.1, 0.1, 100.0, None, 0.1])

    async def ask() -> None:
        wait = next(answers, 0.1)
        await trio.sleep(wait or 0.0)
        if wait is None:
            raise ValueError("no gate")

    with trio.move_on_after(5 * 15.0 - 1):
        await stay_alive(notifier, ask)
    assert notifier.told == [("alive",)] * 3
    with trio.move_on_after(30.0):
        await stay_alive(notifier, ask)
    assert notifier.told == [("alive",)] * 5


async def test_without_a_watchdog_nobody_is_asked(autojump_clock: trio.testing.MockClock) -> None:
    with trio.fail_after(1):
        await stay_alive(FakeNotifier(), trio.sleep_forever)
