"""A queue of engine calls that no caller waits for, run in the order given."""

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from broker.engines.base import EngineLostError
from broker.wire.errors import CallRefusedError

LOGGER: Final = logging.getLogger(__name__)
RETRY_PAUSE: Final = 0.1  # seconds, if the engine is lost and none comes back
Job = Callable[[], Awaitable[None]]


class EngineJobQueue:
    """The engine calls that are still to be made."""

    def __init__(self) -> None:
        # Bounded: holds at most a job of each kind for a sandbox, and those of a snapshot.
        self._in, self._out = trio.open_memory_channel[tuple[str, Job]](math.inf)
        self._snapshots = 0

    def add(self, about: str, job: Job) -> None:
        """Append a job. `about` names the subject in the log."""
        self._in.send_nowait((about, job))

    def begin_anew(self) -> None:
        """Take note of a snapshot, so that jobs that fail earlier are not repeated."""
        self._snapshots += 1

    async def run(self) -> None:
        """Run the jobs, for ever. A job that fails does not stop the others."""
        async for about, job in self._out:
            try:
                await self._do(about, job)
            except CallRefusedError as exc:  # the sandbox has ended
                LOGGER.info("%s: %s", about, exc)

    async def _do(self, about: str, job: Job) -> None:
        while True:
            snapshots = self._snapshots
            try:
                return await job()
            except EngineLostError as exc:
                LOGGER.info("%s: %s", about, exc)
            # A snapshot that came during the job leads to a new job if necessary. Else try again.
            if snapshots != self._snapshots:
                return None
            await trio.sleep(RETRY_PAUSE)
