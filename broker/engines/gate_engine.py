"""The engine with a separate process: start or find a gate, and stay connected.

Theory of operation. `keep_connected` opens ControlConnections, one after the other. A reader task passes events to
the listener, and answers to the waiting requests, both in the order of the gate.

A gate outlives the supervisor unless there is a request to shut down. When the connection breaks, the next round
finds the same gate again or starts another, and the snapshot tells the listener which sandboxes the gate has:

    supervisor                                gate
    connect, or start a gate and connect
    TakeSnapshot                        ->
                                        <-    Snapshot      (in parts; the listener compares records)
    SetBuses                            ->
    TakeListeners                       ->    only for sandboxes whose sockets the supervisor does not hold
    RequestInstanceField, AddSandbox    ->    only for sandboxes and requests that this gate lacks
    all other requests                  ->

The supervisor holds duplicates of the gate's listening sockets. A new gate gets these back before any other request.
Other requests wait meanwhile, so a gate that dies causes a pause and no error.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

import trio

from broker.control_protocol.messages import (
    PROTOCOL,
    AddSandbox,
    Answer,
    BusSpec,
    ContainerServerLost,
    Done,
    Ended,
    Event,
    Listeners,
    Request,
    RequestInstanceField,
    SandboxOf,
    SandboxSpec,
    SandboxState,
    SetAccess,
    SetBuses,
    SetContainerServer,
    Shutdown,
    Snapshot,
    StopListening,
    StopSandbox,
    TakeListeners,
    TakeSnapshot,
    TakeUsage,
    Usage,
    WhoIs,
)
from broker.engines.base import EngineLostError, Listener
from broker.engines.control_connection import ControlConnection, connect
from broker.engines.crash_reports import last_crash
from broker.engines.gate_process import GateError, GateProcess
from broker.engines.gate_upgrade import upgrade
from broker.engines.held_sockets import PIPE, HeldSockets
from broker.engines.lost_servers import LOST, ContainerServerTable
from broker.engines.restart_limits import RestartLimits
from broker.posix.descriptors import close_fds
from broker.wire.errors import BrokerError, CallRefusedError
from policy.rules import AccessList


class _Engine(Protocol):
    """The part of an engine that gate events concern."""

    def learn(self, snapshot: Snapshot) -> None:
        """Replace the known container servers by those of the gate."""

    def lose(self, event: ContainerServerLost) -> None:
        """Record that a bus has forgotten a sandbox."""

    def restored(self, spec: SandboxSpec) -> SandboxSpec:
        """Return the spec with which a new gate gets a sandbox that another gate served."""

    def forget(self, sandbox: str) -> None:
        """Drop all that is kept of a sandbox that has ended."""


class _ListenerTee:
    """Passes events to the supervisor, those about container servers to the engine."""

    def __init__(self, engine: _Engine, listener: Listener) -> None:
        self._engine: Final = engine
        self._listener: Final = listener

    def take_event(self, event: Event) -> None:
        if isinstance(event, ContainerServerLost):
            self._engine.lose(event)
            return
        self._listener.take_event(event)
        if isinstance(event, Ended):
            self._engine.forget(event.sandbox)

    def take_snapshot(self, snapshot: Snapshot) -> None:
        self._engine.learn(snapshot)
        self._listener.take_snapshot(snapshot)

    def missing(self) -> Sequence[tuple[SandboxSpec, Sequence[int]]]:
        return [(self._engine.restored(spec), fds) for spec, fds in self._listener.missing()]

    def instance_field_wishes(self) -> Sequence[tuple[str, str]]:
        return self._listener.instance_field_wishes()

    def lost(self, sandbox: str) -> None:
        self._engine.forget(sandbox)
        self._listener.lost(sandbox)


# Well below the limit of a frame.
_FDS_A_REQUEST: Final = 200


async def fetch_listening_sockets(
    link: ControlConnection, held: HeldSockets, sandboxes: Iterable[SandboxState]
) -> None:
    """Get from the gate, and hold, the sockets of sandboxes that are not held."""
    for names in _batches(state for state in sandboxes if state.spec.id not in held):
        with held.unless_ended(names) as living:
            try:
                answer, fds = await link.request_fds(TakeListeners(names))
            except CallRefusedError as exc:
                LOGGER.warning("cannot hold the gate's listening sockets: %s", exc)
                return
            what = answer.what if isinstance(answer, Listeners) else ()
            for (sandbox, bus), fd in zip(what, fds, strict=True):
                if sandbox in living:
                    held.adopt(sandbox, bus, fd)
                else:
                    close_fds([fd])


def _batches(states: Iterator[SandboxState]) -> Iterator[tuple[str, ...]]:
    """Yield ids of sandboxes, in groups with few enough descriptors for a frame."""
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


LOGGER: Final = logging.getLogger(__name__)
SHUTDOWN_TIMEOUT: Final = 2.0  # seconds, from the request to the end of the connection
# Seconds that a request waits while the gate is replaced: less than callers on a bus wait for an answer.
GAP_TIMEOUT: Final = 8.0
# Seconds to the first answer. The gate may be busy with an upgrade, which takes less even with 10 000 sandboxes.
GREETING_TIMEOUT: Final = 60.0
COMMAND: Final = (sys.executable, "-P", "-m", "broker.gate")
# The first protocol version whose gates know HandOver.
HANDS_OVER_SINCE: Final = 3


class GateEngine:
    """An engine that serves by a gate, reached at the socket `control`."""

    def __init__(
        self, *, control: Path, buses: Sequence[BusSpec], command: Sequence[str] | None = None
    ) -> None:
        self._control: Final = control
        self._buses: Final = tuple(buses)
        self._process: Final = GateProcess(control, command or COMMAND)
        self.held: Final = HeldSockets()
        self._servers: Final = ContainerServerTable()
        self._link: ControlConnection | None = None
        self._link_changed = trio.Event()
        self._closing = False
        self._is_over = False
        self._served: set[str] = set()  # sandboxes of the gate when the connection was made
        self._limits: Final = RestartLimits()
        self._upgrading: Final = trio.Lock()

    @property
    def name(self) -> str:
        return "gate"

    def serving(self, bus: str) -> str:
        return "gate"

    def instances(self, sandbox: str) -> Mapping[str, str]:
        # There are some if another engine was used before.
        return {bus: one.instance for bus, one in self._servers.servers(sandbox).items()}

    def bus_restarted(self, bus: str) -> None:
        """Do nothing, because the gate notices the restart."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def last_crash(self) -> str:
        return last_crash(self._process.folder)

    async def keep_connected(
        self, listener: Listener, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep a gate running and connected until `shutdown`, or cancelled. Raises GateError if that is impossible."""
        listener = _ListenerTee(self, listener)
        is_ready = False

        def ready() -> None:
            nonlocal is_ready
            if not is_ready:
                is_ready = True
                task_status.started()

        try:
            while not self._closing:
                await self._run_link(listener, ready)
        finally:
            self._is_over = True
            self._set_link(None)
            if not self._closing:  # else `shutdown` waits for it
                self._process.forget()
            self.held.close()

    async def shutdown(self) -> None:
        """End the gate if a supervisor with this folder started it."""
        self._closing = True
        with trio.move_on_after(SHUTDOWN_TIMEOUT) as scope:
            link = await self._wait_link()
            if link is None:
                return
            if not self._process.is_ours:
                self._process.forget()
                link.close()
                return
            try:
                await link.request(Shutdown())
            except BrokerError:
                LOGGER.debug("the gate ended without an answer")
            await link.ended.wait()
        if scope.cancelled_caught:
            LOGGER.warning("gate process %d does not end", self.pid)
        await self._process.wait_exit()
        self._process.forget()

    async def add(self, spec: SandboxSpec, fds: Sequence[int]) -> None:
        with self.held.unless_ended([spec.id]) as living:
            await self._ask(AddSandbox(spec), fds)
            if (
                spec.id not in living
            ):  # the event of the end may arrive in the same read as the answer
                return
            for listener in spec.listeners:
                self.held.keep(spec.id, listener.bus, fds[listener.fd])
            if spec.close_notify is not None:
                self.held.keep(spec.id, PIPE, fds[spec.close_notify])

    async def set_access(self, sandbox: str, access: AccessList) -> None:
        await self._ask(SetAccess(sandbox, access))

    async def stop_listening(self, sandbox: str) -> None:
        await self._ask(StopListening(sandbox))
        self.held.drop_listeners(sandbox)

    async def stop(self, sandbox: str, reason: str = "stopped") -> None:
        await self._ask(StopSandbox(sandbox, reason))

    async def who(self, bus: str, unique_name: str) -> str | None:
        answer = await self._request(WhoIs(bus, unique_name))
        if not isinstance(answer, SandboxOf):
            raise EngineLostError(f"the gate answered WhoIs with {type(answer).__name__}")
        return answer.sandbox

    async def use(self, sandbox: str | None = None) -> Usage:
        answer = await self._request(TakeUsage(sandbox))
        if not isinstance(answer, Usage):
            raise EngineLostError(f"the gate answered TakeUsage with {type(answer).__name__}")
        return answer

    async def request_instance_field(
        self, bus: str, unique_name: str, *, wanted: bool = True
    ) -> None:
        await self._ask(RequestInstanceField(bus, unique_name, wanted))

    async def upgrade(self) -> tuple[int, int]:
        async with self._upgrading:
            old = self.pid
            await upgrade(await self._get_link(), self._process)
            return old, self.pid

    async def _ask(self, request: Request, fds: Sequence[int] = ()) -> None:
        answer = await self._request(request, fds)
        if not isinstance(answer, Done):
            raise EngineLostError(
                f"the gate answered {type(request).__name__} with {type(answer).__name__}"
            )

    async def _request(self, request: Request, fds: Sequence[int] = ()) -> Answer:
        """Send a request and return the answer.

        If the gate dies meanwhile, send to the next gate again.
        Sending twice does no harm, because each request states a result, not a change.
        """
        link = await self._get_link()
        try:
            return await link.request(request, fds)
        except EngineLostError:
            # The container servers of the sandbox ended with the gate that had asked the buses.
            if isinstance(request, AddSandbox) and request.spec.container_servers:
                raise
        link = await self._get_link()
        if isinstance(request, AddSandbox) and request.spec.id in self._served:
            return Done()  # the gate took the sandbox, and only the connection was lost
        return await link.request(request, fds)

    # -- container servers: `_Engine` ----------------------------------------------------------------

    def learn(self, snapshot: Snapshot) -> None:
        self._servers.learn(snapshot)

    def lose(self, event: ContainerServerLost) -> None:
        self._servers.change(event.sandbox, event.bus, LOST)

    def restored(self, spec: SandboxSpec) -> SandboxSpec:
        return spec

    def forget(self, sandbox: str) -> None:
        self.held.end(sandbox)
        self._servers.forget(sandbox)

    async def _recreate_lost(self, link: ControlConnection) -> None:
        """Recreate lost servers until the gate is lost."""
        # The next snapshot lists lost servers again.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._servers.recreate_lost, self._recreate)
            await link.ended.wait()
            nursery.cancel_scope.cancel()

    async def _recreate(self, spec: SandboxSpec, bus: str) -> None:
        """Serve a sandbox by the gate alone, without another server."""
        LOGGER.warning(
            "%s: bus %s lost its container server; the gate alone serves the sandbox now",
            spec.id,
            bus,
        )
        await self._servers.set_server(SetContainerServer(spec.id, bus, None), self._ask)

    # -- the connection ------------------------------------------------------------------------------

    async def _get_link(self) -> ControlConnection:
        link = None
        with trio.move_on_after(GAP_TIMEOUT):
            link = await self._wait_link()
        if link is None:
            raise EngineLostError("no gate is running at the moment: try again later")
        return link

    async def _wait_link(self) -> ControlConnection | None:
        """Wait for a connection, and return None after the last connection."""
        while not self._is_over:
            if self._link is not None and not self._link.ended.is_set():
                return self._link
            await self._link_changed.wait()
        return None

    def _set_link(self, link: ControlConnection | None) -> None:
        self._link = link
        changed, self._link_changed = self._link_changed, trio.Event()
        changed.set()

    async def _run_link(self, listener: Listener, ready: Callable[[], None]) -> None:
        sock = await self._connect_or_start()
        failure: BrokerError | None = None
        begun = trio.current_time()
        with ControlConnection(sock, listener) as link:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.run)
                try:
                    await self._greet(link, listener)
                except (EngineLostError, GateError) as exc:
                    failure = exc
                    nursery.cancel_scope.cancel()
                else:
                    nursery.start_soon(link.confirm_events)
                    nursery.start_soon(self._recreate_lost, link)
                    self._limits.served()
                    self._set_link(link)
                    ready()
        self._set_link(None)
        if isinstance(failure, GateError):
            raise failure
        if not self._closing:
            why = link.broken or "it has another supervisor"
            await self._recover(begun, why if failure is not None else "")

    async def _recover(self, begun: float, refusal: str) -> None:
        """Find out why the connection ended, and wait before the next try."""
        if await self._process.has_died():
            await self._limits.wait_after_death(trio.current_time() - begun)
        elif refusal:
            # A gate that hangs up at once serves another supervisor, or has not noticed that supervisor's death.
            await self._limits.wait_after_refusal(refusal)
        else:
            LOGGER.error("the connection to the gate was lost")

    async def _greet(self, link: ControlConnection, listener: Listener) -> None:
        snapshot = await self._take_first_snapshot(link)
        self._process.keep_moved()
        if isinstance(snapshot, Snapshot) and HANDS_OVER_SINCE <= snapshot.protocol < PROTOCOL:
            # An older supervisor started this gate. The old gate hands over to a gate of this version.
            self._process.watch(snapshot.pid)
            await self._replace(link)
            snapshot = await link.request(TakeSnapshot(in_parts=True))
        if not isinstance(snapshot, Snapshot) or snapshot.protocol != PROTOCOL:
            raise GateError(
                f"the running gate does not speak control protocol {PROTOCOL}: end it first"
            )
        self._limits.accepted()
        self._process.watch(snapshot.pid)
        try:
            await link.request(SetBuses(self._buses))
        except CallRefusedError as exc:
            raise GateError(f"the gate refuses the configured buses: {exc}") from exc
        await fetch_listening_sockets(link, self.held, snapshot.sandboxes)
        self._served = {state.spec.id for state in snapshot.sandboxes}
        await self._restore(link, listener)

    async def _take_first_snapshot(self, link: ControlConnection) -> Answer:
        with trio.move_on_after(GREETING_TIMEOUT):
            return await link.request(TakeSnapshot(in_parts=True))
        text = f"the running gate did not answer in {GREETING_TIMEOUT:.0f} s: end it"
        raise EngineLostError(text) if self._limits.has_served else GateError(text)

    async def _replace(self, link: ControlConnection) -> None:
        try:
            await upgrade(link, self._process)
        except CallRefusedError as exc:
            raise GateError(f"the running gate is older and cannot be replaced: {exc}") from exc

    async def _restore(self, link: ControlConnection, listener: Listener) -> None:
        """Give the gate the sandboxes and requests that another gate had."""
        for bus, unique_name in listener.instance_field_wishes():
            with contextlib.suppress(CallRefusedError):  # the jobs after a snapshot log the reason
                await link.request(RequestInstanceField(bus, unique_name))
        for spec, fds in listener.missing():
            try:
                await link.request(AddSandbox(spec), fds)
                self._served.add(spec.id)
            except CallRefusedError as exc:
                text = "%s: the new gate refuses this sandbox: %s; it has ended: add it anew"
                LOGGER.error(text, spec.id, exc)  # noqa: TRY400 - no defect of ours
                listener.lost(spec.id)
        for sandbox in self.held:
            if sandbox not in self._served:
                self.held.drop(sandbox)

    async def _connect_or_start(self) -> trio.socket.SocketType:
        sock = await connect(self._control)
        while sock is None:
            self._limits.count_start()
            failure = None
            try:
                await self._process.start()
            except GateError as exc:  # perhaps because another gate was first
                failure = exc
            sock = await connect(self._control)
            if sock is None and failure is not None:
                if not self._limits.has_served:
                    raise failure
                LOGGER.error("%s", failure)
                await self._limits.wait_after_failed_start()
        return sock
