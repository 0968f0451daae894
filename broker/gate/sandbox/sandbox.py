"""A sandbox in the gate: listening sockets, connections, rules, and the end.

    state       begins with                          ends with
    serving     `open`                               `stop_listening`, `stop`, or a lost socket
    draining    no listening socket any more         no open or lingering connection any more
    ending      `stop` closes all connections        no lingering connection, or LINGER_SECONDS
    over        `finish` emits `Ended`

The close-notification pipe ends a sandbox in any state. An error in handling a sandbox's own
descriptors stops that sandbox, and nothing else (`ends_sandbox_on_error`).
"""

import functools
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Concatenate, Final, ParamSpec

import msgspec

from broker.control_protocol.messages import (
    Connected,
    ContainerServer,
    Ended,
    Event,
    Gone,
    Listener,
    SandboxSpec,
    SandboxState,
    Usage,
)
from broker.gate.dumps import Fds, SandboxDump
from broker.gate.filter.bus_state import BusState
from broker.gate.filter.chores import Work
from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.denials import Denial
from broker.gate.filter.filter import Filter
from broker.gate.io.connect import Connector, UnixConnector
from broker.gate.io.listener import ListeningSocket
from broker.gate.io.loop import Loop
from broker.gate.io.slices import Sliced
from broker.gate.recorder import HeaderRecorder
from broker.gate.sandbox.budgets import (
    CONNECTION_COST,
    JUDGED_A_TURN,
    MessageBudget,
    RateLimitedLog,
)
from broker.gate.sandbox.compiled_rules import compile_rules
from broker.gate.sandbox.connection import AppConnection
from broker.gate.sandbox.denial_reports import DenialReports, is_news
from broker.gate.sandbox.lingering import LingeringConnection
from broker.gate.sandbox.mediator import Mediator
from broker.gate.sandbox.throttle import Throttle
from broker.posix.descriptors import close_fds
from broker.posix.sockets import peer_uid, stream_socket_from_fd
from broker.wire.errors import NOT_CONTAINER, CallRefusedError
from policy.match import Judge
from policy.rules import AccessList

# The server's guid in the handshake, for sockets without a guid from the creator. 32 hex digits.
GUID: Final = os.urandom(16).hex()
# The work of a change of rules for a connection, without the chores, in the units of
# `policy.match`.
CHANGE_WORK: Final = 4096
# Seconds that the end of a sandbox waits for the bus to close the connections. Messages that the
# bus delivers later come from an unknown sandbox.
LINGER_SECONDS: Final = 5.0
UNIX_CONNECTOR: Final = UnixConnector()

Arguments = ParamSpec("Arguments")


