"""Getting duplicates of what a gate listens on, from a gate that was there before us."""

import logging
from collections.abc import Iterable, Iterator
from typing import Final

from broker.engines.held import Held
from broker.engines.link import Link, close_all
from broker.gate.control import Listeners, SandboxState, TakeListeners
from broker.wire.errors import CallRefusedError

LOGGER: Final = logging.getLogger(__name__)
# Well below what one frame may carry.
_FDS_A_REQUEST: Final = 200


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


def batches(states: Iterator[SandboxState]) -> Iterator[tuple[str, ...]]:
    """Return names of sandboxes, as many at a time as have not too many descriptors."""
    names: list[str] = []
    count = 0
    for state in states:
        its = len(state.spec.listeners) + 1
        if names and count + its > _FDS_A_REQUEST:
            yield tuple(names)
            names, count = [], 0
        names.append(state.spec.id)
        count += its
    if names:
        yield tuple(names)
