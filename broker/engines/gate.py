"""The engine that is a process of its own: starts the gate, or connects to the one that runs, and keeps to it.

Theory of operation. `keep_connected` has one Link after the other; a Link is one control connection, with a
reader task that hands events to the listener and answers to whoever waits, in the order in which the gate sent
them. A gate outlives us unless it is shut down; if the connection breaks, the next round finds the same gate
again, or starts another, and its snapshot tells the listener which of the two it was.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import trio

import broker
from broker.engines.base import EngineLostError, Listener
from broker.engines.link import Link, connect
from broker.gate.control import (
    PROTOCOL,
    AddSandbox,
    BusSpec,
    Done,
    Request,
    SandboxOf,
    SandboxSpec,
    SetAccess,
    SetBuses,
    Shutdown,
    Snapshot,
    StopListening,
    StopSandbox,
    TagHeaders,
    TakeSnapshot,
    TakeUse,
    Use,
    WhoIs,
)
from broker.wire.errors import BrokerError, CallRefusedError
from policy.rules import AccessList

LOGGER: Final = logging.getLogger(__name__)
START_TIMEOUT: Final = 10.0  # seconds, from exec to the byte that says it listens
SHUTDOWN_TIMEOUT: Final = 2.5  # seconds, from the request to the end of the connection
EXIT_TIMEOUT: Final = 1.0  # seconds, from there to the end of the process
COMMAND: Final = (sys.executable, "-P", "-m", "broker.gate")
_READY_FD: Final = 3  # in the gate
# A gate that dies at once again would have us start gates for ever.
MAX_STARTS: Final = 5
FORGET_STARTS_AFTER: Final = 60.0  # seconds
MAX_REFUSALS: Final = 20
REFUSAL_PAUSE: Final = 0.1  # seconds


class GateError(BrokerError):
    """There is no gate, and it cannot be started."""


class GateEngine:
    """One gate at a time, reached at the socket `control`."""

    name: Final = "gate"

    def __init__(
        self, *, control: Path, buses: Sequence[BusSpec], command: Sequence[str] | None = None
    ) -> None:
        self._control: Final = control
        self._buses: Final = tuple(buses)
        self._command: Final = tuple(command or COMMAND)
        self._link: Link | None = None
        self._children: Final[set[int]] = set()
        self._closing = False
        self._starts: list[float] = []
        self._refusals = 0
        # Says which gate was started by a supervisor, and so is to end with one.
        self._mark: Final = control.with_suffix(".pid")
        self._is_ours = False
        self.pid = 0

    async def keep_connected(
        self, listener: Listener, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Have a gate, until `shutdown` or cancelled. Raises GateError if there cannot be one."""
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
            self._link = None

    async def shutdown(self) -> None:
        """End the gate, if one of us started it: this supervisor, or one before it in this folder."""
        self._closing = True
        link = self._link
        if link is None:
            return
        if not self._is_ours:
            link.close()
            return
        with trio.move_on_after(SHUTDOWN_TIMEOUT) as scope:
            try:
                await link.request(Shutdown())
            except BrokerError:
                LOGGER.debug("the gate ended without an answer")
            await link.ended.wait()
        if scope.cancelled_caught:
            LOGGER.warning("the gate (process %d) does not end", self.pid)
        self._mark.unlink(missing_ok=True)
        await self._wait_for_exit()

    async def _wait_for_exit(self) -> None:
        """Wait for the gate's end, so that whoever waits for us finds it gone."""
        try:
            end = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            with trio.move_on_after(EXIT_TIMEOUT) as scope:
                await trio.lowlevel.wait_readable(end)
            if scope.cancelled_caught:
                signal.pidfd_send_signal(end, signal.SIGKILL)
        finally:
            os.close(end)
        self._reap()

    def _reap(self) -> None:
        """Take note of gates that ended."""
        for pid in list(self._children):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self._children.discard(pid)

    async def add(self, spec: SandboxSpec, fds: Sequence[int]) -> None:
        await self._ask(AddSandbox(spec), fds)

    async def set_access(self, sandbox: str, access: AccessList) -> None:
        await self._ask(SetAccess(sandbox, access))

    async def stop_listening(self, sandbox: str) -> None:
        await self._ask(StopListening(sandbox))

    async def stop(self, sandbox: str) -> None:
        await self._ask(StopSandbox(sandbox))

    async def who(self, bus: str, unique_name: str) -> str | None:
        answer = await self._current().request(WhoIs(bus, unique_name))
        if not isinstance(answer, SandboxOf):
            raise EngineLostError(f"the gate answered WhoIs with {type(answer).__name__}")
        return answer.sandbox

    async def use(self, sandbox: str | None = None) -> Use:
        answer = await self._current().request(TakeUse(sandbox))
        if not isinstance(answer, Use):
            raise EngineLostError(f"the gate answered TakeUse with {type(answer).__name__}")
        return answer

    async def tag_headers(self, bus: str, unique_name: str) -> None:
        await self._ask(TagHeaders(bus, unique_name))

    def _current(self) -> Link:
        if self._link is None:
            raise EngineLostError("there is no gate at the moment")
        return self._link

    async def _ask(self, request: Request, fds: Sequence[int] = ()) -> None:
        answer = await self._current().request(request, fds)
        if not isinstance(answer, Done):
            raise EngineLostError(
                f"the gate answered {type(request).__name__} with {type(answer).__name__}"
            )

    # -- having a gate ------------------------------------------------------------------------------

    async def _run_link(self, listener: Listener, ready: Callable[[], None]) -> None:
        sock = await self._connect_or_start()
        failure: BrokerError | None = None
        with Link(sock, listener) as link:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.run)
                try:
                    await self._greet(link)
                except (EngineLostError, GateError) as exc:
                    failure = exc
                    nursery.cancel_scope.cancel()
                else:
                    self._link = link
                    ready()
        self._link = None
        if isinstance(failure, GateError):
            raise failure
        if failure is not None:
            await self._wait_for_another_try()
            return
        self._refusals = 0
        if not self._closing:
            LOGGER.error("the connection to the gate was lost")

    async def _wait_for_another_try(self) -> None:
        """A gate that hangs up at once serves another supervisor, or has not noticed that it died."""
        self._refusals += 1
        if self._refusals >= MAX_REFUSALS:
            raise GateError("the gate that runs does not talk to us: it has another supervisor")
        await trio.sleep(REFUSAL_PAUSE)

    async def _greet(self, link: Link) -> None:
        snapshot = await link.request(TakeSnapshot())
        if not isinstance(snapshot, Snapshot) or snapshot.protocol != PROTOCOL:
            raise GateError(
                f"the gate that runs speaks another protocol than ours ({PROTOCOL}): end it first"
            )
        self.pid = snapshot.pid
        self._is_ours = self._marked_pid() == snapshot.pid
        try:
            await link.request(SetBuses(self._buses))
        except CallRefusedError as exc:
            raise GateError(f"the gate does not take our buses: {exc}") from exc

    async def _connect_or_start(self) -> trio.socket.SocketType:
        sock = await connect(self._control)
        if sock is not None:
            return sock
        while True:
            self._count_start()
            await self._start()
            sock = await connect(self._control)
            if sock is not None:
                return sock

    def _count_start(self) -> None:
        now = trio.current_time()
        self._starts = [at for at in self._starts if now - at < FORGET_STARTS_AFTER]
        if len(self._starts) >= MAX_STARTS:
            raise GateError(f"the gate ended {MAX_STARTS} times in {FORGET_STARTS_AFTER:.0f} s")
        self._starts.append(now)

    def _marked_pid(self) -> int | None:
        try:
            return int(self._mark.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    async def _start(self) -> None:
        """Start a gate and wait until it listens."""
        self._reap()
        ready, ready_there = os.pipe()
        try:
            try:
                pid = _spawn((*self._command, "--control", str(self._control)), ready_there)
            finally:
                os.close(ready_there)
            self._children.add(pid)
            self._mark.write_text(str(pid), encoding="ascii")
            with trio.move_on_after(START_TIMEOUT) as scope:
                await trio.lowlevel.wait_readable(ready)
            if scope.cancelled_caught:
                os.kill(pid, signal.SIGKILL)
                raise GateError(f"the gate did not say that it listens, in {START_TIMEOUT:.0f} s")
            if not os.read(ready, 1):
                raise GateError("the gate did not start: its message stands above")
        finally:
            os.close(ready)


def _spawn(argv: Sequence[str], ready: int) -> int:
    """Start a gate, which is to outlive us: not by subprocess, which minds."""
    # A session of its own: Ctrl-C is for us, and we tell it. No standard output, since whoever reads ours
    # must see its end when we end.
    return os.posix_spawn(
        argv[0],
        [*argv, "--ready-fd", str(_READY_FD)],
        _environment(),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, ready, _READY_FD),
        ],
        setsid=True,
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores
    )


def _environment() -> dict[str, str]:
    """The gate must find the same code as we, installed or not (`-P` keeps it from our folder)."""
    here = str(Path(broker.__file__).parent.parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
