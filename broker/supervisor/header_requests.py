"""Connections that requested the instance field (RequestHeader).

The instance field is header field 10, and carries the sender's instance path. A request is in force at the gate,
then stored, then answered. A new gate is told of all requests again. Requests on a bus that restarted are void.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from broker.engines.base import Engine
from broker.supervisor.storage.state_file import StateFile
from broker.supervisor.watches.watches import NameWatch
from broker.wire.errors import CallRefusedError

LOGGER: Final = logging.getLogger(__name__)
Later = Callable[..., None]


class InstanceFieldRequests:
    """All connections with a request, as (bus, unique name)."""

    def __init__(
        self, state: StateFile, engine: Engine, watches: Mapping[str, NameWatch], later: Later
    ) -> None:
        self._state: Final = state
        self._engine: Final = engine
        self._watches: Final = watches
        self._later: Final = later  # called with a job's subject and the job
        self._connections: Final = dict.fromkeys(state.load_field_requests())
        for bus, unique_name in list(self._connections):
            if bus in watches:
                watches[bus].add(unique_name)
            else:  # the bus is no longer configured
                self._forget(bus, unique_name)

    async def add(self, bus: str, unique_name: str) -> None:
        """Add the instance field to messages for a connection. Raises as the engine and the state do.

        The connection must be watched since before the credentials were read, until this returns.
        """
        await self._engine.request_instance_field(bus, unique_name)
        if unique_name not in self._watches[bus]:
            # The connection left meanwhile, and no later event will say so.
            self._withdraw(bus, unique_name)
        elif (bus, unique_name) not in self._connections:
            self._state.put_field_request(bus, unique_name)
            self._connections[bus, unique_name] = None
            self._watches[bus].add(unique_name)

    @property
    def connections(self) -> list[tuple[str, str]]:
        """All connections with a request."""
        return list(self._connections)

    def request_again(self) -> None:
        """Repeat all requests, because the gate may be a new process."""
        for bus, unique_name in self._connections:
            self._later(unique_name, partial(self._engine.request_instance_field, bus, unique_name))

    def gone(self, bus: str, unique_name: str) -> None:
        """Take note that a connection left the bus."""
        if (bus, unique_name) in self._connections:
            self._forget(bus, unique_name)
            self._withdraw(bus, unique_name)

    def bus_back(self, bus: str, *, is_same: bool) -> None:
        """Watch the connections on a reconnected bus again; drop those on another bus."""
        for its_bus, unique_name in list(self._connections):
            if its_bus == bus and is_same:
                self._watches[bus].add(unique_name)
            elif its_bus == bus:
                self.gone(bus, unique_name)

    def _withdraw(self, bus: str, unique_name: str) -> None:
        job = partial(self._engine.request_instance_field, bus, unique_name, wanted=False)
        self._later(unique_name, job)

    def _forget(self, bus: str, unique_name: str) -> None:
        del self._connections[bus, unique_name]
        try:
            self._state.delete_field_request(bus, unique_name)
        except CallRefusedError as exc:  # the next supervisor finds that the name has no owner
            LOGGER.warning("%s: %s", unique_name, exc)
