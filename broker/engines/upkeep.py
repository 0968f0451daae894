"""Which servers of buses sandboxes have, in the gate's words, and seeing to those that are lost.

Rule: a server that is lost is in the queue or being seen to, once and not twice, until whoever sees to it has seen that
it is lost no more. So what the gate says meanwhile is written down and nothing else.
"""

import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Final

import msgspec
import trio

from broker.gate.control import SandboxSpec, Snapshot
from broker.gate.upstream import Upstream
from policy.rules import AccessList

# Servers that one bus is asked for at the same time, when it has started anew.
MAX_MENDING: Final = 16
LOST: Final = Upstream()


class Upkeep:
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

    def upstreams(self, sandbox: str) -> Mapping[str, Upstream]:
        """Return its servers, by bus."""
        spec = self._specs.get(sandbox)
        return spec.upstreams if spec is not None else {}

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
        if spec.upstreams:
            self._specs[spec.id] = msgspec.structs.replace(spec, listeners=(), record=b"")
            for bus in spec.upstreams:
                self._see_to(spec.id, bus)

    def change(self, sandbox: str, bus: str, upstream: Upstream | None) -> None:
        """Know which server it has there; None: the gate alone serves it."""
        if (spec := self._specs.get(sandbox)) is None:
            return
        upstreams = {name: one for name, one in spec.upstreams.items() if name != bus}
        upstreams |= {bus: upstream} if upstream is not None else {}
        self._specs[sandbox] = msgspec.structs.replace(spec, upstreams=upstreams)
        self._see_to(sandbox, bus)

    def change_access(self, sandbox: str, access: AccessList) -> SandboxSpec | None:
        """Know which rules it has, and return it."""
        if (spec := self._specs.get(sandbox)) is not None:
            spec = self._specs[sandbox] = msgspec.structs.replace(spec, access=access)
        return spec

    def forget(self, sandbox: str) -> None:
        """It has ended."""
        self._specs.pop(sandbox, None)

    async def see_to_lost(self, mend: Callable[[str, str], Awaitable[None]]) -> None:
        """Have those that are lost seen to by `mend`, which takes sandbox and bus, for ever."""
        slots: dict[
            str, trio.Semaphore
        ] = {}  # one bus that is not there keeps no other one waiting

        async def see_to(sandbox: str, bus: str) -> None:
            try:
                async with slots.setdefault(bus, trio.Semaphore(MAX_MENDING)):
                    await mend(sandbox, bus)
            finally:
                self._lost.discard((sandbox, bus))

        async with trio.open_nursery() as nursery:
            async for sandbox, bus in self._queue:
                nursery.start_soon(see_to, sandbox, bus)

    def _see_to(self, sandbox: str, bus: str) -> None:
        if self.is_lost(sandbox, bus) and (sandbox, bus) not in self._lost:
            self._lost.add((sandbox, bus))
            self._queue_in.send_nowait((sandbox, bus))
