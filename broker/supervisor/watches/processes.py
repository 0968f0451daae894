"""Processes whose end somebody waits for: one interface, and two ways of the kernel to tell of ends behind it.

Theory of operation. A pid is used again, so a process is its pid and its start time, and `has_ended` is the only
judge. Pidfds and the process connector just say when to ask it: whatever they say too often costs a look, and what
the connector may have missed is asked for once more. Few processes are watched by a pidfd each; for more than
MANY there is one netlink socket, where the kernel lets us have it and its pids are ours (connector.py). A process
that no descriptor is left for is looked at each second.
"""

import contextlib
import logging
import os
import select
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import trio

from broker.supervisor.sandboxes.lifecycle import Process
from broker.wire.errors import ACCESS_DENIED, INVALID_ARGS, CallRefusedError

LOGGER: Final = logging.getLogger(__name__)
# pyroute2 takes more memory than many pidfds, and with the connector each exit on the machine wakes us: not for few.
MANY: Final = 64
FEW: Final = 4  # a fourth of them, and back to pidfds
LOOK_EVERY: Final = 1.0  # seconds, at processes that there is no descriptor for
ENDS_A_TURN: Final = 64
LOOKS_A_TURN: Final = 100  # some milliseconds
# Each overrun costs a look at every process: with more than so many in a minute pidfds are cheaper.
MAX_OVERRUNS: Final = 5
FORGET_OVERRUNS_AFTER: Final = 60.0  # seconds
Told = Callable[[], None]


class Connector(Protocol):
    """The process connector, open."""

    def fileno(self) -> int:
        """Return what becomes readable."""

    def read(self) -> set[int] | None:
        """Return the pids of processes that may have ended; None: of all it may be."""

    def close(self) -> None:
        """Let it go."""


class Processes:
    """The processes that are watched, each for any number of holders."""

    def __init__(
        self, open_connector: Callable[[], Connector | None] | None = None, *, many: int = MANY
    ) -> None:
        self._many_are: Final = many
        self._open_connector: Final = open_connector or _no_connector
        self._watched: Final[dict[int, dict[str, tuple[Process, Told]]]] = {}
        self._pidfds: Final[dict[int, int]] = {}  # pid -> pidfd
        self._pids: Final[dict[int, int]] = {}  # pidfd -> pid
        self._by_hand: Final[set[int]] = set()  # pids
        self._epoll: select.epoll | None = None
        self._connector: Connector | None = None
        self._connector_at = -1
        self._overruns: list[float] = []
        self._may_connect = open_connector is not None
        self._many = trio.Event()
        self._not_all = trio.Event()

    def __len__(self) -> int:
        return len(self._watched)

    @property
    def way(self) -> str:
        """How it is done now, in words."""
        hand = f", {len(self._by_hand)} looked at each second" if self._by_hand else ""
        return ("process connector" if self._connector is not None else "pidfds") + hand

    def watch(self, holder: str, process: Process, told: Told) -> None:
        """Call `told` once when it has ended: at once, if that is so already."""
        self._watched.setdefault(process.pid, {})[holder] = (process, told)
        self._arm(process.pid)
        self._count()

    def forget(self, holder: str, process: Process) -> None:
        """Undo `watch`. Fine if it has ended, or was never watched."""
        holders = self._watched.get(process.pid, {})
        if holders.pop(holder, None) is not None and not holders:
            self._drop(process.pid)

    async def run(self) -> None:
        """Tell of ends until cancelled."""
        with contextlib.closing(select.epoll()) as epoll:
            self._epoll = epoll
            try:
                await self._each(self._arm)
                self._count()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._keep_connector)
                    nursery.start_soon(self._look_by_hand)
                    while True:
                        await trio.lowlevel.wait_readable(epoll.fileno())
                        for fd, _ in epoll.poll(0, ENDS_A_TURN):
                            await self._take(fd)
            finally:
                self._close()

    # -- what is told ----------------------------------------------------------------------------------

    async def _take(self, fd: int) -> None:
        if fd == self._connector_at:
            assert self._connector is not None
            pids = self._connector.read()
            if pids is None:
                self._overrun()
                await self._each(self._look)
                return
            for pid in pids & self._watched.keys():
                self._look(pid)
        elif (pid_of := self._pids.get(fd)) is not None:
            self._look(pid_of)
            if (
                self._pidfds.get(pid_of) == fd
            ):  # it is of a dead one, and others wait for who has its pid now
                self._disarm(pid_of)
                self._arm(pid_of)

    async def _each(self, do: Callable[[int], None]) -> None:
        """Do something with every process, and let others have their turn meanwhile."""
        for number, pid in enumerate(list(self._watched), 1):
            do(pid)
            if not number % LOOKS_A_TURN:
                await trio.lowlevel.checkpoint()

    def _look(self, pid: int) -> None:
        """Tell who waits for a process of this pid that has ended."""
        for holder, (process, told) in list(self._watched.get(pid, {}).items()):
            ended = has_ended(process)
            if ended is None:
                self._look_again(pid)
            elif ended:
                self.forget(holder, process)
                told()

    def _look_again(self, pid: int) -> None:
        self._by_hand.add(pid)
        self._not_all.set()

    def _overrun(self) -> None:
        now = trio.current_time()
        self._overruns = [at for at in self._overruns if now - at < FORGET_OVERRUNS_AFTER] + [now]
        LOGGER.warning("process-connector: the kernel dropped events: every process is looked at")
        if len(self._overruns) >= MAX_OVERRUNS:
            LOGGER.warning("process-connector: too many dropped: watching by pidfds")
            self._may_connect = False
            self._leave_connector()

    # -- pidfds ------------------------------------------------------------------------------------------

    def _arm(self, pid: int) -> None:
        """See to it that we are told of its end, and look whether that was before."""
        if self._epoll is None or pid not in self._watched:
            return
        if self._connector is None and pid not in self._pidfds:
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                pass  # has ended
            except OSError as exc:
                LOGGER.warning("process %d: %s: looked at each second", pid, exc.strerror)
                self._look_again(pid)
            else:
                self._pidfds[pid] = fd
                self._pids[fd] = pid
                self._by_hand.discard(pid)
                self._epoll.register(fd, select.EPOLLIN)
        self._look(pid)

    def _drop(self, pid: int) -> None:
        """Nobody waits for it any more."""
        del self._watched[pid]
        self._by_hand.discard(pid)
        self._disarm(pid)
        if self._connector is not None and len(self._watched) <= self._many_are // FEW:
            self._leave_connector()

    def _disarm(self, pid: int) -> None:
        fd = self._pidfds.pop(pid, -1)
        if fd >= 0:
            del self._pids[fd]
            if self._epoll is not None:
                self._epoll.unregister(fd)
            os.close(fd)

    async def _look_by_hand(self) -> None:
        while True:
            await self._not_all.wait()
            await trio.sleep(LOOK_EVERY)
            for pid in list(self._by_hand):
                if self._connector is not None:
                    self._by_hand.discard(pid)
                self._arm(pid)
            if not self._by_hand:
                self._not_all = trio.Event()

    # -- the connector -----------------------------------------------------------------------------------

    def _count(self) -> None:
        if self._may_connect and self._connector is None and len(self._watched) > self._many_are:
            self._many.set()

    async def _keep_connector(self) -> None:
        while self._may_connect:
            await self._many.wait()
            connector = await trio.to_thread.run_sync(self._open_connector)
            if connector is None:
                self._may_connect = False
            else:
                await self._use(connector)
            self._many = trio.Event()

    async def _use(self, connector: Connector) -> None:
        assert self._epoll is not None
        self._connector, self._connector_at = connector, connector.fileno()
        self._epoll.register(self._connector_at, select.EPOLLIN)
        LOGGER.info("processes are watched by the process connector")
        self._by_hand.clear()
        await self._each(self._hand_over)

    def _hand_over(self, pid: int) -> None:
        if self._connector is not None:  # else few are left already
            self._disarm(pid)
            self._look(pid)  # it may have ended before the connector told us anything

    def _leave_connector(self) -> None:
        assert self._epoll is not None
        assert self._connector is not None
        self._epoll.unregister(self._connector_at)
        self._connector.close()
        self._connector, self._connector_at = None, -1
        LOGGER.info("processes are watched by pidfds")
        for pid in list(self._watched):
            self._arm(pid)

    def _close(self) -> None:
        self._epoll = None
        if self._connector is not None:
            self._connector.close()
            self._connector, self._connector_at = None, -1
        for pid in list(self._pidfds):
            self._disarm(pid)


