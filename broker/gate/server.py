"""The gate: every sandbox and bus it serves, and the supervisor's control socket.

The gate outlives its supervisor. While none is connected it goes on with the rules it has, and keeps
what happened in a bounded queue; the next supervisor gets a snapshot when it asks for one.
"""

import logging
import os
import socket
import struct
from collections import deque
from typing import Final, assert_never

from broker.gate.bus import Bus
from broker.gate.control import (
    PROTOCOL,
    AddSandbox,
    Answer,
    Done,
    Ended,
    Envelope,
    Event,
    FrameReader,
    Refused,
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
    make_frame,
)
from broker.gate.loop import READABLE, Loop
from broker.gate.pipe import Closed, Pipe, close_fds
from broker.gate.sandbox import Sandbox
from broker.wire import errors
from broker.wire.errors import CallRefusedError, PeerProtocolError

LOGGER: Final = logging.getLogger(__name__)

# What happened while no supervisor was there: enough for the end of each of 10 000 sandboxes, since
# these are kept when the rest is thrown away (a snapshot tells the rest).
MAX_KEPT_EVENTS: Final = 10_000
# A supervisor that does not read is not ours to wait for: it is cut off and can come back.
MAX_UNREAD: Final = 64 * 1024 * 1024
_UCRED: Final = struct.Struct("iII")


