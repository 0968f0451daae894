"""The engine for buses with Containers1, which label connections.

Theory of operation. This engine adds a step to the gate engine. Before the gate gets a sandbox, each bus of the
sandbox that has Containers1 is asked to make a container server, and the gate connects there:

    supervisor                      gate                              bus
    CallBus(AddServer)       ->     over its own connection    ->     makes a server (instance path, address)
    AddSandbox, with the     ->     listens
    container servers
                                    app connects; connects     ->     labels the connection
                                    to the server's address

All calls go over a connection of the gate (broker/gate/containers1/bus_client.py). A bus ends a server when the
server's creator leaves, and a supervisor leaves more often than a gate. The servers of a sandbox are stored in the
gate (`SandboxSpec.container_servers`) and come back in the snapshot.

The servers are lost when the bus or the gate starts anew. The gate then lets the sandbox's new connections wait
until the engine has recreated the servers (lost_servers.py).

If the operator chose this engine, labels are required. If not, a bus without Containers1 is served by the gate
alone, and the log says so.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import trio

from broker.control_protocol.messages import (
    BusSpec,
    CallBus,
    Called,
    ContainerServer,
    ContainerServerLost,
    SandboxSpec,
    SetContainerServer,
    Snapshot,
)
from broker.engines.base import EngineLostError, Listener
from broker.engines.containers1_client import UNDO_TIMEOUT, Containers1Client
from broker.engines.containers1_dialect import instance_paths
from broker.engines.gate_engine import SHUTDOWN_TIMEOUT, GateEngine
from broker.engines.gate_process import GateError
from broker.engines.lost_servers import LOST
from broker.wire.errors import (
    DISCONNECTED,
    LIMITS_EXCEEDED,
    NO_REPLY,
    NOT_SUPPORTED,
    CallRefusedError,
)
from broker.wire.interfaces import CONTAINERS1
from policy.rules import AccessList

LOGGER: Final = logging.getLogger(__name__)


class Containers1Engine(GateEngine):
    """A gate engine that uses the container servers of buses."""

    def __init__(
        self,
        *,
        control: Path,
        buses: Sequence[BusSpec],
        command: Sequence[str] | None = None,
        is_required: bool = False,
    ) -> None:
        super().__init__(control=control, buses=buses, command=command)
        self._is_required: Final = is_required
        self._has_sandboxes = False
        self._client: Final = Containers1Client(self._call)
        self._buses_are_known: Final = trio.Event()

    @property
    def name(self) -> str:
        serving = map(self.serving, self._bus_names)
        return "containers1" if "containers1" in serving else "gate"

    def serving(self, bus: str) -> str:
        # A bus that sandboxes wait for will label connections, though it cannot be asked now.
        is_awaited = any(self._servers.is_lost(spec.id, bus) for spec in self._servers)
        return "containers1" if is_awaited or self._client.supports(bus) else "gate"

    async def keep_connected(
        self, listener: Listener, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep a gate running and connected until `shutdown`, or cancelled.

        Raises GateError, also if labels are required and a bus has no Containers1.
        """
        keep_gate = partial(super().keep_connected, listener)
        async with trio.open_nursery() as nursery:
            await nursery.start(keep_gate)
            try:
                await self._ask_buses()
            except GateError:
                if not self._has_sandboxes:  # the gate was started in vain
                    with trio.move_on_after(2 * SHUTDOWN_TIMEOUT, shield=True):
                        await self.shutdown()
                raise
            self._buses_are_known.set()
            task_status.started()
            while await self._wait_link() is not None:
                await self._link_changed.wait()
            nursery.cancel_scope.cancel()

    async def add(self, spec: SandboxSpec, fds: Sequence[int]) -> None:
        servers: dict[str, ContainerServer] = {}
        try:
            for listener in spec.listeners:
                server = await self._make_server(spec, listener.bus)
                if server is not None:
                    servers[listener.bus] = server
            whole = msgspec.structs.replace(spec, container_servers=servers)
            self._servers.keep(whole)
            await super().add(whole, fds)
        except BaseException:
            self._servers.forget(spec.id)
            # Should this fail, the gate ends the servers when this supervisor is gone.
            for bus, server in servers.items():
                with trio.move_on_after(UNDO_TIMEOUT, shield=True):
                    await self._client.stop_server(spec.uid, bus, server)
            raise

    async def set_access(self, sandbox: str, access: AccessList) -> None:
        await super().set_access(sandbox, access)
        if (spec := self._servers.change_access(sandbox, access)) is not None:
            for bus, instance in instance_paths(spec.container_servers).items():
                await self._client.set_access(spec, bus, instance)

    async def stop_listening(self, sandbox: str) -> None:
        spec = self._servers.get(sandbox)
        await super().stop_listening(sandbox)
        await self._client.sync(spec)

    async def stop(self, sandbox: str, reason: str = "stopped") -> None:
        spec = self._servers.get(sandbox)
        await super().stop(sandbox, reason)
        await self._client.sync(spec)

    def bus_restarted(self, bus: str) -> None:
        self._client.forget(bus)

    # -- the buses --------------------------------------------------------------------------------------

    async def _ask_buses(self) -> None:
        for bus in self._bus_names:
            try:
                dialect = await self._client.dialect(bus, os.geteuid())
            except (CallRefusedError, EngineLostError) as exc:
                dialect = None
                if self._is_required:
                    raise GateError(f"bus {bus} cannot label its connections: {exc}") from exc
                LOGGER.warning("bus %s: the gate alone serves this bus: %s", bus, exc)
            if dialect is None and self._is_required:
                raise GateError(
                    f"bus {bus} has no {CONTAINERS1}: leave --engine out, or use --engine gate"
                )
            if dialect is not None:
                LOGGER.info("bus %s has %s, and labels connections", bus, CONTAINERS1)

    # -- container servers ---------------------------------------------------------------------------------

    async def _make_server(self, spec: SandboxSpec, bus: str) -> ContainerServer | None:
        """Ask a bus to make a server; None if the gate alone will serve. Raises CallRefusedError."""
        try:
            server = await self._client.add_server(spec, bus)
        except CallRefusedError as exc:
            if self._is_required or exc.dbus_name == LIMITS_EXCEEDED:
                raise CallRefusedError(exc.dbus_name, f"bus {bus}: {exc}") from exc
            LOGGER.warning("%s: the gate alone serves it on bus %s: %s", spec.id, bus, exc)
            return None
        if server is None and self._is_required:
            text = f"bus {bus} has no {CONTAINERS1}, which --engine containers1 requires"
            raise CallRefusedError(NOT_SUPPORTED, text)
        return server

    async def _call(self, request: CallBus) -> Called:
        answer = await self._request(request)
        if not isinstance(answer, Called):
            raise EngineLostError(f"the gate answered CallBus with {type(answer).__name__}")
        return answer

    # -- lost servers -------------------------------------------------------------------------------------

    def learn(self, snapshot: Snapshot) -> None:
        super().learn(snapshot)
        self._has_sandboxes = bool(snapshot.sandboxes)
        for state in snapshot.sandboxes if self._is_required else ():
            buses = {one.bus for one in state.spec.listeners} - set(state.spec.container_servers)
            for bus in sorted(buses):
                LOGGER.warning(
                    "%s: this older sandbox is not labelled on bus %s", state.spec.id, bus
                )

    def lose(self, event: ContainerServerLost) -> None:
        if (spec := self._servers.get(event.sandbox)) is not None:
            self._client.forget(event.bus, spec.uid)
        super().lose(event)

    def restored(self, spec: SandboxSpec) -> SandboxSpec:
        # The buses are asked once the gate has the sandbox. A bus that certainly has no Containers1
        # is not asked, because connections would wait for its answer.
        buses = [listener.bus for listener in spec.listeners]
        may_label = partial(self._client.may_label, uid=spec.uid)
        servers = {bus: LOST for bus in buses if self._is_required or may_label(bus)}
        spec = msgspec.structs.replace(spec, container_servers=servers)
        self._servers.keep(spec)
        return spec

    async def _recreate(self, spec: SandboxSpec, bus: str) -> None:
        """Ask a bus for another server, or serve the sandbox without one."""
        await self._buses_are_known.wait()
        try:
            server = await self._client.add_server(spec, bus)
            if server is None:
                raise CallRefusedError(NOT_SUPPORTED, f"the bus has no {CONTAINERS1} any more")
            await self._put_into_use(spec, bus, server)
        except CallRefusedError as exc:
            # If labels are required, the only choice is to wait for a bus that does not answer.
            is_slow = exc.dbus_name == NO_REPLY and self._is_required
            if exc.dbus_name == DISCONNECTED or is_slow or self._servers.get(spec.id) is None:
                raise
            await self._do_without(spec, bus, exc)

    async def _put_into_use(self, spec: SandboxSpec, bus: str, server: ContainerServer) -> None:
        """Tell the gate to use a new server. Raises CallRefusedError and EngineLostError."""
        try:
            await self._servers.set_server(SetContainerServer(spec.id, bus, server), self._ask)
        except CallRefusedError:
            # If a snapshot that came meanwhile lists this server, the gate uses it.
            if not self._has(spec.id, bus, server):
                with trio.move_on_after(UNDO_TIMEOUT, shield=True):
                    await self._client.stop_server(spec.uid, bus, server)
            raise
        told = spec.access  # the rules with which the bus made the server
        while (now := self._servers.get(spec.id)) is not None and now.access != told:
            if not self._has(spec.id, bus, server):
                return
            await self._client.set_access(now, bus, server.instance)
            told = now.access

    def _has(self, sandbox: str, bus: str, server: ContainerServer) -> bool:
        known = self._servers.servers(sandbox).get(bus)
        return known is not None and known.instance == server.instance

    async def _do_without(self, spec: SandboxSpec, bus: str, exc: CallRefusedError) -> None:
        """Serve a sandbox by the gate alone, or end it if labels are required."""
        if self._is_required:
            LOGGER.error("%s: ended, because bus %s refuses it: %s", spec.id, bus, exc)
            await self.stop(spec.id)
            self.forget(spec.id)
        else:
            LOGGER.warning("%s: the gate alone serves it on bus %s: %s", spec.id, bus, exc)
            await self._servers.set_server(SetContainerServer(spec.id, bus, None), self._ask)

    @property
    def _bus_names(self) -> Iterable[str]:
        return [bus.name for bus in self._buses]
