"""What buses that have Containers1 made for sandboxes: said to the buses, and heard from them."""

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
    """The buses' own servers of all sandboxes. The host of the gate's own connections."""

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
        """Have a sandbox's connections to a bus made there, and end the server before. Raises CallRefusedError."""
        uid, before = sandbox.spec.uid, sandbox.spec.container_servers.get(bus)
        if server is not None:
            self.bus_clients.claim(sandbox.id, uid, {bus: server})
        if before is not None:  # nobody else ever would
            self.bus_clients.stop(uid, {bus: before})
        sandbox.set_container_server(bus, server)
        self.follow(sandbox)

    def follow(self, sandbox: Sandbox) -> None:
        """Tell the buses what a sandbox has no use for any more."""
        uid, servers = sandbox.spec.uid, sandbox.spec.container_servers
        if sandbox.is_over:
            self.bus_clients.stop(uid, servers)
        elif not sandbox.is_listening:
            for bus, server in servers.items():
                # Who is on the way there would be refused, and a bus ends a server that it has nobody left on.
                if server.stop_listening and not sandbox.is_connecting(bus):
                    self.bus_clients.stop_listening(uid, {bus: server})
                    told = msgspec.structs.replace(server, stop_listening="")
                    sandbox.set_container_server(bus, told)

    def answer(self, asked: int, answer: Called | Refused) -> None:
        """Answer the supervisor's request of that number, later than others."""
        self._answer(asked, answer)

    def instance_removed(self, sandbox: str, bus: str) -> None:
        """The bus ended what it had made for a sandbox, of itself or because somebody asked it to."""
        found = self._sandboxes.get(sandbox)
        if found is None:
            return
        if found.is_listening or found.has_connections(bus):
            found.stop("instance-removed")
        else:  # it took no more connections there, and the last one has left
            found.set_container_server(bus, None)

    def server_lost(self, sandbox: str, bus: str) -> None:
        """A bus has forgotten a sandbox: what connects there waits for the supervisor to have it made again."""
        if (found := self._sandboxes.get(sandbox)) is not None:
            found.set_container_server(bus, ContainerServer())
            self._emit(ContainerServerLost(sandbox, bus))
