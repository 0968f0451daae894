"""The gate: every sandbox and bus it serves, and the supervisor's control socket.

The gate outlives its supervisor. While none is connected it goes on with the rules it has, and keeps in bounded room
(kept.py) what no snapshot tells; the next supervisor gets a snapshot when it asks for one.
"""

import logging
import math
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn, assert_never

from broker.control_protocol.framing import (
    LOST,
    MAX_FRAME_FDS,
    MAX_PART_BYTES,
    FrameReader,
    make_frame,
    split_snapshot,
)
from broker.control_protocol.messages import (
    PROTOCOL,
    AddSandbox,
    Answer,
    CallBus,
    Confirm,
    Done,
    Envelope,
    Event,
    HandedOver,
    HandOver,
    Listeners,
    Refused,
    Request,
    RequestInstanceField,
    SandboxOf,
    SandboxSpec,
    SetAccess,
    SetBuses,
    SetContainerServer,
    Shutdown,
    Snapshot,
    StartNext,
    StopListening,
    StopSandbox,
    TakeListeners,
    TakeSnapshot,
    TakeUsage,
    Usage,
    WhoIs,
)
from broker.gate.bus_id_query import BusIdQuery
from broker.gate.containers1.servers import ContainerServers
from broker.gate.dumps import VERSION, Fds, HandoverError, HandoverHeader, SandboxDump, pick
from broker.gate.event_journal import EventJournal
from broker.gate.filter.bus_state import BusState, make_absent_name
from broker.gate.filter.chores import Work
from broker.gate.handover.channel import Channel, exit_now, hand_over
from broker.gate.instance_field import InstanceFieldRounds
from broker.gate.io.loop import READABLE, Loop
from broker.gate.io.slices import Sliced
from broker.gate.io.stream import SocketStream, StreamClosedError
from broker.gate.name_ledger import NameLedger
from broker.gate.output import Chunk
from broker.gate.sandbox.sandbox import Sandbox
from broker.gate.systemd_service import SystemdService
from broker.posix.channels import READABLE_KIND, ends_with_its_writers, listens
from broker.posix.descriptors import close_fds
from broker.posix.reserve import is_reserved
from broker.posix.sockets import peer_uid, stream_socket_from_fd
from broker.wire import errors
from broker.wire.errors import CallRefusedError, PeerProtocolError

LOGGER: Final = logging.getLogger(__name__)
# A supervisor that does not read is not ours to wait for: it is cut off and can come back.
MAX_UNREAD: Final = 64 * 1024 * 1024
ABSENT_NAME: Final = make_absent_name(os.urandom(16))
# Seconds for it to take what it is told last, of the end of up to 10 000 sandboxes.
LAST_WORDS: Final = 2.0


