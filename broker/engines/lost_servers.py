"""Which servers of buses sandboxes have, in the gate's words, and seeing to those that are lost.

Rule: a server that is lost is in the queue or being seen to, once and not twice, until whoever sees to it has seen that
it is lost no more. So what the gate says meanwhile is written down and nothing else.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Final

import msgspec
import trio

from broker.control_protocol.messages import (
    ContainerServer,
    SandboxSpec,
    SetContainerServer,
    Snapshot,
)
from broker.engines.base import EngineLostError
from broker.wire.errors import CallRefusedError
from policy.rules import AccessList

LOGGER: Final = logging.getLogger(__name__)
# Servers that one bus is asked for at the same time, when it has started anew.
MAX_MENDING: Final = 16
LOST: Final = ContainerServer()
FIRST_PAUSE: Final = 0.1  # seconds, before a bus that is not there is asked again; it doubles
LONGEST_PAUSE: Final = 5.0
# Raises CallRefusedError or EngineLostError if the bus or the gate is not there yet.
Mend = Callable[[SandboxSpec, str], Awaitable[None]]


class ContainerServerTable:
    """Sandboxes of which a bus has a server, or had one that is lost."""

    def __init__(self) -> None:
        self._specs: Final[dict[str, SandboxSpec]] = {}
        self._lost: Final[set[tuple[str, str]]] = set()  # in the queue or being seen to
        # Cannot grow without bound: one for each sandbox and bus.
        self._queue_in, self._queue = trio.open_memory_channel[tuple[str, str]](math.inf)

    def __iter__(self) -> Iterator[SandboxSpec]:
        return iter(self._specs.values())

    def get(self, sandbox: str) -> SandboxSpec | None:
        """Return one, without what it listens on; None if no bus has a server for it."""
        return self._specs.get(sandbox)

    def upstreams(self, sandbox: str) -> Mapping[str, ContainerServer]:
        """Return its servers, by bus."""
        spec = self._specs.get(sandbox)
        return spec.container_servers if spec is not None else {}

    def is_lost(self, sandbox: str, bus: str) -> bool:
        """Say whether it is to have a server there, and has none."""
        upstream = self.upstreams(sandbox).get(bus)
        return upstream is not None and not upstream.instance

    def learn(self, snapshot: Snapshot) -> None:
        """Know what is in a snapshot, and nothing else."""
        self._specs.clear()
        for state in snapshot.sandboxes:
            self.keep(state.spec)

    def keep(self, spec: SandboxSpec) -> None:
        """Know a sandbox, if it has servers."""
        if spec.container_servers:
            self._specs[spec.id] = msgspec.structs.replace(spec, listeners=(), record=b"")
            for bus in spec.container_servers:
                self._see_to(spec.id, bus)

    def change(self, sandbox: str, bus: str, upstream: ContainerServer | None) -> None:
        """Know which server it has there; None: the gate alone serves it."""
        if (spec := self._specs.get(sandbox)) is None:
            return
        upstreams = {name: one for name, one in spec.container_servers.items() if name != bus}
        upstreams |= {bus: upstream} if upstream is not None else {}
        self._specs[sandbox] = msgspec.structs.replace(spec, container_servers=upstreams)
        self._see_to(sandbox, bus)

    def change_access(self, sandbox: str, access: AccessList) -> SandboxSpec | None:
        """Know which rules it has, and return it."""
        if (spec := self._specs.get(sandbox)) is not None:
            spec = self._specs[sandbox] = msgspec.structs.replace(spec, access=access)
        return spec

    def forget(self, sandbox: str) -> None:
        """It has ended."""
        self._specs.pop(sandbox, None)

    async def set_upstream(
        self, request: SetContainerServer, ask: Callable[[SetContainerServer], Awaitable[None]]
    ) -> None:
        """Have the gate use a server, or none. Raises CallRefusedError and EngineLostError: it is lost as before."""
        sandbox, bus, upstream = request.sandbox, request.bus, request.server
        # Known before it is asked for: if it is lost again before the answer gets here, it is lost.
        self.change(sandbox, bus, upstream)
        try:
            await ask(request)
        except (CallRefusedError, EngineLostError):
            # Unless a snapshot has come meanwhile: that one is right.
            if self.upstreams(sandbox).get(bus) is upstream:
                self.change(sandbox, bus, LOST)
            raise

    async def recreate_lost(self, mend: Mend) -> None:
        """Have those that are lost seen to by `mend`, for ever."""
        # By bus: one that is not there keeps no other one waiting.
        slots: dict[str, trio.Semaphore] = {}

        async def see_to(sandbox: str, bus: str) -> None:
            try:
                async with slots.setdefault(bus, trio.Semaphore(MAX_MENDING)):
                    await self._mend(sandbox, bus, mend)
            finally:
                self._lost.discard((sandbox, bus))

        async with trio.open_nursery() as nursery:
            async for sandbox, bus in self._queue:
                nursery.start_soon(see_to, sandbox, bus)

    async def _mend(self, sandbox: str, bus: str, mend: Mend) -> None:
        pause = FIRST_PAUSE
        while (spec := self._specs.get(sandbox)) and self.is_lost(sandbox, bus):
            try:
                await mend(spec, bus)
            except (CallRefusedError, EngineLostError) as exc:
                if pause == FIRST_PAUSE and self.is_lost(sandbox, bus):
                    LOGGER.warning("%s: its connections to bus %s wait: %s", sandbox, bus, exc)
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _see_to(self, sandbox: str, bus: str) -> None:
        if self.is_lost(sandbox, bus) and (sandbox, bus) not in self._lost:
            self._lost.add((sandbox, bus))
            self._queue_in.send_nowait((sandbox, bus))
