"""The gate's process: started, watched, and reported on after a death.

A gate ends with the supervisor that started it, or with a later supervisor in the same folder. So the pids of
gates that supervisors started stand in a file, the mark. The file must be right whenever a supervisor dies:

    written before a start:       the pid that serves now, if any, and "?"
    written after posix_spawn:    the pid that serves now, if any, and the new pid
    written once that one serves: the new pid

A "?" stands for a gate without a known pid. A supervisor that reads a "?" will end the running gate, whatever its pid.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import trio

import broker
from broker.control_protocol.spawn import spawn_gate
from broker.engines.crash_reports import MOVED, TRACE, find_trace, keep_crash
from broker.posix.files import read_small, write_file
from broker.wire.errors import BrokerError

LOGGER: Final = logging.getLogger(__name__)
START_TIMEOUT: Final = 10.0  # seconds, from exec to the byte that says that the gate listens
EXIT_TIMEOUT: Final = 1.0  # seconds, from the end of the connection to the end of the process
# Stands in the mark for a gate that is about to be started, before the pid is known.
_ANY: Final = "?"
_MAX_MARK: Final = 4096  # bytes: a few process numbers

# Asks the running gate to start another: argv, environment, descriptors. Returns the new pid; 0 for a refusal.
StartNext = Callable[[tuple[str, ...], dict[str, str], Sequence[int]], Awaitable[int]]


class GateError(BrokerError):
    """No gate is running, and none can be started."""


class GateProcess:
    """The process that serves the socket `control`, whichever process started it."""

    def __init__(self, control: Path, command: Sequence[str]) -> None:
        self._control: Final = control
        self._command: Final = tuple(command)
        self._children: Final[set[int]] = set()
        self._mark: Final = control.with_suffix(".pid")
        self._pidfd = -1  # readable when the gate has ended
        self.pid = 0

    @property
    def folder(self) -> Path:
        """The folder of the control socket, the trace and the crash reports."""
        return self._control.parent

    @property
    def is_ours(self) -> bool:
        """Return whether a supervisor with this folder started the gate."""
        noted = self._noted()
        return self.pid in self._children or str(self.pid) in noted or _ANY in noted

    def watch(self, pid: int) -> None:
        """Watch the process that serves."""
        self.forget()
        self.pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            pass
        except OSError as exc:  # the end of the control connection shows a death, too
            LOGGER.warning("gate process %d is not watched: %s", pid, exc.strerror)

    def forget(self) -> None:
        """Stop watching the process."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    async def start(self) -> None:
        """Start a gate where none runs, and wait until the gate listens. Raises GateError."""
        if self._control.exists() and (self.folder / TRACE).exists():
            self._keep_unseen(
                self.pid or self._noted_pid()
            )  # before the new gate overwrites the trace
        # An earlier supervisor may have started a gate just before dying, and that gate may come first.
        earlier = self._noted()[-1:]
        try:
            pid = await self._start(())
        except BaseException:
            self._note(*earlier)
            raise
        self._note(str(pid))

    def keep_moved(self) -> None:
        """Report on a gate that died and was replaced while no supervisor ran."""
        if (self.folder / MOVED).exists():
            self._keep_unseen(self.pid)

    async def start_next(self, take_over: int, ask: StartNext) -> int:
        """Start a gate that will take over through that socket. Raises GateError.

        If the serving gate is a service of systemd, `ask` requests that gate to start the next gate.
        """
        return await self._start((take_over,), ask)

    def replaced(self, pid: int) -> None:
        """Watch another process, which serves now."""
        if self.is_ours:
            self._note(str(pid))
        self.watch(pid)
        self._reap()

    def give_up(self, pid: int) -> None:
        """Kill a gate that was meant to be the next gate."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # an unreaped child, so no other process can have the pid
        if self.is_ours:
            self._note(str(self.pid))

    async def _start(self, take_over: tuple[int, ...], ask: StartNext | None = None) -> int:
        self._reap()
        try:
            ready, ready_there = os.pipe()
            try:
                try:
                    pid = await self._spawn(ready_there, take_over, ask)
                finally:
                    os.close(ready_there)
                await self._wait_ready(ready, pid, "in the log" if take_over else "above")
            finally:
                os.close(ready)
        except OSError as exc:
            raise GateError(f"the gate cannot be started: {exc.strerror}") from exc
        return pid

    async def _spawn(self, ready: int, take_over: tuple[int, ...], ask: StartNext | None) -> int:
        argv = (*self._command, "--control", str(self._control))
        argv = (*argv, "--trace", str(self.folder / TRACE))
        if ask is not None and not self.is_ours:
            pid = await ask(argv, _environment(), [ready, *take_over])
            if pid:
                return pid
        # If this supervisor dies before the hand-over ends, either of the two may be the serving gate.
        before = [str(self.pid)] if take_over else self._noted()[-1:]
        is_noted = not take_over or self.is_ours
        if is_noted:
            self._note(*before, _ANY)
        try:
            pid = spawn_gate(argv, _environment(), ready, *take_over, detach=True)
        except OSError:
            if is_noted:
                self._note(*before)
            raise
        self._children.add(pid)
        if is_noted:
            self._note(*before, str(pid))
        return pid

    async def _wait_ready(self, ready: int, pid: int, where: str) -> None:
        try:
            with trio.move_on_after(START_TIMEOUT) as scope:
                await trio.lowlevel.wait_readable(ready)
        except trio.Cancelled:  # no supervisor would use this gate
            self.give_up(pid)
            raise
        if scope.cancelled_caught:
            self.give_up(pid)
            raise GateError(f"the gate did not begin to listen in {START_TIMEOUT:.0f} s")
        if not os.read(ready, 1):
            self.give_up(pid)
            raise GateError(f"the gate did not start: see its message {where}")

    def _noted(self) -> list[str]:
        try:
            return read_small(self._mark, _MAX_MARK).decode("ascii").split()
        except (OSError, ValueError):
            return []

    def _noted_pid(self) -> int:
        """Return the pid that was noted last; 0 if none is known."""
        return next((int(word) for word in reversed(self._noted()) if word.isdigit()), 0)

    def _note(self, *words: str) -> None:
        """Write the pids of the supervisor's gates into the mark, whole or not at all."""
        try:
            if words:
                write_file(self._mark, " ".join(words).encode())
            else:
                self._mark.unlink(missing_ok=True)
        except OSError as exc:
            text = "cannot write %s: %s: the next supervisor will not end the gate"
            LOGGER.warning(text, self._mark, exc)

    def _keep_unseen(self, pid: int) -> None:
        LOGGER.error("%s", keep_crash(self.folder, pid, None, time.time(), unseen=True))

    async def has_died(self) -> bool:
        """Return whether the gate has ended after a lost connection; report a death."""
        if self._pidfd < 0 or not await self._wait_end():
            return False
        status = self._reap(self.pid)
        self.forget()
        # A gate that ends in order removes the socket, or the trace if systemd owns the socket.
        if self._control.exists() and (self.is_ours or find_trace(self.folder).exists()):
            LOGGER.error("%s", keep_crash(self.folder, self.pid, status, time.time()))
        else:
            self._tidy()
            LOGGER.warning("gate process %d was terminated by another program", self.pid)
        return True

    async def wait_exit(self) -> None:
        """Wait for the end of a gate that was told to end, and kill a gate that stays."""
        self._tidy()
        if self._pidfd >= 0 and not await self._wait_end():
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._reap()

    async def _wait_end(self) -> bool:
        with trio.move_on_after(EXIT_TIMEOUT) as scope:
            await trio.lowlevel.wait_readable(self._pidfd)
        return not scope.cancelled_caught

    def _tidy(self) -> None:
        self._mark.unlink(missing_ok=True)
        (self.folder / TRACE).unlink(missing_ok=True)

    def _reap(self, wanted: int = 0) -> int | None:
        """Reap the gates that have ended; return the wait status of the wanted gate."""
        found = None
        for pid in list(self._children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._children.discard(pid)
                found = status if pid == wanted else found
        return found


def _environment() -> dict[str, str]:
    """Return an environment in which the gate finds this code, installed or not.

    The option `-P` keeps Python from looking into the current folder.
    """
    here = str(Path(broker.__file__).parent.parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
