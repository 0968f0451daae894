"""Reports of a sandbox's refusals to the supervisor.

Up to REPORTS_PER_SECOND refusals are reported singly, and the others as a number.
"""

from collections.abc import Callable
from typing import Final

from broker.control_protocol.messages import Denied, Event, shorten_denial_text
from broker.gate.event_journal import summarise
from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.denials import Denial
from broker.gate.io.loop import Loop
from broker.wire.interfaces import CONTAINERS1

# Refusals of a sandbox that are reported singly in a second; further refusals are counted.
REPORTS_PER_SECOND: Final = 50

# The interfaces of the broker's own signals. A refusal of such a signal is not reported, because
# the report would make the supervisor send more signals.
_OWN_SIGNALS: Final = ("org.buswarden.", CONTAINERS1)


def is_news(state: ConnectionState, denial: Denial) -> bool:
    """Return whether a refusal is counted and reported.

    Only refusals of the broker's own signals are not.

    The broker is in no sandbox. Signals that a sandbox sends under these names are reported like
    any others.
    """
    is_own = denial.interface.startswith(_OWN_SIGNALS) and denial.kind == "signal"
    return not (is_own and denial.direction == "receive") or denial.peer in state.bus.identities


class DenialReports:
    """The reports of a sandbox, and the number of refusals that were not reported."""

    def __init__(self, loop: Loop, sandbox: str, emit: Callable[[Event], None]) -> None:
        self._loop: Final = loop
        self._sandbox: Final = sandbox
        self._emit: Final = emit
        self.left = REPORTS_PER_SECOND
        self.unreported = 0

    def add(self, bus: str, denial: Denial) -> None:
        """Report a refusal, or only count the refusal if there are too many."""
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
        """Restore the state from a dump."""
        self.left, self.unreported = left, unreported
        if left < REPORTS_PER_SECOND:
            self._loop.call_later(1.0, self._refill)

    def _refill(self) -> None:
        self.left = REPORTS_PER_SECOND
        self.flush()

    def flush(self) -> None:
        """Report the number of refusals that were left out, if there are any."""
        if self.unreported:
            more, self.unreported = self.unreported, 0
            self._emit(summarise(self._sandbox, more))
