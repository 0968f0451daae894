"""systemd's services to a running supervisor: storing the sandboxes' sockets, and the watchdog."""

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

import trio

from broker.systemd.notify import Notifier

LOGGER: Final = logging.getLogger(__name__)


class Held(Protocol):
    """The holder of the sandboxes' listening sockets."""

    on_change: Callable[[str, str, int | None], None]

    def adopt(self, sandbox: str, bus: str, fd: int) -> None:
        """Hold a socket that was held before the supervisor restarted."""


def restore_and_store(notifier: Notifier, held: Held, given: Sequence[tuple[str, int]]) -> None:
    """Return stored descriptors to `held`; from now on, store every descriptor that `held` gains.

    Call this function before the first gate starts.
    """
    for name, fd in given:
        sandbox, dot, bus = name.partition(".")
        if dot:
            held.adopt(sandbox, bus, fd)
        else:
            LOGGER.warning("systemd passed a descriptor with the unknown name %r: closed", name)
            os.close(fd)
    if given:
        LOGGER.info("systemd returned %d stored descriptors", len(given))

    def changed(sandbox: str, bus: str, fd: int | None) -> None:
        name = f"{sandbox}.{bus}"
        if fd is None:
            notifier.remove(name)
        else:
            notifier.store(name, fd)

    if notifier.is_wanted:
        held.on_change = changed


async def stay_alive(notifier: Notifier, ask: Callable[[], Awaitable[object]]) -> None:
    """Send watchdog messages at half the watchdog's interval, while `ask` answers."""
    if not notifier.watchdog:
        return
    pause = notifier.watchdog / 2
    while True:
        with trio.move_on_after(pause) as scope:
            try:
                await ask()
            except Exception as exc:  # noqa: BLE001 - any failure means that no answer came
                LOGGER.warning("watchdog: no answer: %s", exc)
            else:
                notifier.alive()
            await trio.sleep_forever()
        assert scope.cancelled_caught
