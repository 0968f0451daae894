"""The engine for buses that have Containers1 themselves: such a bus labels each connection, and the gate enforces.

Theory of operation. It is the gate engine, and before the gate gets a sandbox each of its buses that can is asked to
make a server for it; the gate makes the sandbox's connections there. All that the bus is asked goes over a connection of the
gate's (broker/gate/containers1/bus_client.py), for the bus ends a server when whoever asked for it leaves, and that must not be us. What
belongs together stands in the gate (`SandboxSpec.upstreams`) and comes back in its snapshot.
When a bus or the gate starts anew its servers are gone: the gate lets connections wait, and we have them made again
(upkeep.py).
Whoever says that this engine is to be used wants labels or nothing; if nobody says, a bus without them is
served by the gate alone, and the log says so.
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
from broker.engines.containers1_dialect import describe
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
    """The gate, and buses that label."""

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
        self._labels: Final = Containers1Client(self._call)
        self._looked: Final = trio.Event()  # at the buses

    @property
    def name(self) -> str:
        """Which engine this is."""
        serving = map(self.serving, self._bus_names)
        return "containers1" if "containers1" in serving else "gate"

    def serving(self, bus: str) -> str:
        """Return the engine that new sandboxes are served by on that bus."""
        # A bus that sandboxes wait for is to label, though nobody can ask it now.
        is_awaited = any(self._upkeep.is_lost(spec.id, bus) for spec in self._upkeep)
        return "containers1" if is_awaited or self._labels.supports(bus) else "gate"

    async def keep_connected(
        self, listener: Listener, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Have a gate, until `shutdown` or cancelled. Raises GateError, also if a bus does not label and must."""
        keep_gate = partial(super().keep_connected, listener)
        async with trio.open_nursery() as nursery:
            await nursery.start(keep_gate)
            try:
                await self._look_at_buses()
            except GateError:
                if not self._has_sandboxes:  # it was started for nothing
                    with trio.move_on_after(2 * SHUTDOWN_TIMEOUT, shield=True):
                        await self.shutdown()
                raise
            self._looked.set()
            task_status.started()
            while await self._wait_link() is not None:
                await self._link_changed.wait()
            nursery.cancel_scope.cancel()

    async def add(self, spec: SandboxSpec, fds: Sequence[int]) -> None:
        upstreams: dict[str, ContainerServer] = {}
        try:
            for listener in spec.listeners:
                upstream = await self._make_or_do_without(spec, listener.bus)
                if upstream is not None:
                    upstreams[listener.bus] = upstream
            whole = msgspec.structs.replace(spec, container_servers=upstreams)
            self._upkeep.keep(whole)
            await super().add(whole, fds)
        except BaseException:
            self._upkeep.forget(spec.id)
            # If we cannot, the gate does when we are gone.
            for bus, upstream in upstreams.items():
                with trio.move_on_after(UNDO_TIMEOUT, shield=True):
                    await self._labels.stop_server(spec.uid, bus, upstream)
            raise

    async def set_access(self, sandbox: str, access: AccessList) -> None:
        await super().set_access(sandbox, access)
        if (spec := self._upkeep.change_access(sandbox, access)) is not None:
            for bus, instance in describe(spec.container_servers).items():
                await self._labels.set_access(spec, bus, instance)

    async def stop_listening(self, sandbox: str) -> None:
        spec = self._upkeep.get(sandbox)
        await super().stop_listening(sandbox)
        await self._labels.sync(spec)

    async def stop(self, sandbox: str, reason: str = "stopped") -> None:
        spec = self._upkeep.get(sandbox)
        await super().stop(sandbox, reason)
        await self._labels.sync(spec)

    def bus_restarted(self, bus: str) -> None:
        self._labels.forget(bus)

    # -- what a bus has ---------------------------------------------------------------------------------

    async def _look_at_buses(self) -> None:
        for bus in self._bus_names:
            try:
                dialect = await self._labels.dialect(bus, os.geteuid())
            except (CallRefusedError, EngineLostError) as exc:
                dialect = None
                if self._is_required:
                    raise GateError(f"bus {bus} cannot label its connections: {exc}") from exc
                LOGGER.warning("bus %s: the gate alone serves it: %s", bus, exc)
            if dialect is None and self._is_required:
                raise GateError(
                    f"bus {bus} has no {CONTAINERS1}: leave --engine out, or say --engine gate"
                )
            if dialect is not None:
                LOGGER.info("bus %s: it has %s, and labels what sandboxes do", bus, CONTAINERS1)

    # -- its servers ---------------------------------------------------------------------------------------

    async def _make_or_do_without(self, spec: SandboxSpec, bus: str) -> ContainerServer | None:
        """Have the bus make a server. Raises CallRefusedError, unless the gate alone will do."""
        try:
            upstream = await self._labels.add_server(spec, bus)
        except CallRefusedError as exc:
            if self._is_required or exc.dbus_name == LIMITS_EXCEEDED:
                raise CallRefusedError(exc.dbus_name, f"bus {bus}: {exc}") from exc
            LOGGER.warning("%s: the gate alone serves it on bus %s: %s", spec.id, bus, exc)
            return None
        if upstream is None and self._is_required:
            text = f"bus {bus} has no {CONTAINERS1}, and --engine containers1 was asked for"
            raise CallRefusedError(NOT_SUPPORTED, text)
        return upstream

    async def _call(self, request: CallBus) -> Called:
        answer = await self._request(request)
        if not isinstance(answer, Called):
            raise EngineLostError(f"the gate answered CallBus with {type(answer).__name__}")
        return answer

    # -- losing them --------------------------------------------------------------------------------------

    def learn(self, snapshot: Snapshot) -> None:
        super().learn(snapshot)
        self._has_sandboxes = bool(snapshot.sandboxes)
        for state in snapshot.sandboxes if self._is_required else ():
            buses = {one.bus for one in state.spec.listeners} - set(state.spec.container_servers)
            for bus in sorted(buses):
                LOGGER.warning("%s: it is older, and not labelled on bus %s", state.spec.id, bus)

    def lose(self, event: ContainerServerLost) -> None:
        if (spec := self._upkeep.get(event.sandbox)) is not None:
            self._labels.forget(event.bus, spec.uid)
        super().lose(event)

    def restored(self, spec: SandboxSpec) -> SandboxSpec:
        """Return a sandbox as a new gate is to have it: its buses will be asked once it has it."""
        # What is sure not to label need not be asked again, while connections wait for the answer.
        buses = [listener.bus for listener in spec.listeners]
        may_label = partial(self._labels.may_label, uid=spec.uid)
        upstreams = {bus: LOST for bus in buses if self._is_required or may_label(bus)}
        spec = msgspec.structs.replace(spec, container_servers=upstreams)
        self._upkeep.keep(spec)
        return spec

    async def _mend(self, spec: SandboxSpec, bus: str) -> None:
        """Have the bus make another server, or do without."""
        await self._looked.wait()
        try:
            upstream = await self._labels.add_server(spec, bus)
            if upstream is None:
                raise CallRefusedError(NOT_SUPPORTED, f"it has no {CONTAINERS1} any more")
            await self._use(spec, bus, upstream)
        except CallRefusedError as exc:
            # Who must have labels can only wait for a bus that does not answer.
            is_slow = exc.dbus_name == NO_REPLY and self._is_required
            if exc.dbus_name == DISCONNECTED or is_slow or self._upkeep.get(spec.id) is None:
                raise
            await self._do_without(spec, bus, exc)

    async def _use(self, spec: SandboxSpec, bus: str, upstream: ContainerServer) -> None:
        """Have the gate use a server that was made. Raises CallRefusedError and EngineLostError."""
        try:
            await self._upkeep.set_upstream(SetContainerServer(spec.id, bus, upstream), self._ask)
        except CallRefusedError:
            # A snapshot that came meanwhile may have it: then it is in use.
            if not self._has(spec.id, bus, upstream):
                with trio.move_on_after(UNDO_TIMEOUT, shield=True):
                    await self._labels.stop_server(spec.uid, bus, upstream)
            raise
        told = spec.access  # with which it was made
        while (now := self._upkeep.get(spec.id)) is not None and now.access != told:
            if not self._has(spec.id, bus, upstream):
                return
            await self._labels.set_access(now, bus, upstream.instance)
            told = now.access

    def _has(self, sandbox: str, bus: str, upstream: ContainerServer) -> bool:
        known = self._upkeep.upstreams(sandbox).get(bus)
        return known is not None and known.instance == upstream.instance

    async def _do_without(self, spec: SandboxSpec, bus: str, exc: CallRefusedError) -> None:
        """Serve it by the gate alone, or end it if that will not do."""
        if self._is_required:
            LOGGER.error("%s: bus %s does not take it again: %s: ended", spec.id, bus, exc)
            await self.stop(spec.id)
            self.forget(spec.id)
        else:
            LOGGER.warning("%s: the gate alone serves it on bus %s: %s", spec.id, bus, exc)
            await self._upkeep.set_upstream(SetContainerServer(spec.id, bus, None), self._ask)

    @property
    def _bus_names(self) -> Iterable[str]:
        return [bus.name for bus in self._buses]
