"""The refusals of one sandbox, told to the supervisor: so many a second one by one, the others as a number."""

from collections.abc import Callable
from typing import Final

from broker.control_protocol.messages import Denied, Event, shorten_denial_text
from broker.gate.event_journal import summarise
from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.denials import Denial
from broker.gate.io.loop import Loop
from broker.wire.interfaces import CONTAINERS1

# Refusals that are reported one by one, a sandbox; the others are counted.
REPORTS_PER_SECOND: Final = 50

# The interfaces of the broker's own signals. Their refusal is not reported, because a report would make the supervisor send
# more of them.
_OWN_SIGNALS: Final = ("org.buswarden.", CONTAINERS1)


def is_news(state: ConnectionState, denial: Denial) -> bool:
    """Say whether a refusal is to be counted and told: all but those of the broker's own signals are.

    The broker is in no sandbox. What a sandbox sends under these names is told as anything else.
    """
    is_own = denial.interface.startswith(_OWN_SIGNALS) and denial.kind == "signal"
    return not (is_own and denial.direction == "receive") or denial.peer in state.bus.identities


class DenialReports:
    """What is told, and what is still to be told."""

    def __init__(self, loop: Loop, sandbox: str, emit: Callable[[Event], None]) -> None:
        self._loop: Final = loop
        self._sandbox: Final = sandbox
        self._emit: Final = emit
        self.left = REPORTS_PER_SECOND
        self.unreported = 0

    def add(self, bus: str, denial: Denial) -> None:
        """Report a refusal, or count it when there are too many."""
        if not self.left:
            self.unreported += 1
            return
        if self.left == REPORTS_PER_SECOND:
            self._loop.call_later(1.0, self._refill)
        self.left -= 1
        texts = {name: shorten_denial_text(text) for name, text in denial._asdict().items()}
        self._emit(Denied(sandbox=self._sandbox, bus=bus, more=self.unreported, **texts))
        self.unreported = 0

    def load(self, left: int, unreported: int) -> None:
        """Go on as one that had so many left."""
        self.left, self.unreported = left, unreported
        if left < REPORTS_PER_SECOND:
            self._loop.call_later(1.0, self._refill)

    def _refill(self) -> None:
        self.left = REPORTS_PER_SECOND
        self.flush()

    def flush(self) -> None:
        """Say how many were left out, if any were."""
        if self.unreported:
            more, self.unreported = self.unreported, 0
            self._emit(summarise(self._sandbox, more))
