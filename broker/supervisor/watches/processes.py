"""A watch over processes, for ends, by either of two interfaces of the kernel.

Theory of operation. A pid is used again, so a process is a pid with a start time, and `has_ended` is the only
judge. The kernel says when to ask:

    up to MANY processes     a pidfd each, readable when the process has ended
    more                     the process connector, a netlink socket that names each process that ends
                             (process_connector.py), if permitted, with the pids of this namespace
    no descriptor left       no word of the kernel: a look each second

The connector may drop events. Then all processes are looked at once.
"""

import contextlib
import logging
import os
import select
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import trio

from broker.supervisor.sandboxes.lifecycle import Process
from broker.supervisor.watches.watched import OnEnd, Watched
from broker.wire.errors import ACCESS_DENIED, INVALID_ARGS, CallRefusedError

LOGGER: Final = logging.getLogger(__name__)
# Fewer processes do not justify the connector: pyroute2 takes more memory than the pidfds, and each exit on the
# machine wakes the supervisor.
MANY: Final = 64
FEW: Final = 4  # at a fourth of MANY, back to pidfds
LOOK_EVERY: Final = 1.0  # seconds, at processes without a descriptor
ENDS_A_TURN: Final = 64
LOOKS_A_TURN: Final = 100  # some milliseconds
# Each overrun costs a look at every process. With more in a minute, pidfds are cheaper.
MAX_OVERRUNS: Final = 5
FORGET_OVERRUNS_AFTER: Final = 60.0  # seconds


class Connector(Protocol):
    """An open process connector."""

    def fileno(self) -> int:
        """Return the descriptor that becomes readable."""

    def read(self) -> set[int] | None:
        """Return the pids of processes that may have ended; None if all may have."""

    def close(self) -> None:
        """Close the descriptor."""


class Processes(Watched[int, Process]):
    """The watched processes. A thing is a process, and the key is the pid."""

    def __init__(
        self, open_connector: Callable[[], Connector | None] | None = None, *, many: int = MANY
    ) -> None:
        super().__init__(look_every=LOOK_EVERY, interval="each second", looks_a_turn=LOOKS_A_TURN)
        self._many_are: Final = many
        self._open_connector: Final = open_connector or _no_connector
        self._pidfds: Final[dict[int, int]] = {}  # pid -> pidfd
        self._pids: Final[dict[int, int]] = {}  # pidfd -> pid
        self._epoll: select.epoll | None = None
        self._connector: Connector | None = None
        self._connector_at = -1
        self._overruns: list[float] = []
        self._may_connect = open_connector is not None
        self._many = trio.Event()

    def watch(self, holder: str, thing: Process, on_end: OnEnd) -> None:
        super().watch(holder, thing, on_end)
        self._want_connector_for_many()

    def forget(self, holder: str, thing: Process) -> None:
        before = len(self._watched)
        super().forget(holder, thing)
        is_less = len(self._watched) < before
        if is_less and self._connector is not None and len(self._watched) <= self._many_are // FEW:
            self._leave_connector()

    async def run(self) -> None:
        """Call back holders until cancelled."""
        with contextlib.closing(select.epoll()) as epoll:
            self._epoll = epoll
            try:
                await self._for_each(self._arm)
                self._want_connector_for_many()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._keep_connector)
                    nursery.start_soon(self._keep_looking)
                    while True:
                        await trio.lowlevel.wait_readable(epoll.fileno())
                        for fd, _ in epoll.poll(0, ENDS_A_TURN):
                            await self._take(fd)
            finally:
                self._close()

    # -- events ----------------------------------------------------------------------------------------

    async def _take(self, fd: int) -> None:
        if fd == self._connector_at:
            assert self._connector is not None
            pids = self._connector.read()
            if pids is None:
                self._count_overrun()
                await self._for_each(self._look)
                return
            for pid in pids & self._watched.keys():
                self._look(pid)
        elif (pid_of := self._pids.get(fd)) is not None:
            self._look(pid_of)
            if self._pidfds.get(pid_of) == fd:
                # This pidfd is of a dead process, and other holders wait for a later process with the same pid.
                self._disarm(pid_of)
                self._arm(pid_of)

    def _count_overrun(self) -> None:
        now = trio.current_time()
        self._overruns = [at for at in self._overruns if now - at < FORGET_OVERRUNS_AFTER] + [now]
        LOGGER.warning("process-connector: the kernel dropped events: looking at all processes")
        if len(self._overruns) >= MAX_OVERRUNS:
            LOGGER.warning("process-connector: too many events dropped: watching by pidfds")
            self._may_connect = False
            self._leave_connector()

    # -- Watched: pidfds -----------------------------------------------------------------------------------

    def _key(self, thing: Process) -> int:
        return thing.pid

    def _has_ended(self, thing: Process) -> bool | None:
        return has_ended(thing)

    def _kernel_method(self) -> str:
        return "process connector" if self._connector is not None else "pidfds"

    def _arm(self, key: int) -> None:
        if self._epoll is None or key not in self._watched:
            return
        if self._connector is None and key not in self._pidfds:
            try:
                fd = os.pidfd_open(key)
            except ProcessLookupError:
                pass  # has ended
            except OSError as exc:
                LOGGER.warning("process %d is looked at each second: %s", key, exc.strerror)
                self._look_later(key)
            else:
                self._pidfds[key] = fd
                self._pids[fd] = key
                self._by_hand.discard(key)
                self._epoll.register(fd, select.EPOLLIN)
        self._look(key)

    def _disarm(self, key: int) -> None:
        fd = self._pidfds.pop(key, -1)
        if fd >= 0:
            del self._pids[fd]
            if self._epoll is not None:
                self._epoll.unregister(fd)
            os.close(fd)

    def _look_by_hand(self, keys: Sequence[int]) -> None:
        for pid in keys:
            if self._connector is not None:
                self._by_hand.discard(pid)
            self._arm(pid)

    # -- the connector -----------------------------------------------------------------------------------

    def _want_connector_for_many(self) -> None:
        if self._may_connect and self._connector is None and len(self._watched) > self._many_are:
            self._many.set()

    async def _keep_connector(self) -> None:
        while self._may_connect:
            await self._many.wait()
            connector = await trio.to_thread.run_sync(self._open_connector)
            if connector is None:
                self._may_connect = False
            else:
                await self._enter_connector(connector)
            self._many = trio.Event()

    async def _enter_connector(self, connector: Connector) -> None:
        assert self._epoll is not None
        self._connector, self._connector_at = connector, connector.fileno()
        self._epoll.register(self._connector_at, select.EPOLLIN)
        LOGGER.info("processes are watched by the process connector")
        self._by_hand.clear()
        await self._for_each(self._replace_pidfd)

    def _replace_pidfd(self, pid: int) -> None:
        if self._connector is not None:  # else only few processes are left
            self._disarm(pid)
            self._look(pid)  # the process may have ended before the connector was open

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
    """Open no connector, where none is wanted."""