class Gate:
    """All of it."""

    def __init__(self, loop: Loop) -> None:
        self._loop: Final = loop
        self._buses: Final[dict[str, Bus]] = {}
        self._sandboxes: Final[dict[str, Sandbox]] = {}
        self._kept: Final[deque[Event]] = deque(maxlen=MAX_KEPT_EVENTS)
        self._supervisor: Pipe | None = None
        self._reader = FrameReader()

    # -- the supervisor's connection ---------------------------------------------------------------

    def serve(self, listening: socket.socket) -> None:
        """Take supervisors, one at a time, of our own uid or root."""
        listening.setblocking(False)
        self._loop.add(listening.fileno(), READABLE, lambda _events: self._accept(listening))

    def close(self) -> None:
        """End every sandbox, and the supervisor's connection."""
        self._shut_down()
        self._lose_supervisor("the gate ends")

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except OSError as exc:
            LOGGER.warning("control-accept: %s", exc.strerror)
            return
        _, uid, _ = _UCRED.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        if uid not in (0, os.geteuid()):
            LOGGER.warning("control-refused uid=%d", uid)
            sock.close()
            return
        if self._supervisor is not None:
            LOGGER.warning("control-refused: a supervisor is connected")
            sock.close()
            return
        sock.setblocking(False)
        self._reader = FrameReader()
        self._supervisor = Pipe(self._loop, sock, self._readable, lambda: None)
        kept = list(self._kept)
        self._kept.clear()
        for event in kept:
            self._emit(event)

    def _readable(self) -> None:
        supervisor = self._supervisor
        assert supervisor is not None
        try:
            data, fds = supervisor.read()
            for envelope, own in self._reader.feed(data, fds):
                self._answer(envelope, own)
        except BlockingIOError:
            return
        except Closed:
            self._lose_supervisor("closed")
        except PeerProtocolError as exc:
            self._lose_supervisor(str(exc))

    def _lose_supervisor(self, reason: str) -> None:
        LOGGER.info("supervisor-gone: %s", reason)
        close_fds(self._reader.take_all_fds())
        if self._supervisor is not None:
            self._supervisor.close()
            self._supervisor = None

    def _write(self, envelope: Envelope) -> None:
        supervisor = self._supervisor
        if supervisor is None:
            return
        try:
            supervisor.write([make_frame(envelope)])
        except Closed:
            self._lose_supervisor("closed")
            return
        if supervisor.queued > MAX_UNREAD:
            self._lose_supervisor("does not read")

    def _emit(self, event: Event) -> None:
        if self._supervisor is not None:
            self._write(Envelope(serial=0, body=event))
        elif isinstance(event, Ended):
            self._kept.append(event)

    # -- requests ------------------------------------------------------------------------------------

    def _answer(self, envelope: Envelope, fds: list[int]) -> None:
        answer: Answer
        try:
            answer = self._carry_out(envelope.body, fds)  # type: ignore[arg-type]
        except CallRefusedError as exc:
            close_fds(fds)
            answer = Refused(exc.dbus_name, str(exc))
        self._write(Envelope(serial=envelope.serial, body=answer))

    def _carry_out(self, request: Request, fds: list[int]) -> Answer:  # noqa: C901 - a table
        match request:
            case AddSandbox():
                self._add(request.spec, fds)
            case SetAccess():
                self._set_access(request)
            case StopListening():
                self._find(request.sandbox).stop_listening()
            case StopSandbox():
                self._find(request.sandbox).stop("stopped")
            case WhoIs():
                bus = self._bus(request.bus)
                return SandboxOf(bus.sandboxes.get(request.unique_name))
            case TagHeaders():
                self._tag(self._bus(request.bus), request.unique_name)
            case SetBuses():
                for spec in request.buses:
                    self._buses.setdefault(
                        spec.name, Bus(spec.name, spec.address)
                    ).address = spec.address
            case TakeSnapshot():
                return self._snapshot()
            case TakeUse():
                return self._use(request.sandbox)
            case Shutdown():
                self._shut_down()
            case _:
                assert_never(request)
        return Done()

    def _add(self, spec: SandboxSpec, fds: list[int]) -> None:
        if spec.id in self._sandboxes:
            raise CallRefusedError(errors.FAILED, f"sandbox {spec.id} is there already")
        for listener in spec.listeners:
            self._bus(listener.bus)
        wanted = [listener.fd for listener in spec.listeners]
        if spec.close_notify is not None:
            wanted.append(spec.close_notify)
        if sorted(wanted) != list(range(len(fds))):
            raise CallRefusedError(errors.INVALID_ARGS, "the descriptors do not fit the sandbox")
        sandbox = Sandbox(self._loop, spec, self._buses, self._emit, self._sandbox_ended)
        try:
            for listener in spec.listeners:
                sandbox.judge(listener.bus)
        except ValueError as exc:
            raise CallRefusedError(errors.INVALID_ARGS, str(exc)) from exc
        self._sandboxes[spec.id] = sandbox
        sandbox.open(fds)

    def _set_access(self, request: SetAccess) -> None:
        try:
            self._find(request.sandbox).set_access(request.access)
        except ValueError as exc:
            raise CallRefusedError(errors.INVALID_ARGS, str(exc)) from exc

    def _tag(self, bus: Bus, unique_name: str) -> None:
        bus.tagged.add(unique_name)
        for core in bus.members:
            core.forget_verdicts()

    def _find(self, sandbox: str) -> Sandbox:
        found = self._sandboxes.get(sandbox)
        if found is None:
            raise CallRefusedError(errors.NOT_CONTAINER, f"no sandbox {sandbox[:40]!r}")
        return found

    def _bus(self, name: str) -> Bus:
        bus = self._buses.get(name)
        if bus is None:
            raise CallRefusedError(errors.INVALID_ARGS, f"no bus {name[:40]!r}")
        return bus

    def _sandbox_ended(self, sandbox: Sandbox) -> None:
        self._sandboxes.pop(sandbox.id, None)

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            protocol=PROTOCOL,
            pid=os.getpid(),
            buses=tuple(bus.spec() for bus in self._buses.values()),
            sandboxes=tuple(sandbox.state() for sandbox in self._sandboxes.values()),
        )

    def _use(self, sandbox: str | None) -> Use:
        if sandbox is not None:
            return self._find(sandbox).taken()
        return sum((one.taken() for one in self._sandboxes.values()), Use())

    def _shut_down(self) -> None:
        for sandbox in list(self._sandboxes.values()):
            sandbox.stop("stopped")
        self._loop.stop()
