"""What is to be done at the engine for want of anybody who waits for it: one after the other, in the order given."""

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from broker.engines.base import EngineLostError
from broker.wire.errors import CallRefusedError

LOGGER: Final = logging.getLogger(__name__)
RETRY_PAUSE: Final = 0.1  # seconds, should there be no engine and none to come
Job = Callable[[], Awaitable[None]]


class EngineJobQueue:
    """All that is still to be done."""

    def __init__(self) -> None:
        # Cannot grow without bound: at most one job of each kind a sandbox, and a snapshot's.
        self._in, self._out = trio.open_memory_channel[tuple[str, Job]](math.inf)
        self._snapshots = 0

    def add(self, about: str, job: Job) -> None:
        """Have it done, after what is there already."""
        self._in.send_nowait((about, job))

    def begin_anew(self) -> None:
        """What is to be done after a snapshot is about to be added: what fails by then need not be tried again."""
        self._snapshots += 1

    async def run(self) -> None:
        """Do it, for ever. One that fails does not keep the others from being done."""
        async for about, job in self._out:
            try:
                await self._do(about, job)
            except CallRefusedError as exc:  # it ended by itself
                LOGGER.info("%s: %s", about, exc)

    async def _do(self, about: str, job: Job) -> None:
        while True:
            snapshots = self._snapshots
            try:
                return await job()
            except EngineLostError as exc:
                LOGGER.info("%s: %s", about, exc)
            # A snapshot shows what is left to do; but of one that came before there may be no other.
            if snapshots != self._snapshots:
                return None
            await trio.sleep(RETRY_PAUSE)
