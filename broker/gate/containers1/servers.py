"""The servers that buses with Containers1 make for sandboxes, from claim to end."""

from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from broker.control_protocol.messages import (
    Called,
    ContainerServer,
    ContainerServerLost,
    Event,
    Refused,
)
from broker.gate.containers1.bus_client import BusClients
from broker.gate.io.loop import Loop
from broker.gate.sandbox.sandbox import Sandbox


class ContainerServers:
    """The container servers of all sandboxes, and the connections that hold the servers."""

    def __init__(
        self,
        loop: Loop,
        sandboxes: Mapping[str, Sandbox],
        emit: Callable[[Event], None],
        answer: Callable[[int, Called | Refused], None],
    ) -> None:
        self.bus_clients: Final = BusClients(loop, self)
        self._sandboxes: Final = sandboxes
        self._emit: Final = emit
        self._answer: Final = answer

    def set(self, sandbox: Sandbox, bus: str, server: ContainerServer | None) -> None:
        """Set the server of a sandbox on a bus, and end the former server.

        Raises CallRefusedError.
        """
        uid, before = sandbox.spec.uid, sandbox.spec.container_servers.get(bus)
        if server is not None:
            self.bus_clients.claim(sandbox.id, uid, {bus: server})
        if before is not None:  # No other program would end the former server.
            self.bus_clients.stop(uid, {bus: before})
        sandbox.set_container_server(bus, server)
        self.follow(sandbox)

    def follow(self, sandbox: Sandbox) -> None:
        """End the servers of an ended sandbox.

        The servers of a sandbox that does not listen any more stop listening.
        """
        uid, servers = sandbox.spec.uid, sandbox.spec.container_servers
        if sandbox.is_over:
            self.bus_clients.stop(uid, servers)
        elif not sandbox.is_listening:
            for bus, server in servers.items():
                # A connection attempt must be complete before the server stops listening. Otherwise
                # the bus would refuse the connection, or would end a server without connections.
                if server.stop_listening and not sandbox.is_connecting(bus):
                    self.bus_clients.stop_listening(uid, {bus: server})
                    told = msgspec.structs.replace(server, stop_listening="")
                    sandbox.set_container_server(bus, told)

    def answer(self, request_serial: int, answer: Called | Refused) -> None:
        """Answer the supervisor's request with the serial `request_serial`."""
        self._answer(request_serial, answer)

    def instance_removed(self, sandbox: str, bus: str) -> None:
        """End a sandbox whose server a bus has ended."""
        found = self._sandboxes.get(sandbox)
        if found is None:
            return
        if found.is_listening or found.has_connections(bus):
            found.stop("instance-removed")
        else:  # The server did not listen any more, and the last connection has left.
            found.set_container_server(bus, None)

    def server_lost(self, sandbox: str, bus: str) -> None:
        """Tell the supervisor, which recreates the server.

        Connections to the bus wait meanwhile.
        """
        if (found := self._sandboxes.get(sandbox)) is not None:
            found.set_container_server(bus, ContainerServer())
            self._emit(ContainerServerLost(sandbox, bus))
