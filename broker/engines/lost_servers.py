"""The container servers of sandboxes, and the task that recreates lost servers.

Rule: a lost server is either queued or being recreated, and only once, until the task has seen the server's
return. So a message of the gate in the meantime changes the table and nothing else.

    gate: ContainerServerLost(c1, session)     table: lost      queue: (c1, session)
    task: takes the entry, asks the bus for another server
    gate: ContainerServerLost(c1, session)     table: lost      (being recreated, so not queued again)
    task: tells the gate to use the new server table: present
    task: sees the server, and ends
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
from broker.engines.backoff import ExponentialBackoff
from broker.engines.base import EngineLostError
from broker.wire.errors import CallRefusedError
from policy.rules import AccessList

LOGGER: Final = logging.getLogger(__name__)
# Servers that a bus is asked for at the same time, after a restart.
MAX_RECREATING: Final = 16
LOST: Final = ContainerServer()
FIRST_PAUSE: Final = 0.1  # seconds, before an absent bus is asked again; doubles
LONGEST_PAUSE: Final = 5.0
# Raises CallRefusedError or EngineLostError if the bus or the gate is not back yet.
Recreate = Callable[[SandboxSpec, str], Awaitable[None]]


class ContainerServerTable:
    """Sandboxes with a container server on a bus, present or lost."""

    def __init__(self) -> None:
        self._specs: Final[dict[str, SandboxSpec]] = {}
        self._lost: Final[set[tuple[str, str]]] = set()  # queued or being recreated
        # Bounded: holds at most an entry for each sandbox and bus.
        self._queue_in, self._queue = trio.open_memory_channel[tuple[str, str]](math.inf)

    def __iter__(self) -> Iterator[SandboxSpec]:
        return iter(self._specs.values())

    def get(self, sandbox: str) -> SandboxSpec | None:
        """Return a sandbox without the listeners; None if no bus has a server."""
        return self._specs.get(sandbox)

    def servers(self, sandbox: str) -> Mapping[str, ContainerServer]:
        """Return the servers of a sandbox by bus."""
        spec = self._specs.get(sandbox)
        return spec.container_servers if spec is not None else {}

    def is_lost(self, sandbox: str, bus: str) -> bool:
        """Return whether a sandbox's server on a bus is lost."""
        server = self.servers(sandbox).get(bus)
        return server is not None and not server.instance

    def learn(self, snapshot: Snapshot) -> None:
        """Replace the table by the sandboxes of a snapshot."""
        self._specs.clear()
        for state in snapshot.sandboxes:
            self.keep(state.spec)

    def keep(self, spec: SandboxSpec) -> None:
        """Add a sandbox that has servers, and ignore others."""
        if spec.container_servers:
            self._specs[spec.id] = msgspec.structs.replace(spec, listeners=(), record=b"")
            for bus in spec.container_servers:
                self._queue_if_lost(spec.id, bus)

    def change(self, sandbox: str, bus: str, server: ContainerServer | None) -> None:
        """Record the server of a sandbox on a bus; None if the gate alone serves there."""
        if (spec := self._specs.get(sandbox)) is None:
            return
        servers = {name: one for name, one in spec.container_servers.items() if name != bus}
        servers |= {bus: server} if server is not None else {}
        self._specs[sandbox] = msgspec.structs.replace(spec, container_servers=servers)
        self._queue_if_lost(sandbox, bus)

    def change_access(self, sandbox: str, access: AccessList) -> SandboxSpec | None:
        """Record a sandbox's rules; return the sandbox, None if no bus has a server."""
        if (spec := self._specs.get(sandbox)) is not None:
            spec = self._specs[sandbox] = msgspec.structs.replace(spec, access=access)
        return spec

    def forget(self, sandbox: str) -> None:
        """Remove a sandbox that has ended."""
        self._specs.pop(sandbox, None)

    async def set_server(
        self, request: SetContainerServer, ask: Callable[[SetContainerServer], Awaitable[None]]
    ) -> None:
        """Tell the gate which server to use, if any. Raises CallRefusedError and EngineLostError.

        The server counts as lost after an error.
        """
        sandbox, bus, server = request.sandbox, request.bus, request.server
        # Recorded before the request, because the server may be lost again before the answer arrives.
        self.change(sandbox, bus, server)
        try:
            await ask(request)
        except (CallRefusedError, EngineLostError):
            # Unless a snapshot came meanwhile, which is right in any case.
            if self.servers(sandbox).get(bus) is server:
                self.change(sandbox, bus, LOST)
            raise

    async def recreate_lost(self, recreate: Recreate) -> None:
        """Call `recreate` for each lost server until a success. Never returns."""
        # A semaphore for each bus, so that an absent bus does not delay the others.
        slots: dict[str, trio.Semaphore] = {}

        async def recreate_one(sandbox: str, bus: str) -> None:
            try:
                async with slots.setdefault(bus, trio.Semaphore(MAX_RECREATING)):
                    await self._keep_trying(sandbox, bus, recreate)
            finally:
                self._lost.discard((sandbox, bus))

        async with trio.open_nursery() as nursery:
            async for sandbox, bus in self._queue:
                nursery.start_soon(recreate_one, sandbox, bus)

    async def _keep_trying(self, sandbox: str, bus: str, recreate: Recreate) -> None:
        backoff = ExponentialBackoff(FIRST_PAUSE, LONGEST_PAUSE)
        while (spec := self._specs.get(sandbox)) and self.is_lost(sandbox, bus):
            try:
                await recreate(spec, bus)
            except (CallRefusedError, EngineLostError) as exc:
                if backoff.is_first and self.is_lost(sandbox, bus):
                    LOGGER.warning("%s: its connections to bus %s wait: %s", sandbox, bus, exc)
                await trio.sleep(backoff.next())

    def _queue_if_lost(self, sandbox: str, bus: str) -> None:
        if self.is_lost(sandbox, bus) and (sandbox, bus) not in self._lost:
            self._lost.add((sandbox, bus))
            self._queue_in.send_nowait((sandbox, bus))