# -- single processes ------------------------------------------------------------------------------------


def identify(pid: int, uid: int, name: str = "Process") -> Process:
    """Return the process that has a pid now, if a user owns it. Raises CallRefusedError."""
    missing = CallRefusedError(INVALID_ARGS, f"{name}: there is no process {pid}")
    try:
        process = Process(pid, _start_time(pid))
        owner = _owner(pid)
    except (OSError, ValueError, IndexError):
        raise missing from None
    if has_ended(process):
        raise missing
    if uid not in (0, owner):
        raise CallRefusedError(ACCESS_DENIED, f"{name}: process {pid} belongs to another user")
    return process


def identify_fd(fd: int, uid: int, name: str = "ProcessFd") -> Process:
    """Return the process of a pidfd. Raises CallRefusedError."""
    info = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii")
    pids = [line.split()[1] for line in info.splitlines() if line.startswith("Pid:")]
    if not pids:
        raise CallRefusedError(INVALID_ARGS, f"{name} is not a pidfd")
    pid = int(pids[0])
    if pid <= 0:  # ended, or in another pid namespace
        raise CallRefusedError(INVALID_ARGS, f"{name}: not a process that the broker can see")
    process = identify(pid, uid, name)
    if _is_readable(fd):  # the process has ended, and another may have the pid by now
        raise CallRefusedError(INVALID_ARGS, f"{name}: process {pid} has ended")
    return process


def has_ended(process: Process) -> bool | None:
    """Return whether all threads of a process have ended; None if unknown now.

    A later process with the same pid makes no difference.
    """
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    except OSError:  # no descriptor is left
        return _has_ended_by_proc(process)
    try:
        # Readable means that the process has ended, or even a later process with the same pid.
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
    # Other threads may live on after the leader became a zombie.
    return int(fields[19]) != process.start or (fields[0] in "ZX" and int(fields[17]) <= 1)


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _start_time(pid: int) -> int:
    return int(_stat(pid)[19])


def _stat(pid: int) -> list[str]:
    """Return the fields behind the name, which may contain any character."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()


def _owner(pid: int) -> int:
    """Return the real user of a process, also of a setuid program."""
    for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[1])
    raise ValueError(pid)
