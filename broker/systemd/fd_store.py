"""What systemd does for a running supervisor: it keeps the sandboxes' sockets, and sees whether we are alive."""

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

import trio

from broker.systemd.notify import Notifier

LOGGER: Final = logging.getLogger(__name__)


class Held(Protocol):
    """What is needed of who holds the descriptors."""

    on_change: Callable[[str, str, int | None], None]

    def adopt(self, sandbox: str, bus: str, fd: int) -> None:
        """Hold this one."""


def restore_and_store(notifier: Notifier, held: Held, given: Sequence[tuple[str, int]]) -> None:
    """Give back what was kept for us; from now on, have kept what is held. Call it before there is a gate."""
    for name, fd in given:
        sandbox, dot, bus = name.partition(".")
        if dot:
            held.adopt(sandbox, bus, fd)
        else:
            LOGGER.warning("a descriptor named %r was given to us: closed", name)
            os.close(fd)
    if given:
        LOGGER.info("%d descriptors were kept by systemd", len(given))

    def changed(sandbox: str, bus: str, fd: int | None) -> None:
        name = f"{sandbox}.{bus}"
        if fd is None:
            notifier.remove(name)
        else:
            notifier.store(name, fd)

    if notifier.is_wanted:
        held.on_change = changed


async def stay_alive(notifier: Notifier, ask: Callable[[], Awaitable[object]]) -> None:
    """Say that we are alive, as often as is wanted, while whoever is asked answers."""
    if not notifier.watchdog:
        return
    pause = notifier.watchdog / 2
    while True:
        with trio.move_on_after(pause) as scope:
            try:
                await ask()
            except Exception as exc:  # noqa: BLE001 - whatever it is, it is no answer
                LOGGER.warning("watchdog: no answer: %s", exc)
            else:
                notifier.alive()
            await trio.sleep_forever()
        assert scope.cancelled_caught