def _no_connector() -> None:
    """The one to use where none is wanted."""


# -- single processes ------------------------------------------------------------------------------------


def identify(pid: int, uid: int, name: str = "Process") -> Process:
    """Return which process that is now, if it is of that user. Raises CallRefusedError."""
    missing = CallRefusedError(INVALID_ARGS, f"{name}: there is no process {pid}")
    try:
        process = Process(pid, _start_time(pid))
        owner = _owner(pid)
    except (OSError, ValueError, IndexError):
        raise missing from None
    if has_ended(process):
        raise missing
    if uid not in (0, owner):
        raise CallRefusedError(ACCESS_DENIED, f"{name}: process {pid} is of another user")
    return process


def identify_fd(fd: int, uid: int, name: str = "ProcessFd") -> Process:
    """Return which process a pidfd is of. Raises CallRefusedError."""
    info = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii")
    pids = [line.split()[1] for line in info.splitlines() if line.startswith("Pid:")]
    if not pids:
        raise CallRefusedError(INVALID_ARGS, f"{name} is not a pidfd")
    pid = int(pids[0])
    if pid <= 0:  # ended, or of another pid namespace
        raise CallRefusedError(INVALID_ARGS, f"{name}: no process that the broker can see")
    process = identify(pid, uid, name)
    if _is_readable(fd):  # and so the pid may be another's by now
        raise CallRefusedError(INVALID_ARGS, f"{name}: process {pid} has ended")
    return process


def has_ended(process: Process) -> bool | None:
    """Say whether all its threads have ended, whoever has its pid by now; None: nothing can be said."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    except OSError:  # no descriptor is left
        return _has_ended_by_proc(process)
    try:
        # Readable: it has ended, or even who had its pid after it.
        return _is_readable(fd) or _has_ended_by_proc(process)
    finally:
        os.close(fd)


def _has_ended_by_proc(process: Process) -> bool | None:
    try:
        fields = _stat(process.pid)
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return None
    # A leader that is a zombie may have threads that live on.
    return int(fields[19]) != process.start or (fields[0] in "ZX" and int(fields[17]) <= 1)


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _start_time(pid: int) -> int:
    return int(_stat(pid)[19])


def _stat(pid: int) -> list[str]:
    """Return the fields from the state on: the name before it may hold anything."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()


def _owner(pid: int) -> int:
    """Return its real user, which no setuid program takes from whoever started it."""
    for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[1])
    raise ValueError(pid)
