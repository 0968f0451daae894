"""Getting duplicates of what a gate listens on, from a gate that was there before us."""

import logging
from collections.abc import Iterable
from typing import Final

from broker.engines.held import Held, batches
from broker.engines.link import Link, close_all
from broker.gate.control import Listeners, SandboxState, TakeListeners
from broker.wire.errors import CallRefusedError

LOGGER: Final = logging.getLogger(__name__)


async def borrow(link: Link, held: Held, sandboxes: Iterable[SandboxState]) -> None:
    """Have held what of these sandboxes is not yet."""
    for names in batches(state for state in sandboxes if state.spec.id not in held):
        with held.asking(names) as living:
            try:
                answer, fds = await link.request_fds(TakeListeners(names))
            except CallRefusedError as exc:
                LOGGER.warning("the gate's sockets cannot be held: %s", exc)
                return
            what = answer.what if isinstance(answer, Listeners) else ()
            for (sandbox, bus), fd in zip(what, fds, strict=True):
                if sandbox in living:
                    held.adopt(sandbox, bus, fd)
                else:
                    close_all([fd])
