"""The gate: the sandboxes and buses of one process, and the supervisor's requests.

The gate outlives the supervisor. Without a supervisor the gate continues with the present rules,
and the next supervisor asks for a snapshot. supervisor_channel.py transports requests, answers and
events. This module carries out the requests.
"""

import logging
import math
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn, assert_never

from broker.control_protocol.framing import LOST, MAX_FRAME_FDS, MAX_PART_BYTES, split_snapshot
from broker.control_protocol.messages import (
    PROTOCOL,
    AddSandbox,
    Answer,
    CallBus,
    Confirm,
    Done,
    Envelope,
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
from broker.gate.dumps import VERSION, Fds, HandoverError, HandoverHeader, SandboxDump
from broker.gate.filter.bus_state import BusState, make_absent_name
from broker.gate.filter.chores import Work
from broker.gate.handover.channel import Channel, exit_now, hand_over
from broker.gate.instance_field import InstanceFieldRounds
from broker.gate.io.loop import Loop
from broker.gate.io.slices import Sliced
from broker.gate.name_ledger import NameLedger
from broker.gate.sandbox.sandbox import Sandbox
from broker.gate.supervisor_channel import SupervisorChannel
from broker.gate.systemd_service import SystemdService
from broker.posix.channels import READABLE_KIND, ends_with_its_writers, listens
from broker.posix.descriptors import close_fds
from broker.posix.reserve import is_reserved
from broker.wire import errors
from broker.wire.errors import CallRefusedError

LOGGER: Final = logging.getLogger(__name__)
ABSENT_NAME: Final = make_absent_name(os.urandom(16))
# Seconds for the supervisor to read the last events, which are the ends of up to 10 000 sandboxes.
DRAIN_SECONDS: Final = 2.0


class Gate:
    """The sandboxes and buses of one gate process."""

    def __init__(
        self, loop: Loop, service: SystemdService | None = None, folder: Path | None = None
    ) -> None:
        """Make a gate without sandboxes. `folder` has the files that outlive a gate that dies."""
        self._loop: Final = loop
        self._folder: Final = folder
        self._service: Final = service or SystemdService({})
        self._buses: Final[dict[str, BusState]] = {}
        self._id_queries: Final[dict[BusState, BusIdQuery]] = {}
        self._sandboxes: Final[dict[str, Sandbox]] = {}
        self._channel: Final = SupervisorChannel(loop, self._answer, self._supervisor_lost)
        self._container_servers: Final = ContainerServers(
            loop, self._sandboxes, self._channel.emit, self._channel.answer
        )
        self._bus_clients: Final = self._container_servers.bus_clients
        self._instance_fields: Final = InstanceFieldRounds(loop, self._channel.answer)

    def serve(self, listening: socket.socket) -> None:
        """Accept supervisors on a socket, which belongs to the gate from here on."""
        self._channel.serve(listening)

    def close(self) -> None:
        """End every sandbox, and then the supervisor's connection, after the last events."""
        self._shut_down()
        self._channel.drain(DRAIN_SECONDS)
        self._channel.lose("the gate ends")

    def _supervisor_lost(self) -> None:
        """Forget all waiting requests, whose answers no supervisor would read."""
        self._bus_clients.supervisor_lost()
        for sandbox in self._sandboxes.values():
            sandbox.waiting_requests.clear()
        for query in self._id_queries.values():
            query.waiting_requests.clear()
        self._instance_fields.give_up("the supervisor is gone")

    # -- requests ----------------------------------------------------------------------------------

    def _answer(self, envelope: Envelope, fds: list[int]) -> None:
        answer: Answer
        given: Sequence[int] = ()
        self._channel.confirm(envelope.number)
        if isinstance(envelope.body, AddSandbox):
            self._answer_in_slices(envelope.serial, self._add(envelope.body.spec, fds), fds)
            return
        if isinstance(envelope.body, SetAccess):
            self._answer_in_slices(envelope.serial, self._set_access(envelope.body), fds)
            return
        try:
            if envelope.fds == LOST:
                raise _no_descriptors()
            if isinstance(envelope.body, TakeListeners):
                answer, given = self._duplicate_listeners(envelope.body)
            elif isinstance(envelope.body, StartNext):
                answer = self._service.start_next(envelope.body, fds)
            elif isinstance(envelope.body, HandOver):
                self._hand_over(envelope.serial, envelope.body, fds)
            elif self._begin(envelope.serial, envelope.body):
                return
            else:
                answer = self._carry_out(envelope.body)  # type: ignore[arg-type]
        except CallRefusedError as exc:
            close_fds(fds)
            answer = Refused(exc.dbus_name, str(exc))
        self._channel.answer(envelope.serial, answer, given)

    def _begin(self, serial: int, body: object) -> bool:
        """Begin a request that is answered elsewhere, perhaps later.

        Return False for other requests.
        """
        match body:
            case TakeSnapshot():
                self._send_snapshot(serial, body)
            case CallBus():
                self._bus_clients.call(self._find_bus(body.bus), body, serial)
            case WhoIs():
                self._identify(serial, body)
            case RequestInstanceField():
                self._request_instance_field(serial, body)
            case StopSandbox():
                self._stop(serial, body)
            case _:
                return False
        return True

    def _answer_in_slices(self, serial: int, work: Work, fds: list[int]) -> None:
        """Carry out a request that compiles rules, in slices, and answer. Later requests wait."""
        asker = self._channel.connection

        def ended(refused: CallRefusedError | None) -> None:
            self._channel.is_busy = False
            answer: Answer = Done()
            if refused is not None:
                close_fds(fds)
                answer = Refused(refused.dbus_name, str(refused))
            # The serial has a meaning on the connection of the request alone.
            if self._channel.connection is asker:
                self._channel.answer(serial, answer)

        self._channel.is_busy = True
        Sliced(self._loop, work, ended).begin(self._channel.serve_requests)

    def _identify(self, serial: int, request: WhoIs) -> None:
        """Answer which sandbox has a unique name.

        If necessary, ask for the id of the bus first.
        """
        bus = self._find_bus(request.bus)
        if bus.is_authenticated or not bus.ledger.is_doubtful(request.unique_name):
            self._channel.answer(serial, SandboxOf(bus.who(request.unique_name)))
            return
        query = self._id_queries.get(bus)
        if query is None:
            query = BusIdQuery(self._loop, bus, os.geteuid(), self._id_query_ended)
            self._id_queries[bus] = query
        query.waiting_requests.append((serial, request.unique_name))

    def _id_query_ended(self, query: BusIdQuery) -> None:
        bus = query.bus
        if self._id_queries.get(bus) is query:
            del self._id_queries[bus]
        requests, query.waiting_requests = query.waiting_requests, []
        for serial, unique_name in requests:
            answer: SandboxOf | Refused = SandboxOf(bus.who(unique_name))
            if not bus.is_authenticated:
                answer = Refused(errors.DISCONNECTED, f"bus {bus.name} does not tell the bus id")
            self._channel.answer(serial, answer)

    def _stop(self, serial: int, request: StopSandbox) -> None:
        sandbox = self._find_sandbox(request.sandbox)
        sandbox.waiting_requests.append(serial)
        sandbox.stop(request.reason)

    def _duplicate_listeners(self, request: TakeListeners) -> tuple[Listeners, Sequence[int]]:
        """Return duplicates of the sandboxes' listening sockets and pipes.

        Raises CallRefusedError.
        """
        sandboxes = [one for id_ in request.sandboxes if (one := self._sandboxes.get(id_))]
        what = [(one.id, bus, fd) for one in sandboxes for bus, fd in one.descriptors()]
        if len(what) > MAX_FRAME_FDS:
            raise CallRefusedError(errors.INVALID_ARGS, "more descriptors than fit into a frame")
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
                self._find_sandbox(request.sandbox).stop_listening()
            case SetBuses():
                for spec in request.buses:
                    if spec.name not in self._buses:
                        self._buses[spec.name] = self._make_bus(spec.name, spec.address)
                    self._buses[spec.name].address = spec.address
            case TakeUsage():
                return self._usage(request.sandbox)
            case Shutdown():
                self._shut_down()
            case SetContainerServer():
                self._find_bus(request.bus)
                self._container_servers.set(
                    self._find_sandbox(request.sandbox), request.bus, request.server
                )
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
                pass  # Carried out already, or later.
            case _:
                assert_never(request)
        return Done()

    def _make_bus(self, name: str, address: str) -> BusState:
        return BusState(name, address, NameLedger(self._folder), ABSENT_NAME)

    def _add(self, spec: SandboxSpec, fds: list[int]) -> Work:
        if spec.id in self._sandboxes:
            raise CallRefusedError(errors.FAILED, f"sandbox {spec.id} already exists")
        for listener in spec.listeners:
            self._find_bus(listener.bus)
        wanted = [listener.fd for listener in spec.listeners]
        if spec.close_notify is not None:
            wanted.append(spec.close_notify)
        if sorted(wanted) != list(range(len(fds))):
            raise CallRefusedError(errors.INVALID_ARGS, "the descriptors do not match the sandbox")
        _check_kinds(spec, fds)
        if is_reserved(fds):
            raise _no_descriptors()
        sandbox = self._make_sandbox(spec)
        yield from sandbox.compile()
        self._bus_clients.claim(spec.id, spec.uid, spec.container_servers)
        self._channel.forget_end(spec.id)
        self._sandboxes[spec.id] = sandbox
        try:
            sandbox.open(fds)
        except OSError as exc:  # e.g. no room in the loop
            sandbox.stop("stopped")
            raise CallRefusedError(errors.FAILED, exc.strerror or "no room") from exc

    def _make_sandbox(self, spec: SandboxSpec) -> Sandbox:
        return Sandbox(self._loop, spec, self._buses, self._channel.emit, self._sandbox_changed)

    def _set_access(self, request: SetAccess) -> Work:
        yield from self._find_sandbox(request.sandbox).set_access(request.access)

    def _request_instance_field(self, serial: int, request: RequestInstanceField) -> None:
        bus = self._find_bus(request.bus)
        if request.wanted:
            self._instance_fields.wish(bus, request.unique_name, serial)
        else:
            self._instance_fields.take_back(bus, request.unique_name)
            self._channel.answer(serial, Done())

    def _find_sandbox(self, sandbox: str) -> Sandbox:
        found = self._sandboxes.get(sandbox)
        if found is None:
            raise CallRefusedError(errors.NOT_CONTAINER, f"no sandbox {sandbox[:40]!r}")
        return found

    def _find_bus(self, name: str) -> BusState:
        bus = self._buses.get(name)
        if bus is None:
            raise CallRefusedError(errors.INVALID_ARGS, f"no bus {name[:40]!r}")
        return bus

    def _sandbox_changed(self, sandbox: Sandbox) -> None:
        if sandbox.is_over:
            self._sandboxes.pop(sandbox.id, None)
        self._container_servers.follow(sandbox)
        if sandbox.is_over:
            for serial in sandbox.waiting_requests:
                self._channel.answer(serial, Done())
            sandbox.waiting_requests.clear()

    def _send_snapshot(self, serial: int, request: TakeSnapshot) -> None:
        buses = tuple(bus.spec() for bus in self._buses.values())
        head = Snapshot(protocol=PROTOCOL, pid=os.getpid(), buses=buses, sandboxes=())
        states = [sandbox.state() for sandbox in self._sandboxes.values()]
        most = MAX_PART_BYTES if request.in_parts else math.inf
        with self._channel.without_bound():
            for part in split_snapshot(head, states, most):
                self._channel.answer(serial, part)

    def _usage(self, sandbox: str | None) -> Usage:
        if sandbox is not None:
            return self._find_sandbox(sandbox).usage()
        return sum((one.usage() for one in self._sandboxes.values()), Usage())

    def _shut_down(self) -> None:
        for sandbox in list(self._sandboxes.values()):
            sandbox.stop("stopped")
            sandbox.abandon()
        self._bus_clients.close()
        self._loop.stop()

    # -- handing over ------------------------------------------------------------------------------

    def _hand_over(self, serial: int, request: HandOver, fds: list[int]) -> NoReturn:
        """Hand over to another gate, and exit. Raises CallRefusedError without any change."""
        if len(fds) != 1:
            raise CallRefusedError(errors.INVALID_ARGS, "HandOver takes one descriptor")
        self._bus_clients.settle()
        self._settle()
        channel = Channel(fds.pop(), request.seconds)
        try:
            dumps = [sandbox.dump for sandbox in self._sandboxes.values()]
            hand_over(channel, self.dumper(serial, request.protocol, os.getpid()), dumps)
        except HandoverError as exc:
            LOGGER.warning("hand-over: %s", exc)
            text = f"the new gate cannot take over: {exc}"
            raise CallRefusedError(errors.FAILED, text) from exc
        finally:
            channel.close()
        exit_now(self._service.replaced)

    def _settle(self) -> None:
        """Settle all state that is not handed over: chores of connections, id queries, barriers."""
        for sandbox in self._sandboxes.values():
            sandbox.settle()
        for query in list(self._id_queries.values()):
            query.end()
            self._id_query_ended(query)
        self._instance_fields.give_up("the gate is being replaced: try again")
        known = {rest for sandbox in self._sandboxes.values() for rest in sandbox.lingering}
        for bus in self._buses.values():
            for rest in [one for one in bus.lingering.values() if one not in known]:
                rest.close()  # The end of the sandbox has been reported.

    def dumper(self, serial: int, protocol: int, pid: int) -> Callable[[Fds], HandoverHeader]:
        """Return the function that makes the first frame of the hand-over for a request."""

        def dump(fds: Fds) -> HandoverHeader:
            return HandoverHeader(
                version=VERSION,
                pid=pid,
                serial=serial,
                protocol=protocol,
                channel=self._channel.dump(fds),
                buses=tuple(bus.dump() for bus in self._buses.values()),
                bus_clients=self._bus_clients.dump(fds),
                sandboxes=len(self._sandboxes),
            )

        return dump

    def load(self, header: HandoverHeader, fds: Sequence[int]) -> None:
        """Restore the state from `header`. The next calls are `add_empty` and `resume`."""
        self._channel.load(header.channel, fds)
        for one in header.buses:
            bus = self._buses[one.name] = self._make_bus(one.name, one.address)
            bus.load(one)
        self._bus_clients.load(header.bus_clients, self._buses, fds)

    def add_empty(self, dump: SandboxDump) -> Sandbox:
        """Add an empty sandbox with the id of `dump`, for the caller to load."""
        sandbox = self._sandboxes[dump.spec.id] = self._make_sandbox(dump.spec)
        return sandbox

    def resume(self, serial: int) -> None:
        """Continue after `load`. `serial` is that of the request to hand over."""
        self._channel.answer(serial, HandedOver(os.getpid()))
        for bus in self._buses.values():
            try:
                bus.resume()
            except OSError as exc:  # The connections continue as before.
                LOGGER.warning("ledger bus=%s: %s", bus.name, exc)
        for sandbox in list(self._sandboxes.values()):
            sandbox.resume()
        self._channel.serve_requests()


def _check_kinds(spec: SandboxSpec, fds: Sequence[int]) -> None:
    """Repeat the supervisor's check of the kinds of descriptors. Raises CallRefusedError.

    The gate would wait for ever for the EOF of a descriptor that never has an EOF.
    """
    for listener in spec.listeners:
        if not listens(fds[listener.fd]):
            raise CallRefusedError(errors.INVALID_ARGS, "Socket is not a listening socket")
    if spec.close_notify is not None and not ends_with_its_writers(fds[spec.close_notify]):
        raise CallRefusedError(errors.INVALID_ARGS, f"CloseNotify is not {READABLE_KIND}")


def _no_descriptors() -> CallRefusedError:
    return CallRefusedError(errors.LIMITS_EXCEEDED, "the gate has no file descriptors left")
