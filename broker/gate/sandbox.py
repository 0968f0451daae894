"""A sandbox in the gate: its listening sockets, its connections, its rules, its end."""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from broker.gate.budgets import CONNECTION_COST, JUDGED_A_TURN, Complaints, MessageBudget
from broker.gate.bus import Bus
from broker.gate.control import (
    Connected,
    Denied,
    Ended,
    Event,
    Gone,
    Listener,
    SandboxSpec,
    SandboxState,
    Use,
)
from broker.gate.core import Core, Denial
from broker.gate.filter import Filter
from broker.gate.link import Link
from broker.gate.loop import READABLE, Loop
from broker.gate.pipe import close_fds
from policy.match import Judge
from policy.rules import AccessList

# Refusals that are reported one by one, a sandbox; the others are counted.
REPORTS_PER_SECOND: Final = 50
# After running out of descriptors: until then somebody may have closed some.
ACCEPT_PAUSE: Final = 0.1  # seconds
# Connections taken in one turn of the loop, so that one sandbox does not keep the others waiting.
ACCEPTS_A_TURN: Final = 16
# What a socket calls itself in the handshake when nobody gave it a guid: 32 hex digits.
GUID: Final = os.urandom(16).hex()
_UCRED: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid


class Sandbox:
    """One app instance."""

    def __init__(
        self,
        loop: Loop,
        spec: SandboxSpec,
        buses: dict[str, Bus],
        emit: Callable[[Event], None],
        ended: Callable[["Sandbox"], None],
    ) -> None:
        self._loop: Final = loop
        self.spec = spec
        self.id: Final = spec.id
        self.identity: Final = spec.identity
        self.limits: Final = spec.limits
        self.bytes_held = 0
        self.messages: Final = MessageBudget(spec.limits.messages_per_second)
        self.complaints: Final = Complaints(spec.id, spec.limits.log_lines_per_second)
        self.is_throttled = False
        self._throttled_count = 0
        self.denied_count = 0
        self.links: Final[set[Link]] = set()
        self._buses: Final = buses
        self._emit: Final = emit
        self._ended: Final = ended
        self._judges: dict[str, Judge] = {}
        self._listening: Final[dict[int, tuple[socket.socket, Listener]]] = {}
        self._close_pipe = -1
        self._reports_left = REPORTS_PER_SECOND
        self._unreported = 0
        self._is_over = False

    # -- life ------------------------------------------------------------------------------------

    def open(self, fds: Sequence[int]) -> None:
        """Serve the sockets. The descriptors are the sandbox's from here on."""
        for listener in self.spec.listeners:
            sock = socket.socket(fileno=fds[listener.fd])
            sock.setblocking(False)
            self._listening[sock.fileno()] = (sock, listener)
            self._loop.add(sock.fileno(), READABLE, partial(self._readable, sock.fileno()))
        if self.spec.close_notify is not None:
            self._close_pipe = fds[self.spec.close_notify]
            os.set_blocking(self._close_pipe, False)
            self._loop.add(self._close_pipe, READABLE, self._close_notify)

    def stop_listening(self) -> None:
        """Take no more connections; end with the last one."""
        for fd, (sock, listener) in list(self._listening.items()):
            self._loop.remove(fd)
            sock.close()
            _unlink(listener)
        self._listening.clear()
        self._end_if_done("last-connection")

    def stop(self, reason: str) -> None:
        """End it, connections and all."""
        if self._is_over:
            return
        self._is_over = True
        self.stop_listening()
        for link in list(self.links):
            link.close(reason)
        if self._close_pipe >= 0:
            self._loop.remove(self._close_pipe)
            os.close(self._close_pipe)
            self._close_pipe = -1
        self._report_rest()
        self.complaints.tell()
        self._emit(Ended(self.id, reason))
        self._ended(self)

    def _close_notify(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            if os.read(self._close_pipe, 4096):
                return  # bytes mean nothing; the end does
            self.stop("close-notify")

    def _end_if_done(self, reason: str) -> None:
        if not self._is_over and not self._listening and not self.links:
            self.stop(reason)

    # -- rules -----------------------------------------------------------------------------------

    def judge(self, bus: str) -> Judge:
        """Return the rules of this sandbox on a bus, compiled."""
        judge = self._judges.get(bus)
        if judge is None:
            judge = Judge(self.spec.access, bus=bus, me=self.identity)
            self._judges[bus] = judge
        return judge

    def set_access(self, access: AccessList) -> None:
        """Judge by other rules from now on. Raises ValueError, and nothing has changed."""
        judges = {
            listener.bus: Judge(access, bus=listener.bus, me=self.identity)
            for listener in self.spec.listeners
        }
        self.spec = msgspec.structs.replace(self.spec, access=access)
        self._judges = judges
        for link in list(self.links):
            judging = link.filter
            if judging is not None:
                judge = self.judge(judging.core.bus.name)
                link.use(judge)

    # -- connections -------------------------------------------------------------------------------

    def _readable(self, fd: int, _events: int) -> None:
        self._accept(fd)

    def _accept(self, fd: int) -> None:
        sock, listener = self._listening[fd]
        for _ in range(ACCEPTS_A_TURN):
            try:
                connection, _ = sock.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    self.complaints.add("accept", exc.strerror or "")
                    self._loop.change(fd, 0)
                    self._loop.call_later(ACCEPT_PAUSE, partial(self._accept_again, fd))
                return
            try:
                self._take(connection, listener)
            except (OSError, MemoryError) as exc:  # e.g. no room in the loop
                connection.close()
                self.complaints.add("accept", str(exc))
            if self.charge(CONNECTION_COST):
                return

    def _accept_again(self, fd: int) -> None:
        if fd in self._listening and not self.is_throttled:
            self._loop.change(fd, READABLE)

    def _take(self, connection: socket.socket, listener: Listener) -> None:
        _, uid, _ = _UCRED.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        if uid != self.spec.uid:
            self.complaints.add("wrong-uid", f"uid={uid}")
            connection.close()
            return
        if len(self.links) >= self.limits.connections:
            most = self.limits.connections
            self.complaints.add("too-many-connections", f"max_connections_per_container={most}")
            connection.close()
            return
        connection.setblocking(False)
        bus = self._buses[listener.bus]
        self.links.add(Link(self._loop, self, bus, connection, listener.guid or GUID))

    def make_filter(self, bus: Bus, *, app_takes_fds: bool) -> Filter:
        """Return what judges a new connection."""
        return Filter(
            bus,
            self,
            self.judge(bus.name),
            app_takes_fds=app_takes_fds,
            judged_a_turn=JUDGED_A_TURN,
        )

    def said_hello(self, core: Core) -> None:
        """Register a connection, before its app can use it."""
        core.bus.connected(core.unique_name, self.id, self.identity)
        self._emit(Connected(self.id, core.bus.name, core.unique_name))
        for link in self.links:
            if link.filter is not None and link.filter.core is core:
                link.said_hello()

    def link_closed(self, link: Link) -> None:
        """Forget a connection."""
        self.links.discard(link)
        core = link.filter.core if link.filter is not None else None
        if core is not None and core.unique_name:
            core.bus.gone(core.unique_name)
            self._emit(Gone(self.id, core.bus.name, core.unique_name))
        self._end_if_done("last-connection")

    # -- budgets -----------------------------------------------------------------------------------

    def charge(self, cost: int) -> bool:
        """Take note of messages. True: whoever sent them is not to be read until `read_on`.

        The sandbox's other connections get one read each meanwhile: one cannot starve them.
        """
        self.messages.left -= cost
        if self.messages.left < 0 and not self.is_throttled and (wait := self.messages.pause()):
            self._throttled_count += 1
            self._throttle(throttled=True)
            self._loop.call_later(wait, self._waited)
        return self.is_throttled

    def _waited(self) -> None:
        if self._is_over:
            return
        if wait := self.messages.pause():
            self._loop.call_later(wait, self._waited)
        else:
            self._throttle(throttled=False)
            for link in list(self.links):
                link.read_on()

    def _throttle(self, *, throttled: bool) -> None:
        self.is_throttled = throttled
        for fd in self._listening:
            self._loop.change(fd, 0 if throttled else READABLE)

    @property
    def fds(self) -> int:
        """How many descriptors of messages are here."""
        return sum(link.fds for link in self.links)

    def taken(self) -> Use:
        """Return what is taken of the limits."""
        mine = Use(
            bytes_held=self.bytes_held,
            messages_per_second=self.messages.used,
            log_lines_per_second=self.complaints.used,
            throttled=self._throttled_count,
            suppressed=self.complaints.suppressed_ever,
        )
        return sum((link.taken() for link in self.links), mine)

    def close_fds(self, fds: Sequence[int]) -> None:
        """Close what a refused message brought."""
        close_fds(fds)

    # -- reports -----------------------------------------------------------------------------------

    def denied(self, core: Core, denial: Denial) -> None:
        """Report a refusal, or count it when there are too many."""
        self.denied_count += 1
        if not self._reports_left:
            self._unreported += 1
            return
        if self._reports_left == REPORTS_PER_SECOND:
            self._loop.call_later(1.0, self._refill)
        self._reports_left -= 1
        self._emit(
            Denied(sandbox=self.id, bus=core.bus.name, more=self._unreported, **denial._asdict())
        )
        self._unreported = 0

    def _refill(self) -> None:
        self._reports_left = REPORTS_PER_SECOND
        self._report_rest()

    def _report_rest(self) -> None:
        if self._unreported:
            more, self._unreported = self._unreported, 0
            self._emit(
                Denied(
                    sandbox=self.id,
                    bus="",
                    direction="",
                    kind="",
                    peer="",
                    reason="too many to report one by one",
                    more=more,
                )
            )

    def state(self) -> SandboxState:
        """Return what the supervisor may want to know."""
        named = [
            (link.filter.core.bus.name, link.filter.core.unique_name)
            for link in self.links
            if link.filter is not None and link.filter.core.unique_name
        ]
        return SandboxState(
            spec=self.spec,
            listening=bool(self._listening),
            connections=tuple(sorted(named)),
            opening=len(self.links) - len(named),
            denied=self.denied_count,
            use=self.taken(),
        )


def _unlink(listener: Listener) -> None:
    """Remove the socket's file, if it is still the one that we were given."""
    if not listener.path:
        return
    with contextlib.suppress(OSError):
        path = Path(listener.path)
        found = path.lstat()
        if (found.st_dev, found.st_ino) == (listener.device, listener.inode):
            path.unlink()