def ends_sandbox_on_error(
    method: Callable[Concatenate["Sandbox", Arguments], None],
) -> Callable[Concatenate["Sandbox", Arguments], None]:
    """Stop the sandbox after an error in `method`, which handles the creator's descriptors."""

    @functools.wraps(method)
    def guarded(self: "Sandbox", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception:  # noqa: BLE001 - a sandbox must not end the gate by a defect of the gate
            self.limited_log.warning("sandbox-defect", traceback=True)
            try:
                self.stop("stopped")
            except Exception:  # noqa: BLE001 - as above
                self.limited_log.warning("sandbox-defect", traceback=True)

    return guarded


class Sandbox:
    """An instance of an app, with sockets and connections."""

    def __init__(
        self,
        loop: Loop,
        spec: SandboxSpec,
        buses: dict[str, BusState],
        emit: Callable[[Event], None],
        changed: Callable[["Sandbox"], None],
        connector: Connector = UNIX_CONNECTOR,
    ) -> None:
        self._loop: Final = loop
        self.connector: Final = connector
        self.spec = spec
        self.id: Final = spec.id
        self.identity: Final = spec.identity
        self.limits: Final = spec.limits
        self.recorder: Final = HeaderRecorder(spec.id)
        self.bytes_held = 0
        self.messages: Final = MessageBudget(spec.limits.messages_per_second)
        self.limited_log: Final = RateLimitedLog(spec.id, spec.limits.log_lines_per_second)
        self._throttle: Final = Throttle(loop, self.messages, self.failed)
        self.denied_count = 0
        self.connections: Final[dict[AppConnection, None]] = {}  # an ordered set
        # Connections that the app has closed and the bus has not.
        self.lingering: Final[dict[LingeringConnection, None]] = {}
        self._buses: Final = buses
        self._emit: Final = emit
        # Called when a socket closes, when a connection joins or leaves, and at the end.
        self._changed: Final = changed
        self._judges: dict[str, Judge] = {}
        self._listening: Final[list[ListeningSocket]] = []
        self._close_pipe = -1
        self._reports: Final = DenialReports(loop, spec.id, emit)
        self._guid = GUID
        self._reason = ""  # of the end, once the end is decided
        # Serials of requests that wait for the end of the sandbox.
        self.waiting_requests: Final[list[int]] = []
        self.is_over = self._is_preparing = False
        # Connections that this gate could not take over, by bus and unique name.
        self.lost: Final[list[tuple[str, str]]] = []

    # -- life ------------------------------------------------------------------------------------

    def open(self, fds: Sequence[int]) -> None:
        """Serve the sockets of the spec. The sandbox owns the descriptors from here on."""
        for listener in self.spec.listeners:
            self._listen(fds[listener.fd], listener)
        if self.spec.close_notify is not None:
            self._watch_pipe(fds[self.spec.close_notify])

    def _listen(self, fd: int, listener: Listener) -> None:
        listening = ListeningSocket(self._loop, fd, listener, self)
        self._listening.append(listening)  # before `start`, so that an error closes the socket
        listening.start()

    def _watch_pipe(self, fd: int) -> None:
        self._close_pipe = fd
        # Only the hang-up is watched. Bytes have no meaning, and must not keep the gate busy.
        self._loop.add(fd, select.EPOLLRDHUP, self._close_notify)

    def descriptors(self) -> list[tuple[str, int]]:
        """Return (bus, descriptor) of each listening socket, and ("", descriptor) of the pipe."""
        found = [(listening.spec.bus, listening.fd) for listening in self._listening]
        return [*found, ("", self._close_pipe)] if self._close_pipe >= 0 else found

    def stop_listening(self) -> None:
        """Close the listening sockets. The sandbox ends with the last connection."""
        for listening in list(self._listening):
            self._close_listener(listening)
        self._end_if_done()

    def _close_listener(self, listening: ListeningSocket) -> None:
        self._listening.remove(listening)
        listening.close()

    def stop(self, reason: str) -> None:
        """Close all sockets and connections. The sandbox is over when the bus has closed too."""
        if self._reason:
            return
        self._reason = reason
        self._throttle.stop()
        for listening in list(self._listening):
            self._close_listener(listening)
        for connection in list(self.connections):
            connection.close(reason)
        if self._close_pipe >= 0:
            self._loop.remove(self._close_pipe)
            os.close(self._close_pipe)
            self._close_pipe = -1
        if self.lingering:
            self._loop.call_later(LINGER_SECONDS, self.finish)
            self._changed(self)
        else:
            self.finish()

    def abandon(self) -> None:
        """Finish after `stop` without waiting for the bus to release connections."""
        for rest in list(self.lingering):
            rest.close()
        self.finish()

    def finish(self) -> None:
        """Emit `Ended`, after `stop`. Connections may still linger. A second call does nothing."""
        if self.is_over:
            return
        self.is_over = True
        self._reports.flush()
        self.limited_log.flush()
        self._emit(Ended(self.id, self._reason))
        self._changed(self)

    @ends_sandbox_on_error
    def _close_notify(self, _events: int) -> None:
        self._loop.remove(self._close_pipe)  # because epoll would report the hang-up in every turn
        self.stop("close-notify")

    def _end_if_done(self) -> None:
        if self.is_over:
            return
        if self._reason:
            if not (self.connections or self.lingering):
                self.finish()
        elif not (self._listening or self.connections or self.lingering):
            self.stop("last-connection")
        else:
            self._changed(self)

    # -- rules -----------------------------------------------------------------------------------

    def judge(self, bus: str) -> Judge:
        """Return the compiled rules for a bus. Compile the rules now if necessary."""
        judge = self._judges.get(bus)
        if judge is None:
            judge = Judge(self.spec.access, bus=bus, me=self.identity)
            self._judges[bus] = judge
        return judge

    def compile(self) -> Work:
        """Compile the rules of the spec. Raises CallRefusedError."""
        self._judges = yield from compile_rules(self.spec, self.spec.access, is_new=True)

    def has_rules(self, bus: str) -> bool:
        """Return whether the rules for a bus are compiled. A hand-over has no compiled rules."""
        return bus in self._judges

    def prepare(self) -> None:
        """Compile the rules in slices, and then resume waiting connections."""
        if not self._is_preparing:
            self._is_preparing = True
            Sliced(self._loop, self._prepare(), self._prepared).begin(lambda: None)

    def _prepare(self) -> Work:
        access = self.spec.access
        judges = yield from compile_rules(self.spec, access, is_new=False)
        # Otherwise the rules have changed meanwhile, and the new rules are compiled.
        if self.spec.access is access:
            self._judges.update(judges)

    def _prepared(self, refused: CallRefusedError | None) -> None:
        self._is_preparing = False
        for connection in [one for one in self.connections if one.filter is None]:
            if refused is not None:
                self.limited_log.warning("rules", str(refused))
                connection.close("the rules of the sandbox cannot be compiled")
            else:
                connection.resume()

    def set_access(self, access: AccessList) -> Work:
        """Change the rules. Raises CallRefusedError without any change."""
        judges = yield from compile_rules(self.spec, access, is_new=True)
        if self.is_over:
            raise CallRefusedError(NOT_CONTAINER, f"{self.id} has ended")
        self.spec = msgspec.structs.replace(self.spec, access=access)
        self._judges = judges
        for connection in list(self.connections):
            judging = connection.filter
            if judging is not None and connection in self.connections:
                yield from connection.change_rules(self.judge(judging.state.bus.name))
                yield CHANGE_WORK

    def settle(self) -> None:
        """Do all chores of connections now, because a hand-over follows."""
        for connection in list(self.connections):
            connection.settle()

    def set_container_server(self, bus: str, server: ContainerServer | None) -> None:
        """Set the address of new connections to a bus, and resume connections that wait."""
        servers = {b: u for b, u in self.spec.container_servers.items() if b != bus}
        servers |= {bus: server} if server is not None else {}
        self.spec = msgspec.structs.replace(self.spec, container_servers=servers)
        for connection in [
            one for one in self.connections if one.filter is None and one.bus.name == bus
        ]:
            connection.resume()

    # -- connections -------------------------------------------------------------------------------

    @property
    def states(self) -> list[ConnectionState]:
        """The states of all connections whose handshakes are complete."""
        return [
            connection.filter.state
            for connection in self.connections
            if connection.filter is not None
        ]

    def has_connections(self, bus: str) -> bool:
        """Return whether there are connections to `bus`, including those in the handshake."""
        return any(connection.bus.name == bus for connection in self.connections)

    def is_connecting(self, bus: str) -> bool:
        """Return whether a connection to `bus` has no unique name yet."""
        filters = [each.filter for each in self.connections if each.bus.name == bus]
        return any(judging is None or not judging.state.unique_name for judging in filters)

    @property
    def is_listening(self) -> bool:
        """Return whether a socket of the sandbox listens."""
        return bool(self._listening)

    def may_accept(self) -> bool:
        """Return whether a connection may be accepted now.

        If lingering connections take the last places, the sockets pause until the bus closes such a
        connection.
        """
        most = self.limits.connections
        if not len(self.connections) < most <= len(self.connections) + len(self.lingering):
            return True
        self._pause_listening()
        return False

    def on_connection(self, listening: ListeningSocket, connection: socket.socket) -> None:
        """Take a connection, unless the user is wrong or the limit is reached."""
        try:
            self._take(connection, listening.spec)
        except (OSError, MemoryError) as exc:  # e.g. no room in the loop
            connection.close()
            self.limited_log.warning("accept", str(exc))
        if self.charge(CONNECTION_COST, self.resume_listening):
            self._pause_listening()

    def on_scarce(self, why: str) -> None:
        """Log that no connection can be accepted for a moment."""
        self.limited_log.warning("accept", why)

    def on_lost(self, listening: ListeningSocket, why: str) -> None:
        """Close a listening socket that cannot accept connections any more."""
        self.limited_log.warning("listener-lost", why)
        self._close_listener(listening)
        self._end_if_done()

    @ends_sandbox_on_error
    def failed(self, exc: Exception) -> None:
        """End the sandbox, and nothing else, after an error in a listening socket or a reader."""
        raise exc

    def _pause_listening(self) -> None:
        for listening in self._listening:
            listening.pause()

    def resume_listening(self) -> None:
        """Accept connections again."""
        for listening in self._listening:
            listening.resume()

    def _take(self, connection: socket.socket, listener: Listener) -> None:
        if (uid := peer_uid(connection)) != self.spec.uid:
            self.limited_log.warning("wrong-uid", f"uid={uid}")
            connection.close()
            return
        if len(self.connections) >= self.limits.connections:
            most = self.limits.connections
            self.limited_log.warning(
                "too-many-connections", f"max_connections_per_container={most}"
            )
            connection.close()
            return
        connection.setblocking(False)
        bus = self._buses[listener.bus]
        self.connections[
            AppConnection(self._loop, self, bus, connection, listener.guid or self._guid)
        ] = None

    def make_filter(self, bus: BusState, *, app_takes_fds: bool) -> Mediator:
        """Return the mediator of a new connection."""
        return Filter(
            bus,
            self,
            self.judge(bus.name),
            app_takes_fds=app_takes_fds,
            judged_a_turn=JUDGED_A_TURN,
            clock=time.monotonic,
        )

    def said_hello(self, state: ConnectionState) -> None:
        """Register the unique name of a connection, before the app receives the name."""
        state.bus.connected(state.unique_name, self.id, self.identity)
        state.bus.payers.joined(state.unique_name, self.messages)
        self._emit(Connected(self.id, state.bus.name, state.unique_name))
        for connection in self.connections:
            if connection.filter is not None and connection.filter.state is state:
                connection.said_hello()
        self._changed(self)

    def connection_closed(self, connection: AppConnection) -> None:
        """Forget a connection."""
        self.connections.pop(connection, None)
        self._throttle.forget(connection.read_on)
        state = connection.filter.state if connection.filter is not None else None
        if state is not None and state.unique_name:
            state.bus.payers.left(state.unique_name, self.id, list(state.requested_names))
        self._end_if_done()

    def linger(self, bus: BusState, unique_name: str, sock: socket.socket) -> None:
        """Keep the bus side of a connection whose app has gone, and own the socket."""
        rest = LingeringConnection(self._loop, bus.name, unique_name, sock, self._let_go)
        self.lingering[rest] = None
        bus.lingering[unique_name] = rest

    @ends_sandbox_on_error
    def _let_go(self, rest: LingeringConnection) -> None:
        del self.lingering[rest]
        bus = self._buses[rest.bus]
        bus.lingering.pop(rest.unique_name, None)
        bus.gone(rest.unique_name)
        self._emit(Gone(self.id, rest.bus, rest.unique_name))
        if self.resume_listening not in self._throttle.waiting:
            self.resume_listening()
        self._end_if_done()

    # -- budgets -----------------------------------------------------------------------------------

    def charge(self, cost: int, read_on: Callable[[], None], *, goes_first: bool = False) -> bool:
        """Charge messages. Return whether the sender has to wait until `read_on` is called."""
        return self._throttle.charge(cost, read_on, goes_first=goes_first)

    @property
    def fds(self) -> int:
        """The number of descriptors that came with messages and have not left."""
        return sum(connection.fds for connection in self.connections)

    def usage(self) -> Usage:
        """Return the use of each limit."""
        mine = Usage(
            bytes_held=self.bytes_held,
            rule_steps=max((judge.cost.steps for judge in self._judges.values()), default=0),
            messages_per_second=self.messages.used,
            log_lines_per_second=self.limited_log.used,
            throttled=self._throttle.count,
            suppressed=self.limited_log.suppressed_ever,
            caused=self.messages.caused,
            connections=len(self.lingering),
            lingering=len(self.lingering),
        )
        return sum((connection.usage() for connection in self.connections), mine)

    def close_fds(self, fds: Sequence[int]) -> None:
        """Close the descriptors of a refused message."""
        close_fds(fds)

    # -- reports -----------------------------------------------------------------------------------

    def denied(self, state: ConnectionState, denial: Denial) -> None:
        """Report a refusal, or only count the refusal if there are too many."""
        if not is_news(state, denial):
            return
        self.denied_count += 1
        self._reports.add(state.bus.name, denial)

    def state(self) -> SandboxState:
        """Return the state for a snapshot."""
        named = [(state.bus.name, state.unique_name) for state in self.states if state.unique_name]
        gone = [(rest.bus, rest.unique_name) for rest in self.lingering]
        return SandboxState(
            spec=self.spec,
            listening=bool(self._listening),
            connections=tuple(sorted([*named, *gone])),
            opening=len(self.connections) - len(named),
            denied=self.denied_count - self._reports.unreported,  # The others are reported later.
            usage=self.usage(),
        )

    # -- handing over ------------------------------------------------------------------------------

    def dump(self, fds: Fds) -> SandboxDump:
        """Return the state, with descriptors as indexes."""
        places = {connection.read_on: place for place, connection in enumerate(self.connections)}
        listeners = self.spec.listeners
        return SandboxDump(
            spec=self.spec,
            guid=self._guid,
            listening=tuple(
                (listeners.index(listening.spec), fds.put(listening.fd))
                for listening in self._listening
            ),
            close_pipe=fds.put(self._close_pipe) if self._close_pipe >= 0 else -1,
            connections=tuple(connection.dump(fds) for connection in self.connections),
            lingering=tuple(rest.dump(fds) for rest in self.lingering),
            reason=self._reason,
            waiting_requests=tuple(self.waiting_requests),
            messages=self.messages.dump(),
            limited_log=self.limited_log.dump(),
            is_throttled=self._throttle.is_throttled,
            throttled_count=self._throttle.count,
            waiting=tuple(places.get(read_on, -1) for read_on in self._throttle.waiting),
            denied_count=self.denied_count,
            reports_left=self._reports.left,
            unreported=self._reports.unreported,
        )

    def load(self, dump: SandboxDump, fds: Sequence[int], judges: dict[str, Judge]) -> None:
        """Restore the state from `dump`. The next call is `resume`.

        `judges` are compiled from the same rules, by bus.
        """
        self._judges = judges
        self._guid = dump.guid
        for place, at in dump.listening:
            self._listen(fds[at], self.spec.listeners[place])
        if dump.close_pipe >= 0:
            self._watch_pipe(fds[dump.close_pipe])
        for one in dump.connections:
            connection = AppConnection(
                self._loop,
                self,
                self._buses[one.bus],
                stream_socket_from_fd(fds[one.app_side.fd]),
                one.guid,
            )
            self.connections[connection] = None
            connection.load(one, fds)
        for rest in dump.lingering:
            self.linger(
                self._buses[rest.bus], rest.unique_name, stream_socket_from_fd(fds[rest.fd])
            )
        self._reason = dump.reason
        self.waiting_requests.extend(dump.waiting_requests)
        readers = [connection.read_on for connection in self.connections]
        self._throttle.load(
            [readers[place] if place >= 0 else self.resume_listening for place in dump.waiting],
            dump.throttled_count,
            is_throttled=dump.is_throttled,
        )
        self.messages.load(dump.messages)
        for bus in self._buses.values():
            bus.payers.adopt(self.id, self.messages)
        self.limited_log.load(dump.limited_log)
        self.denied_count = dump.denied_count
        self._reports.load(dump.reports_left, dump.unreported)

    def discard(self) -> None:
        """Leave the loop without closing anything, because the former gate has the originals."""
        self.is_over = True
        for listening in self._listening:
            listening.leave()
        self._loop.remove(self._close_pipe)
        for connection in self.connections:
            connection.discard()
        for rest in self.lingering:
            rest.leave()
            self._buses[rest.bus].lingering.pop(rest.unique_name, None)

    def resume(self) -> None:
        """Continue after `load`."""
        for bus, unique_name in self.lost:
            self.limited_log.warning(
                "connection-lost", f"{unique_name}: this gate could not take over the connection"
            )
            self._buses[bus].gone(unique_name)
            self._emit(Gone(self.id, bus, unique_name))
        self.lost.clear()
        self._end_if_done()
        if self.resume_listening in self._throttle.waiting:
            self._pause_listening()
        self._throttle.resume()
        for connection in list(self.connections):
            connection.resume()
        if self._reason:
            self._loop.call_later(LINGER_SECONDS, self.finish)