class Gate:
    """All of it."""

    def __init__(
        self, loop: Loop, manager: SystemdService | None = None, folder: Path | None = None
    ) -> None:
        self._loop: Final = loop
        self._folder: Final = folder  # for what the next gate has to know if this one dies
        self._manager: Final = manager or SystemdService({})
        self._buses: Final[dict[str, BusState]] = {}
        self._meetings: Final[dict[BusState, BusIdQuery]] = {}
        self._sandboxes: Final[dict[str, Sandbox]] = {}
        self._upstreams: Final = ContainerServers(
            loop, self._sandboxes, self._emit, self._answer_late
        )
        self._own: Final = self._upstreams.own
        self._tagging: Final = InstanceFieldRounds(loop, self._answer_late)
        self._kept = EventJournal()
        self._supervisor: SocketStream | None = None
        self._reader = FrameReader()
        self._asked: Final[deque[tuple[Envelope, list[int]]]] = deque()  # and not looked at
        self._is_working = False  # on a request that takes more than a turn: the others wait
        self._control = -1  # what it listens on for supervisors
        self._most_unread: float = MAX_UNREAD  # and more while a snapshot is on its way

    # -- the supervisor's connection ---------------------------------------------------------------

    def serve(self, listening: socket.socket) -> None:
        """Take supervisors, one at a time, of our own uid or root. The socket is ours from here on."""
        listening.setblocking(False)
        self._control = listening.fileno()
        self._loop.add(listening.fileno(), READABLE, lambda _events: self._accept(listening))

    def close(self) -> None:
        """End every sandbox, and the supervisor's connection once it has been told."""
        self._shut_down()
        if self._supervisor is not None:
            self._supervisor.drain(LAST_WORDS)
        self._lose_supervisor("the gate ends")

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except OSError as exc:
            LOGGER.warning("control-accept: %s", exc.strerror)
            return
        if (uid := peer_uid(sock)) not in (0, os.geteuid()):
            LOGGER.warning("control-refused uid=%d", uid)
            sock.close()
            return
        if self._supervisor is not None:
            LOGGER.warning("control-refused: a supervisor is connected")
            sock.close()
            return
        sock.setblocking(False)
        self._reader = FrameReader()
        self._supervisor = SocketStream(self._loop, sock, self._readable, self._bound_unread)
        self._bound_unread()
        for number, event in self._kept.replay():
            self._write(Envelope(serial=0, body=event, number=number))

    def _readable(self) -> None:
        supervisor = self._supervisor
        assert supervisor is not None
        try:
            data, fds, cut = supervisor.read_or_lose_fds()
            self._asked.extend(self._reader.feed(data, fds, cut=cut))
            self._answer_all()
        except BlockingIOError:
            return
        except StreamClosedError:
            self._lose_supervisor("closed")
        except PeerProtocolError as exc:
            self._lose_supervisor(str(exc))

    def _lose_supervisor(self, reason: str) -> None:
        LOGGER.info("supervisor-gone: %s", reason)
        while self._asked:  # and waits for what takes long: nobody was told that it is done
            close_fds(self._asked.popleft()[1])
        close_fds(self._reader.take_all_fds())
        if self._supervisor is not None:
            self._supervisor.close()
            self._supervisor = None
            self._own.supervisor_lost()
            for sandbox in self._sandboxes.values():
                sandbox.waiting_requests.clear()
            for meeting in self._meetings.values():
                meeting.asked.clear()
            self._tagging.give_up("the supervisor is gone")  # which is told nothing any more

    def _write(self, envelope: Envelope, fds: Sequence[int] = ()) -> None:
        """Send an envelope with its descriptors, which are the supervisor's from here on."""
        supervisor = self._supervisor
        if supervisor is None:
            close_fds(fds)
            return
        frame = make_frame(envelope)
        try:
            supervisor.write([Chunk(frame, tuple(fds)) if fds else frame])
        except StreamClosedError:
            self._lose_supervisor("closed")
            return
        if supervisor.queued > self._most_unread:
            self._lose_supervisor("does not read")

    def _emit(self, event: Event) -> None:
        number = self._kept.add(event, is_told=self._supervisor is not None)
        self._write(Envelope(serial=0, body=event, number=number))

    # -- requests ------------------------------------------------------------------------------------

    def _answer_all(self) -> None:
        """Answer one request after the other, until one takes longer than a turn of the loop."""
        while self._asked and not self._is_working:
            self._answer(*self._asked.popleft())

    def _answer(self, envelope: Envelope, fds: list[int]) -> None:
        answer: Answer
        given: Sequence[int] = ()
        self._kept.confirm(envelope.number)
        if isinstance(envelope.body, AddSandbox):
            self._work_on(envelope.serial, self._add(envelope.body.spec, fds), fds)
            return
        if isinstance(envelope.body, SetAccess):
            self._work_on(envelope.serial, self._set_access(envelope.body), fds)
            return
        try:
            if envelope.fds == LOST:
                raise _no_descriptors()
            if isinstance(envelope.body, TakeListeners):
                answer, given = self._lend(envelope.body)
            elif isinstance(envelope.body, StartNext):
                answer = self._manager.start_next(envelope.body, fds)
            elif isinstance(envelope.body, HandOver):
                self._hand_over(envelope.serial, envelope.body, fds)
            elif self._begin(envelope.serial, envelope.body):
                return
            else:
                answer = self._carry_out(envelope.body)  # type: ignore[arg-type]
        except CallRefusedError as exc:
            close_fds(fds)
            answer = Refused(exc.dbus_name, str(exc))
        self._write(Envelope(serial=envelope.serial, body=answer, fds=len(given)), given)

    def _begin(self, serial: int, body: object) -> bool:
        """Start a request that writes its own answer; return False for any other."""
        match body:
            case TakeSnapshot():
                self._tell_snapshot(serial, body)
            case CallBus():
                self._own.call(self._bus(body.bus), body, serial)
            case WhoIs():
                self._say_who(serial, body)
            case RequestInstanceField():
                self._tag(serial, body)
            case StopSandbox():
                self._stop(serial, body)
            case _:
                return False
        return True

    def _work_on(self, serial: int, work: Work, fds: list[int]) -> None:
        """Do a request that compiles rules in slices, then answer it."""
        asker = self._supervisor

        def ended(refused: CallRefusedError | None) -> None:
            self._is_working = False
            answer: Answer = Done()
            if refused is not None:
                close_fds(fds)
                answer = Refused(refused.dbus_name, str(refused))
            if self._supervisor is asker:  # another one did not ask
                self._write(Envelope(serial=serial, body=answer))

        self._is_working = True
        Sliced(self._loop, work, ended).begin(self._answer_all)

    def _say_who(self, serial: int, request: WhoIs) -> None:
        bus = self._bus(request.bus)
        if bus.is_authenticated or not bus.ledger.is_doubtful(request.unique_name):
            self._answer_late(serial, SandboxOf(bus.who(request.unique_name)))
            return
        meeting = self._meetings.get(bus)
        if meeting is None:
            meeting = BusIdQuery(self._loop, bus, os.geteuid(), self._has_met)
            self._meetings[bus] = meeting
        meeting.asked.append((serial, request.unique_name))

    def _has_met(self, meeting: BusIdQuery) -> None:
        bus = meeting.bus
        if self._meetings.get(bus) is meeting:
            del self._meetings[bus]
        asked, meeting.asked = meeting.asked, []
        for serial, unique_name in asked:
            answer: SandboxOf | Refused = SandboxOf(bus.who(unique_name))
            if not bus.is_authenticated:
                answer = Refused(errors.DISCONNECTED, f"bus {bus.name} does not say which it is")
            self._answer_late(serial, answer)

    def _stop(self, serial: int, request: StopSandbox) -> None:
        sandbox = self._find(request.sandbox)
        sandbox.waiting_requests.append(serial)
        sandbox.stop(request.reason)

    def _answer_late(self, asked: int, answer: Answer) -> None:
        self._write(Envelope(serial=asked, body=answer))

    def _lend(self, request: TakeListeners) -> tuple[Listeners, Sequence[int]]:
        """Return duplicates of what sandboxes listen on. Raises CallRefusedError."""
        sandboxes = [one for id_ in request.sandboxes if (one := self._sandboxes.get(id_))]
        what = [(one.id, bus, fd) for one in sandboxes for bus, fd in one.descriptors()]
        if len(what) > MAX_FRAME_FDS:
            raise CallRefusedError(errors.INVALID_ARGS, "more descriptors than one frame may have")
        fds: list[int] = []
        try:
            fds.extend(os.dup(fd) for _, _, fd in what)
        except OSError as exc:
            close_fds(fds)
            raise CallRefusedError(errors.FAILED, exc.strerror or "no descriptor") from exc
        return Listeners(tuple((id_, bus) for id_, bus, _ in what)), fds

    def _carry_out(self, request: Request) -> Answer:
        match request:
            case StopListening():
                self._find(request.sandbox).stop_listening()
            case SetBuses():
                for spec in request.buses:
                    if spec.name not in self._buses:
                        self._buses[spec.name] = self._make_bus(spec.name, spec.address)
                    self._buses[spec.name].address = spec.address
            case TakeUsage():
                return self._use(request.sandbox)
            case Shutdown():
                self._shut_down()
            case SetContainerServer():
                self._bus(request.bus)
                self._upstreams.set(self._find(request.sandbox), request.bus, request.server)
            case (
                AddSandbox()
                | SetAccess()
                | Confirm()
                | StartNext()
                | TakeListeners()
                | TakeSnapshot()
                | HandOver()
                | CallBus()
                | WhoIs()
                | RequestInstanceField()
                | StopSandbox()
            ):
                pass  # done by now, or later
            case _:
                assert_never(request)
        return Done()

    def _make_bus(self, name: str, address: str) -> BusState:
        return BusState(name, address, NameLedger(self._folder), ABSENT_NAME)

    def _add(self, spec: SandboxSpec, fds: list[int]) -> Work:
        if spec.id in self._sandboxes:
            raise CallRefusedError(errors.FAILED, f"sandbox {spec.id} is there already")
        for listener in spec.listeners:
            self._bus(listener.bus)
        wanted = [listener.fd for listener in spec.listeners]
        if spec.close_notify is not None:
            wanted.append(spec.close_notify)
        if sorted(wanted) != list(range(len(fds))):
            raise CallRefusedError(errors.INVALID_ARGS, "the descriptors do not fit the sandbox")
        _check_kinds(spec, fds)
        if is_reserved(fds):
            raise _no_descriptors()
        sandbox = Sandbox(self._loop, spec, self._buses, self._emit, self._sandbox_changed)
        yield from sandbox.compile()
        self._own.claim(spec.id, spec.uid, spec.container_servers)
        self._kept.forget_end(spec.id)
        self._sandboxes[spec.id] = sandbox
        try:
            sandbox.open(fds)
        except OSError as exc:  # e.g. no room in the loop
            sandbox.stop("stopped")
            raise CallRefusedError(errors.FAILED, exc.strerror or "no room") from exc

    def _set_access(self, request: SetAccess) -> Work:
        yield from self._find(request.sandbox).set_access(request.access)

    def _tag(self, serial: int, request: RequestInstanceField) -> None:
        bus = self._bus(request.bus)
        if request.wanted:
            self._tagging.wish(bus, request.unique_name, serial)
        else:
            self._tagging.take_back(bus, request.unique_name)
            self._answer_late(serial, Done())

    def _find(self, sandbox: str) -> Sandbox:
        found = self._sandboxes.get(sandbox)
        if found is None:
            raise CallRefusedError(errors.NOT_CONTAINER, f"no sandbox {sandbox[:40]!r}")
        return found

    def _bus(self, name: str) -> BusState:
        bus = self._buses.get(name)
        if bus is None:
            raise CallRefusedError(errors.INVALID_ARGS, f"no bus {name[:40]!r}")
        return bus

    def _sandbox_changed(self, sandbox: Sandbox) -> None:
        if sandbox.is_over:
            self._sandboxes.pop(sandbox.id, None)
        self._upstreams.follow(sandbox)
        if sandbox.is_over:
            for serial in sandbox.waiting_requests:
                self._answer_late(serial, Done())
            sandbox.waiting_requests.clear()

    def _tell_snapshot(self, serial: int, request: TakeSnapshot) -> None:
        buses = tuple(bus.spec() for bus in self._buses.values())
        head = Snapshot(protocol=PROTOCOL, pid=os.getpid(), buses=buses, sandboxes=())
        states = [sandbox.state() for sandbox in self._sandboxes.values()]
        # It is as long as it is, and was asked for.
        self._most_unread = math.inf
        for part in split_snapshot(head, states, MAX_PART_BYTES if request.in_parts else math.inf):
            self._write(Envelope(serial=serial, body=part))
        self._bound_unread()

    def _bound_unread(self) -> None:
        """Have room for as much as ever beyond what there is."""
        queued = self._supervisor.queued if self._supervisor is not None else 0
        self._most_unread = queued + MAX_UNREAD

    def _use(self, sandbox: str | None) -> Usage:
        if sandbox is not None:
            return self._find(sandbox).usage()
        return sum((one.usage() for one in self._sandboxes.values()), Usage())

    # -- handing over ---------------------------------------------------------------------------------

    def _hand_over(self, serial: int, request: HandOver, fds: list[int]) -> NoReturn:
        """Have another process go on. Raises CallRefusedError, and nothing has changed."""
        if len(fds) != 1:
            raise CallRefusedError(errors.INVALID_ARGS, "HandOver takes one descriptor")
        self._own.settle()
        self._settle()
        channel = Channel(fds.pop(), request.seconds)
        try:
            dumps = [sandbox.dump for sandbox in self._sandboxes.values()]
            hand_over(channel, self.dumper(serial, request.protocol, os.getpid()), dumps)
        except HandoverError as exc:
            LOGGER.warning("hand-over: %s", exc)
            text = f"the new gate does not take over: {exc}"
            raise CallRefusedError(errors.FAILED, text) from exc
        finally:
            channel.close()
        exit_now(self._manager.replaced)

    def _settle(self) -> None:
        """Settle what is not handed over: chores of connections, meetings, barriers."""
        for sandbox in self._sandboxes.values():
            sandbox.settle()
        for meeting in list(self._meetings.values()):
            meeting.end()
            self._has_met(meeting)
        self._tagging.give_up("the gate is being replaced: try again")
        known = {rest for sandbox in self._sandboxes.values() for rest in sandbox.lingering}
        for bus in self._buses.values():
            for rest in [one for one in bus.lingering.values() if one not in known]:
                rest.close()  # its sandbox's end has been told

    def dumper(self, serial: int, protocol: int, pid: int) -> Callable[[Fds], HandoverHeader]:
        """Return what makes the first frame of a hand-over that is asked for by that request."""

        def dump(fds: Fds) -> HandoverHeader:
            rest, rest_fds = self._reader.rest()
            asked = [make_frame(envelope) for envelope, _ in self._asked]
            asked_fds = [fd for _, own in self._asked for fd in own]
            return HandoverHeader(
                version=VERSION,
                pid=pid,
                control=fds.put(self._control),
                supervisor=self._supervisor.dump(fds) if self._supervisor is not None else None,
                serial=serial,
                protocol=protocol,
                unanswered=b"".join([*asked, rest]),
                unanswered_fds=fds.put_all([*asked_fds, *rest_fds]),
                buses=tuple(bus.dump() for bus in self._buses.values()),
                bus_clients=self._own.dump(fds),
                journal=self._kept,
                sandboxes=len(self._sandboxes),
            )

        return dump

    def load(self, opening: HandoverHeader, fds: Sequence[int]) -> None:
        """Be as the gate was that made the dump, but for its sandboxes, and for going on: `resume` does that."""
        self.serve(stream_socket_from_fd(fds[opening.control]))
        if opening.supervisor is not None:
            sock = stream_socket_from_fd(fds[opening.supervisor.fd])
            self._supervisor = SocketStream(self._loop, sock, self._readable, self._bound_unread)
            self._supervisor.load(opening.supervisor, fds)
            self._bound_unread()
        self._asked.extend(self._reader.feed(opening.unanswered, pick(fds, opening.unanswered_fds)))
        self._kept = opening.journal
        for one in opening.buses:
            bus = self._buses[one.name] = self._make_bus(one.name, one.address)
            bus.load(one)
        self._own.load(opening.bus_clients, self._buses, fds)

    def add_empty(self, dump: SandboxDump) -> Sandbox:
        """Return a new sandbox, for one that was there."""
        spec = dump.spec
        sandbox = Sandbox(self._loop, spec, self._buses, self._emit, self._sandbox_changed)
        self._sandboxes[sandbox.id] = sandbox
        return sandbox

    def resume(self, serial: int) -> None:
        """Go on where the gate was that made the dump."""
        self._write(Envelope(serial=serial, body=HandedOver(os.getpid())))
        for bus in self._buses.values():
            try:
                bus.resume()
            except OSError as exc:  # the connections are there, and as good as before
                LOGGER.warning("ledger bus=%s: %s", bus.name, exc)
        for sandbox in list(self._sandboxes.values()):
            sandbox.resume()
        self._answer_all()

    def _shut_down(self) -> None:
        for sandbox in list(self._sandboxes.values()):
            sandbox.stop("stopped")
            sandbox.abandon()
        self._own.close()
        self._loop.stop()


def _check_kinds(spec: SandboxSpec, fds: Sequence[int]) -> None:
    """Check once more what the supervisor has checked: the gate would wait for it for good."""
    for listener in spec.listeners:
        if not listens(fds[listener.fd]):
            raise CallRefusedError(errors.INVALID_ARGS, "Socket is not a listening socket")
    if spec.close_notify is not None and not ends_with_its_writers(fds[spec.close_notify]):
        raise CallRefusedError(errors.INVALID_ARGS, f"CloseNotify is not {READABLE_KIND}")


def _no_descriptors() -> CallRefusedError:
    return CallRefusedError(errors.LIMITS_EXCEEDED, "the gate has no file descriptors left")
