"""Limits to starting the gate again: pauses, and when to give up.

A gate that has served once is started again always, because apps wait for it. A gate that dies before serving,
or that refuses this supervisor, would have the supervisor try for ever: such tries are counted.
"""

from typing import Final

import trio

from broker.engines.backoff import ExponentialBackoff
from broker.engines.gate_process import GateError

# Starts in a row of a gate that dies before serving.
MAX_STARTS: Final = 5
FORGET_STARTS_AFTER: Final = 60.0  # seconds
# After a start that failed, if an earlier gate served; doubles.
START_PAUSE: Final = 0.25  # seconds
MAX_REFUSALS: Final = 20
REFUSAL_PAUSE: Final = 0.1  # seconds
# After the second death in a row of a gate that served for less than STEADY_AFTER; doubles.
FIRST_PAUSE: Final = 0.1  # seconds
LONGEST_PAUSE: Final = 0.5
STEADY_AFTER: Final = 5.0  # seconds


class RestartLimits:
    """Counts of starts, deaths and refusals since a gate last served."""

    def __init__(self) -> None:
        self.has_served = False  # a gate of this supervisor
        self._starts: list[float] = []
        self._start_pause: Final = ExponentialBackoff(START_PAUSE, START_PAUSE * 2**MAX_STARTS)
        self._refusals = 0
        self._died_early = False
        self._death_pause: Final = ExponentialBackoff(FIRST_PAUSE, LONGEST_PAUSE)

    def count_start(self) -> None:
        """Count a start that is about to be made. Raises GateError after too many."""
        now = trio.current_time()
        self._starts = [at for at in self._starts if now - at < FORGET_STARTS_AFTER]
        if len(self._starts) >= MAX_STARTS:
            raise GateError(f"the gate ended {MAX_STARTS} times in {FORGET_STARTS_AFTER:.0f} s")
        self._starts.append(now)

    async def wait_after_failed_start(self) -> None:
        """Wait before the gate is started again that did not start."""
        await trio.sleep(self._start_pause.next())

    def served(self) -> None:
        """Forget failed starts, because a gate serves now."""
        self.has_served = True
        self._starts.clear()
        self._start_pause.reset()

    def accepted(self) -> None:
        """Forget refusals, because the gate answers this supervisor."""
        self._refusals = 0

    async def wait_after_refusal(self, reason: str) -> None:
        """Wait before connecting again to a gate that hung up. Raises GateError after too many times."""
        self._refusals += 1
        if self._refusals >= MAX_REFUSALS:
            raise GateError(f"the running gate refuses this supervisor: {reason}")
        await trio.sleep(REFUSAL_PAUSE)

    async def wait_after_death(self, lifetime: float) -> None:
        """Wait after a gate's death; not at all after a first early death."""
        if lifetime > STEADY_AFTER:
            self._died_early = False
            self._death_pause.reset()
        elif self._died_early:
            await trio.sleep(self._death_pause.next())
        else:
            self._died_early = True
