"""The gate's process: started so that it outlives us, watched, and written down when it dies."""

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
START_TIMEOUT: Final = 10.0  # seconds, from exec to the byte that says it listens
EXIT_TIMEOUT: Final = 1.0  # seconds, from the end of the connection to the end of the process
# In place of the number of a gate that is about to be started: should we end in between, it is ours all the same.
_ANY: Final = "?"
_MAX_MARK: Final = 4096  # bytes: a few process numbers

# Has a gate started by another: argv, environment, and the descriptors for its ends. Returns its pid, 0 for "no".
StartNext = Callable[[tuple[str, ...], dict[str, str], Sequence[int]], Awaitable[int]]


class GateError(BrokerError):
    """There is no gate, and it cannot be started."""


class GateProcess:
    """The one that serves the socket `control`, whoever started it."""

    def __init__(self, control: Path, command: Sequence[str]) -> None:
        self._control: Final = control
        self._command: Final = tuple(command)
        self._children: Final[set[int]] = set()
        # Says which gate was started by a supervisor, and so is to end with one.
        self._mark: Final = control.with_suffix(".pid")
        self._end = -1  # a pidfd: readable when it has ended
        self.pid = 0

    @property
    def folder(self) -> Path:
        """Where its socket and what it leaves are."""
        return self._control.parent

    @property
    def is_ours(self) -> bool:
        """Whether one of us started it: this supervisor, or one before it in this folder."""
        noted = self._noted()
        return self.pid in self._children or str(self.pid) in noted or _ANY in noted

    def watch(self, pid: int) -> None:
        """Take note which process it is."""
        self.forget()
        self.pid = pid
        try:
            self._end = os.pidfd_open(pid)
        except ProcessLookupError:
            pass
        except OSError as exc:  # its connection tells, too
            LOGGER.warning("the gate (process %d) is not watched: %s", pid, exc.strerror)

    def forget(self) -> None:
        """Watch it no more."""
        if self._end >= 0:
            os.close(self._end)
            self._end = -1

    async def start(self) -> None:
        """Start a gate, where none is, and wait until it listens. Raises GateError."""
        if self._control.exists() and (self.folder / TRACE).exists():
            self._keep_unseen(self.pid or self._noted_pid())  # else the next one writes over it
        # A supervisor before us may have been about to start one, which may yet be the one that serves.
        earlier = self._noted()[-1:]
        try:
            pid = await self._start(())
        except BaseException:
            self._note(*earlier)
            raise
        self._note(str(pid))

    def keep_moved(self) -> None:
        """Write down one that died and was replaced when nobody saw it."""
        if (self.folder / MOVED).exists():
            self._keep_unseen(self.pid)

    async def start_next(self, take_over: int, ask: StartNext) -> int:
        """Start a gate that takes over at that socket when it is told to. Raises GateError.

        `ask` has the gate that serves start it, if that one is a service of its own.
        """
        return await self._start((take_over,), ask)

    def replaced(self, pid: int) -> None:
        """Take note that another process serves now."""
        if self.is_ours:
            self._note(str(pid))
        self.watch(pid)
        self._reap()

    def give_up(self, pid: int) -> None:
        """End a gate that was to be the next one."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # a child that was not waited for: the number is its own
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
                await self._wait_ready(ready, pid, "is in the log" if take_over else "stands above")
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
        # Of two either may be the one that serves, should we end before we know.
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
        except trio.Cancelled:  # it would serve nobody
            self.give_up(pid)
            raise
        if scope.cancelled_caught:
            self.give_up(pid)
            raise GateError(f"the gate did not say that it listens, in {START_TIMEOUT:.0f} s")
        if not os.read(ready, 1):
            self.give_up(pid)
            raise GateError(f"the gate did not start: its message {where}")

    def _noted(self) -> list[str]:
        try:
            return read_small(self._mark, _MAX_MARK).decode("ascii").split()
        except (OSError, ValueError):
            return []

    def _noted_pid(self) -> int:
        """Return the gate that was noted last; 0: not known."""
        return next((int(word) for word in reversed(self._noted()) if word.isdigit()), 0)

    def _note(self, *words: str) -> None:
        """Say which gates are ours, whole or not at all."""
        try:
            if words:
                write_file(self._mark, " ".join(words).encode())
            else:
                self._mark.unlink(missing_ok=True)
        except OSError as exc:
            LOGGER.warning("%s: %s: the next supervisor will not end the gate", self._mark, exc)

    def _keep_unseen(self, pid: int) -> None:
        LOGGER.error("%s", keep_crash(self.folder, pid, None, time.time(), unseen=True))

    async def has_died(self) -> bool:
        """Say whether it ended, after its connection did; keep a record if it was not told to."""
        if self._end < 0 or not await self._wait_end():
            return False
        status = self._reap(self.pid)
        self.forget()
        # Whoever ends in order takes his socket away, or, if that is systemd's, the trace.
        if self._control.exists() and (self.is_ours or find_trace(self.folder).exists()):
            LOGGER.error("%s", keep_crash(self.folder, self.pid, status, time.time()))
        else:
            self._tidy()
            LOGGER.warning("the gate (process %d) was ended by somebody else", self.pid)
        return True

    async def wait_exit(self) -> None:
        """Wait for its end after it was told to, so that whoever waits for us finds it gone."""
        self._tidy()
        if self._end >= 0 and not await self._wait_end():
            signal.pidfd_send_signal(self._end, signal.SIGKILL)
        self._reap()

    async def _wait_end(self) -> bool:
        with trio.move_on_after(EXIT_TIMEOUT) as scope:
            await trio.lowlevel.wait_readable(self._end)
        return not scope.cancelled_caught

    def _tidy(self) -> None:
        self._mark.unlink(missing_ok=True)
        (self.folder / TRACE).unlink(missing_ok=True)

    def _reap(self, wanted: int = 0) -> int | None:
        """Take note of gates that ended; return how the wanted one did."""
        found = None
        for pid in list(self._children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._children.discard(pid)
                found = status if pid == wanted else found
        return found


def _environment() -> dict[str, str]:
    """The gate must find the same code as we, installed or not (`-P` keeps it from our folder)."""
    here = str(Path(broker.__file__).parent.parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
