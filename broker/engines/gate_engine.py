"""The engine that is a process of its own: starts the gate, or connects to the one that runs, and keeps to it.

Theory of operation. `keep_connected` has one Link after the other; a Link is one control connection, with a
reader task that hands events to the listener and answers to whoever waits, in the order in which the gate sent
them. A gate outlives us unless it is shut down; if the connection breaks, the next round finds the same gate
again, or starts another, and its snapshot tells the listener which of the two it was.

What the gate listens on is held here, too. A gate that is new gets it back, sandbox by sandbox, before
anybody else's request: these wait meanwhile, so that a gate which dies is a pause and no error.
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
from broker.posix.descriptors import close_fds
from broker.wire.errors import BrokerError, CallRefusedError
from policy.rules import AccessList


class Engine(Protocol):
    """What is to be told of, before or after the listener."""

    def learn(self, snapshot: Snapshot) -> None:
        """This is what the gate has."""

    def lose(self, event: ContainerServerLost) -> None:
        """A bus has forgotten a sandbox."""

    def restored(self, spec: SandboxSpec) -> SandboxSpec:
        """Return a sandbox as a new gate is to have it."""

    def forget(self, sandbox: str) -> None:
        """It is no more."""


class _ListenerTee:
    """Tells both, in step."""

    def __init__(self, engine: Engine, listener: Listener) -> None:
        self._engine: Final = engine
        self._listener: Final = listener

    def take_event(self, event: Event) -> None:
        """Something happened."""
        if isinstance(event, ContainerServerLost):
            self._engine.lose(event)
            return
        self._listener.take_event(event)
        if isinstance(event, Ended):
            self._engine.forget(event.sandbox)

    def take_snapshot(self, snapshot: Snapshot) -> None:
        """The gate was started, or connected to."""
        self._engine.learn(snapshot)
        self._listener.take_snapshot(snapshot)

    def missing(self) -> Sequence[tuple[SandboxSpec, Sequence[int]]]:
        """Return what it was to have, and did not."""
        return [(self._engine.restored(spec), fds) for spec, fds in self._listener.missing()]

    def tagged(self) -> Sequence[tuple[str, str]]:
        """Return who wants header field 10."""
        return self._listener.tagged()

    def lost(self, sandbox: str) -> None:
        """It does not take that sandbox again."""
        self._engine.forget(sandbox)
        self._listener.lost(sandbox)


# Well below what one frame may carry.
_FDS_A_REQUEST: Final = 200


async def fetch_listening_sockets(
    link: ControlConnection, held: HeldSockets, sandboxes: Iterable[SandboxState]
) -> None:
    """Have held what of these sandboxes is not yet."""
    for names in batches(state for state in sandboxes if state.spec.id not in held):
        with held.unless_ended(names) as living:
            try:
                answer, fds = await link.request_fds(TakeListeners(names))
            except CallRefusedError as exc:
                LOGGER.warning("the gate's sockets cannot be held: %s", exc)
                return
            what = answer.what if isinstance(answer, Listeners) else ()
            for (sandbox, bus), fd in zip(what, fds, strict=True):
                if sandbox in living:
                    held.adopt(sandbox, bus, fd)
                else:
                    close_fds([fd])


def batches(states: Iterator[SandboxState]) -> Iterator[tuple[str, ...]]:
    """Return names of sandboxes, as many at a time as have not too many descriptors."""
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
# Seconds that a request waits for a gate that is being replaced: less than callers on a bus wait for an answer.
GAP_TIMEOUT: Final = 8.0
# Seconds to its first answer: more than what it may be busy with, an upgrade with 10 000 sandboxes, takes.
GREETING_TIMEOUT: Final = 60.0
COMMAND: Final = (sys.executable, "-P", "-m", "broker.gate")
# A gate that dies before it serves would have us start gates for ever.
MAX_STARTS: Final = 5
FORGET_STARTS_AFTER: Final = 60.0  # seconds
# After one that did not start, if another served before it; it doubles.
START_PAUSE: Final = 0.25  # seconds
MAX_REFUSALS: Final = 20
REFUSAL_PAUSE: Final = 0.1  # seconds
# One that has served is started again always: the first time at once, then after a pause that doubles.
FIRST_PAUSE: Final = 0.05  # seconds
LONGEST_PAUSE: Final = 0.5
STEADY_AFTER: Final = 5.0  # seconds that it has served
# The first protocol whose gates know HandOver.
HANDS_OVER_SINCE: Final = 3


class GateEngine:
    """One gate at a time, reached at the socket `control`."""

    def __init__(
        self, *, control: Path, buses: Sequence[BusSpec], command: Sequence[str] | None = None
    ) -> None:
        self._control: Final = control
        self._buses: Final = tuple(buses)
        self._process: Final = GateProcess(control, command or COMMAND)
        self.held: Final = HeldSockets()
        self._upkeep: Final = ContainerServerTable()
        self._link: ControlConnection | None = None
        self._link_changed = trio.Event()
        self._closing = False
        self._is_over = False
        self._served: set[str] = set()  # sandboxes, when the connection was made
        self._starts: list[float] = []
        self._has_served = False  # a gate of ours
        self._refusals = 0
        self._short_lives = 0
        self._upgrading: Final = trio.Lock()

    @property
    def name(self) -> str:
        """Which engine this is."""
        return "gate"

    def serving(self, bus: str) -> str:
        """Return the engine that serves new sandboxes on that bus."""
        return "gate"

    def instances(self, sandbox: str) -> Mapping[str, str]:
        """Return the paths of the buses' own instances, by bus: there are some if another engine was used before."""
        return {bus: one.instance for bus, one in self._upkeep.upstreams(sandbox).items()}

    def bus_restarted(self, bus: str) -> None:
        """It is another one: nothing that was known of it holds. The gate notices by itself."""

    @property
    def pid(self) -> int:
        """The process that serves now, or served last."""
        return self._process.pid

    @property
    def last_crash(self) -> str:
        """A line about the last gate that died; empty if none did."""
        return last_crash(self._process.folder)

    async def keep_connected(
        self, listener: Listener, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Have a gate, until `shutdown` or cancelled. Raises GateError if there cannot be one."""
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
        """End the gate, if one of us started it: this supervisor, or one before it in this folder."""
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
            LOGGER.warning("the gate (process %d) does not end", self.pid)
        await self._process.wait_exit()
        self._process.forget()

    async def add(self, spec: SandboxSpec, fds: Sequence[int]) -> None:
        with self.held.unless_ended([spec.id]) as living:
            await self._ask(AddSandbox(spec), fds)
            if spec.id not in living:  # its end may come in one read with the answer
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
            raise EngineLostError(f"the gate answered TakeUse with {type(answer).__name__}")
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
        """Ask the gate, or the next one if this one dies meanwhile: all requests say what is to be."""
        link = await self._get_link()
        try:
            return await link.request(request, fds)
        except EngineLostError:
            # What a bus made for the sandbox is gone with the gate that asked for it.
            if isinstance(request, AddSandbox) and request.spec.container_servers:
                raise
        link = await self._get_link()
        if isinstance(request, AddSandbox) and request.spec.id in self._served:
            return Done()  # it was only the connection that was lost
        return await link.request(request, fds)

    # -- servers of buses' own -----------------------------------------------------------------------

    def learn(self, snapshot: Snapshot) -> None:
        """Take from the gate which sandboxes have servers."""
        self._upkeep.learn(snapshot)

    def lose(self, event: ContainerServerLost) -> None:
        """Have a server that is lost seen to."""
        self._upkeep.change(event.sandbox, event.bus, LOST)

    def restored(self, spec: SandboxSpec) -> SandboxSpec:
        """Return a sandbox as a new gate is to have it."""
        return spec

    def forget(self, sandbox: str) -> None:
        """It has ended, and needs no sockets."""
        self.held.end(sandbox)
        self._upkeep.forget(sandbox)

    async def _see_to_lost(self, link: ControlConnection) -> None:
        """See to them until the gate is lost: the next snapshot says what is lost then."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._upkeep.recreate_lost, self._mend)
            await link.ended.wait()
            nursery.cancel_scope.cancel()

    async def _mend(self, spec: SandboxSpec, bus: str) -> None:
        """Serve it by the gate alone from now on: nobody will have the bus make another server."""
        LOGGER.warning("%s: bus %s lost what labelled it: the gate alone serves it", spec.id, bus)
        await self._upkeep.set_upstream(SetContainerServer(spec.id, bus, None), self._ask)

    # -- having a gate ------------------------------------------------------------------------------

    async def _get_link(self) -> ControlConnection:
        link = None
        with trio.move_on_after(GAP_TIMEOUT):
            link = await self._wait_link()
        if link is None:
            raise EngineLostError("there is no gate at the moment: try again later")
        return link

    async def _wait_link(self) -> ControlConnection | None:
        """Return the connection, once there is one; None: there will be none any more."""
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
                    nursery.start_soon(self._see_to_lost, link)
                    self._starts.clear()
                    self._has_served = True
                    self._set_link(link)
                    ready()
        self._set_link(None)
        if isinstance(failure, GateError):
            raise failure
        if not self._closing:
            why = link.broken or "it has another supervisor"
            await self._recover(begun, why if failure is not None else "")

    async def _recover(self, begun: float, refusal: str) -> None:
        """Find out what became of the gate, and wait before there is another try."""
        if await self._process.has_died():
            steady = trio.current_time() - begun > STEADY_AFTER
            self._short_lives = 0 if steady else self._short_lives + 1
            if self._short_lives > 1:
                await trio.sleep(min(FIRST_PAUSE * 2 ** (self._short_lives - 1), LONGEST_PAUSE))
        elif refusal:
            # A gate that hangs up at once serves another supervisor, or has not noticed that it died.
            self._refusals += 1
            if self._refusals >= MAX_REFUSALS:
                raise GateError(f"the gate that runs does not talk to us: {refusal}")
            await trio.sleep(REFUSAL_PAUSE)
        else:
            LOGGER.error("the connection to the gate was lost")

    async def _greet(self, link: ControlConnection, listener: Listener) -> None:
        snapshot = await self._hear_first(link)
        self._process.keep_moved()
        if isinstance(snapshot, Snapshot) and HANDS_OVER_SINCE <= snapshot.protocol < PROTOCOL:
            # It was started by an older one of us. It hands over to one that we can talk to.
            self._process.watch(snapshot.pid)
            await self._replace(link)
            snapshot = await link.request(TakeSnapshot(in_parts=True))
        if not isinstance(snapshot, Snapshot) or snapshot.protocol != PROTOCOL:
            raise GateError(
                f"the gate that runs speaks another protocol than ours ({PROTOCOL}): end it first"
            )
        self._refusals = 0
        self._process.watch(snapshot.pid)
        try:
            await link.request(SetBuses(self._buses))
        except CallRefusedError as exc:
            raise GateError(f"the gate does not take our buses: {exc}") from exc
        await fetch_listening_sockets(link, self.held, snapshot.sandboxes)
        self._served = {state.spec.id for state in snapshot.sandboxes}
        await self._restore(link, listener)

    async def _hear_first(self, link: ControlConnection) -> Answer:
        with trio.move_on_after(GREETING_TIMEOUT):
            return await link.request(TakeSnapshot(in_parts=True))
        text = f"the gate that runs says nothing for {GREETING_TIMEOUT:.0f} s: end it"
        raise EngineLostError(text) if self._has_served else GateError(text)

    async def _replace(self, link: ControlConnection) -> None:
        try:
            await upgrade(link, self._process)
        except CallRefusedError as exc:
            raise GateError(f"the gate that runs is older than we are: {exc}") from exc

    async def _restore(self, link: ControlConnection, listener: Listener) -> None:
        """Have the gate serve what another one served before."""
        for bus, unique_name in listener.tagged():
            with contextlib.suppress(CallRefusedError):  # the jobs after a snapshot say why
                await link.request(RequestInstanceField(bus, unique_name))
        for spec, fds in listener.missing():
            try:
                await link.request(AddSandbox(spec), fds)
                self._served.add(spec.id)
            except CallRefusedError as exc:
                text = "%s: the gate does not take it again: %s; it has ended: add it anew"
                LOGGER.error(text, spec.id, exc)  # noqa: TRY400 - no defect of ours
                listener.lost(spec.id)
        for sandbox in self.held:
            if sandbox not in self._served:
                self.held.drop(sandbox)

    async def _connect_or_start(self) -> trio.socket.SocketType:
        sock = await connect(self._control)
        while sock is None:
            self._count_start()
            failure = None
            try:
                await self._process.start()
            except GateError as exc:  # be it that another one was first
                failure = exc
            sock = await connect(self._control)
            if sock is None and failure is not None:
                if not self._has_served:
                    raise failure
                LOGGER.error("%s", failure)
                await trio.sleep(START_PAUSE * 2 ** (len(self._starts) - 1))
        return sock

    def _count_start(self) -> None:
        now = trio.current_time()
        self._starts = [at for at in self._starts if now - at < FORGET_STARTS_AFTER]
        if len(self._starts) >= MAX_STARTS:
            raise GateError(f"the gate ended {MAX_STARTS} times in {FORGET_STARTS_AFTER:.0f} s")
        self._starts.append(now)
