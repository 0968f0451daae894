"""Who wants header field 10, the sender's instance path, on what sandboxes send: connections, for as long as they last.

A wish is in force at the gate, then stored, then answered, as all that we change. A gate that is new
is told all of them again; those of a bus that is another one now are void.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from broker.engines.base import Engine
from broker.supervisor.storage.state_file import StateFile
from broker.supervisor.watches.watches import Watch
from broker.wire.errors import CallRefusedError

LOGGER: Final = logging.getLogger(__name__)
Later = Callable[..., None]


class InstanceFieldRequests:
    """All wishes: (bus, unique name)."""

    def __init__(
        self, state: StateFile, engine: Engine, watches: Mapping[str, Watch], later: Later
    ) -> None:
        self._state: Final = state
        self._engine: Final = engine
        self._watches: Final = watches
        self._later: Final = later  # called with what a job is about, and the job
        self._wishes: Final = dict.fromkeys(state.load_tags())
        for bus, unique_name in list(self._wishes):
            if bus in watches:
                watches[bus].add(unique_name)
            else:  # it is configured no more
                self._forget(bus, unique_name)

    async def add(self, bus: str, unique_name: str) -> None:
        """Have this connection's messages carry the path. Raises as the engine and the state do.

        It must be watched since before its credentials were asked for, until this returns.
        """
        await self._engine.request_instance_field(bus, unique_name)
        if unique_name not in self._watches[bus]:
            # It left meanwhile, and nobody will tell us again.
            self._untag(bus, unique_name)
        elif (bus, unique_name) not in self._wishes:
            self._state.put_tag(bus, unique_name)
            self._wishes[bus, unique_name] = None
            self._watches[bus].add(unique_name)

    @property
    def wishes(self) -> list[tuple[str, str]]:
        """All of them."""
        return list(self._wishes)

    def tell_again(self) -> None:
        """The gate may be a new one."""
        for bus, unique_name in self._wishes:
            self._later(unique_name, partial(self._engine.request_instance_field, bus, unique_name))

    def gone(self, bus: str, unique_name: str) -> None:
        """A connection left its bus."""
        if (bus, unique_name) in self._wishes:
            self._forget(bus, unique_name)
            self._untag(bus, unique_name)

    def bus_back(self, bus: str, *, is_same: bool) -> None:
        """There is a new connection to a bus, with a watch over nobody; or it is another bus."""
        for its_bus, unique_name in list(self._wishes):
            if its_bus == bus and is_same:
                self._watches[bus].add(unique_name)
            elif its_bus == bus:
                self.gone(bus, unique_name)

    def _untag(self, bus: str, unique_name: str) -> None:
        job = partial(self._engine.request_instance_field, bus, unique_name, wanted=False)
        self._later(unique_name, job)

    def _forget(self, bus: str, unique_name: str) -> None:
        del self._wishes[bus, unique_name]
        try:
            self._state.delete_tag(bus, unique_name)
        except CallRefusedError as exc:  # whoever loads it finds that nobody has that name
            LOGGER.warning("%s: %s", unique_name, exc)
