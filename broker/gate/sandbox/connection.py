"""A connection of an app with the bus side, from the handshakes to the end.

An error in handling an app's data closes that connection, and nothing else.
`ends_connection_on_error` decorates every method that the loop calls. The `Filter` is fed through a
`Meter`. The fast path passes on known messages without filter and meter.

    loop           AppConnection          Filter                streams
     | readable --> | _judge_app           |                     |
     |              | read() ------------------------------------> |
     |              | feed_app() --------> | judges, queues      |
     |              | _send() ----------------- to_bus, to_app --> |
     |              | charges the sandbox, pauses and resumes reading |

The owner of a connection is a `Sandbox`. This module knows the sandbox only as a Protocol.
"""

import functools
import logging
import socket
from collections.abc import Callable, Collection, Sequence
from typing import Concatenate, Final, ParamSpec, Protocol

from broker.control_protocol.messages import SandboxLimits, SandboxSpec, Usage
from broker.gate.dumps import AppConnectionDump, Fds, ReplyAction
from broker.gate.filter.bus_state import BusState
from broker.gate.filter.chores import SLICE, Work
from broker.gate.filter.filter import Filter
from broker.gate.filter.read_barrier import KIND
from broker.gate.io.connect import Connector
from broker.gate.io.loop import Loop, Timer
from broker.gate.io.stream import SocketStream, StreamClosedError
from broker.gate.output import descriptors_of
from broker.gate.sandbox.budgets import READ_COST, MessageBudget, RateLimitedLog, end_slowest_reader
from broker.gate.sandbox.fast_path import Accounting, install_fast_path
from broker.gate.sandbox.handshake import BusUnreachableError, Established, Handshake
from broker.gate.sandbox.mediator import Mediator
from broker.gate.sandbox.meter import BEHIND, Meter
from broker.posix.descriptors import Ancillary, close_fds
from broker.posix.sockets import stream_socket_from_fd
from broker.wire.errors import BrokerError, PeerProtocolError, PeerQuotaError
from broker.wire.header import Header
from broker.wire.sasl import SaslServer
from policy.match import Judge

LOGGER: Final = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")


class ConnectionOwner(Protocol):
    """The sandbox of a connection."""

    @property
    def id(self) -> str: ...

    @property
    def limits(self) -> SandboxLimits: ...

    @property
    def connector(self) -> Connector: ...

    @property
    def messages(self) -> MessageBudget: ...

    @property
    def limited_log(self) -> RateLimitedLog: ...

    @property
    def spec(self) -> SandboxSpec: ...

    @property
    def connections(self) -> Collection["AppConnection"]:
        """All connections of the sandbox."""

    @property
    def fds(self) -> int:
        """The number of descriptors of messages, over all connections."""

    def has_rules(self, bus: str) -> bool:
        """Return whether the rules for a bus are compiled."""

    def prepare(self) -> None:
        """Compile the rules, then call `resume` of each connection."""

    def judge(self, bus: str) -> Judge:
        """Return the compiled rules for a bus."""

    def make_filter(self, bus: BusState, *, app_takes_fds: bool) -> Mediator:
        """Return the mediator of a new connection."""

    def charge(self, cost: int, read_on: Callable[[], None], *, goes_first: bool = False) -> bool:
        """Charge messages. Return whether the app has to wait until `read_on` is called."""

    def linger(self, bus: BusState, unique_name: str, sock: socket.socket) -> None:
        """Keep the bus side of a connection whose app has gone.

        The sandbox owns the socket from here on.
        """

    def connection_closed(self, connection: "AppConnection") -> None:
        """Forget a connection."""


def ends_connection_on_error(
    method: Callable[Concatenate["AppConnection", Arguments], None],
) -> Callable[Concatenate["AppConnection", Arguments], None]:
    """Close the connection after any error in `method`, and log who is at fault."""

    @functools.wraps(method)
    def guarded(
        self: "AppConnection", /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> None:
        try:
            method(self, *args, **kwargs)
        except BlockingIOError:
            pass  # The loop reported an event, but there was nothing to read.
        except StreamClosedError:
            self.close("closed")
        except BusUnreachableError as exc:
            self.sandbox.limited_log.warning("bus-unreachable", self.bus.name)
            self.close(str(exc))
        except (PeerProtocolError, PeerQuotaError) as exc:
            self.sandbox.limited_log.warning("peer-violation", str(exc))
            self.close(str(exc))
        except (OSError, BrokerError) as exc:
            self.sandbox.limited_log.warning("peer-lost", str(exc))
            self.close(str(exc))
        except MemoryError:
            self.sandbox.limited_log.warning("peer-lost", "no memory for the received data")
            self.close("no memory")
        except Exception:  # noqa: BLE001 - a sandbox must not end the gate by a defect of the gate
            self.sandbox.limited_log.warning("peer-defect", traceback=True)
            self.close("defect")

    return guarded


class AppConnection:
    """An app's connection, from accept to the end."""

    def __init__(
        self, loop: Loop, sandbox: ConnectionOwner, bus: BusState, sock: socket.socket, guid: str
    ) -> None:
        self._loop: Final = loop
        self.sandbox: Final = sandbox
        self.bus: Final = bus
        # The handshake sets the handler. No work waits for the app to read.
        self._app: Final = SocketStream(loop, sock, _nothing, _nothing)
        self._guid: Final = guid
        self._handshake: Final = Handshake(
            loop,
            self._app,
            self,
            SaslServer(guid, takes_fds=bus.takes_fds),
            uid=sandbox.spec.uid,
            seconds=sandbox.limits.handshake_seconds,
        )
        self._bus_side: SocketStream | None = None  # once messages flow
        self._filter: Mediator | None = None
        self._closed = False
        self._new_judge: Judge | None = None
        self._resumes_soon = self._does_chores_soon = False  # in the next turn
        self._is_throttled = False
        self._was_unfinished = 0  # the number of the unfinished message at the last charge
        # The number of the unfinished message that has a deadline. Not every message is watched.
        self._watched = 0
        self._message_deadline: Timer | None = None

    @property
    def filter(self) -> Mediator | None:
        """The mediator between app and bus, or None during the handshake."""
        return self._filter

    def change_rules(self, judge: Judge) -> Work:
        """Judge by other rules from now on.

        The work ends as soon as the app has received the changes of visible names.
        """
        self._new_judge = judge
        self._apply()
        while self._filter is not None and self._filter.is_changing and not self._closed:
            yield SLICE  # The connection does the chores in separate turns.

    @ends_connection_on_error
    def _apply(self) -> None:
        if self._filter is not None and self._new_judge is not None:
            self._filter.change_rules(self._new_judge)
            self._send()

    @property
    def queued(self) -> int:
        """Bytes that wait for the app to read."""
        return self._app.queued

    @property
    def behind(self) -> int:
        """The number of waiting bytes if more than one message waits, or else 0."""
        return self._app.queued if self._app.is_behind else 0

    def close(self, reason: str) -> None:
        """Close both sides. A second call does nothing.

        The bus side lingers if the app has a unique name on the bus.
        """
        if self._closed:
            return
        self._closed = True
        LOGGER.debug("connection-closed sandbox=%s: %r", self.sandbox.id, reason)
        self._handshake.close()
        self._cancel_message_deadline()
        if self._filter is not None:
            self._filter_closed(self._filter)
        self._app.close()
        if self._bus_side is not None:
            if self._filter is not None and (unique_name := self._filter.state.unique_name):
                self.sandbox.linger(self.bus, unique_name, self._bus_side.release())
            else:  # The bus delivers no messages of an app without a unique name.
                self._bus_side.close()
        self.sandbox.connection_closed(self)

    def _filter_closed(self, closing: Mediator) -> None:
        state = closing.state
        self.sandbox.messages.take_more(closing.spent)  # the cost of the last messages
        close_fds(closing.close())
        close_fds(descriptors_of([*state.to_bus, *state.to_app]))
        self.bus.members.discard(state.verdicts)
        self.bus.connections.discard(self)

    @ends_connection_on_error
    def ask_if_read(self, number: int) -> None:
        """Ask the bus a question, whose answer shows that the bus has read all earlier messages."""
        if self._filter is not None and self._filter.state.unique_name:
            self._filter.state.call_driver("GetId", "", (), ReplyAction(KIND, (number,)))
            self._send()

    def _has_read(
        self, then: ReplyAction, _reply: Header, _data: bytes, _fds: tuple[int, ...]
    ) -> None:
        assert self._filter is not None
        self.bus.has_read(self._filter.state.unique_name, int(then.values[0]))

    def said_hello(self) -> None:
        """End the handshake, because the bus has answered Hello."""
        self._handshake.cancel_deadline()

    # -- the handshake -----------------------------------------------------------------------------

    def charge_read(self) -> bool:
        """Charge a read of the handshake. Return whether the app has to wait until `read_on`."""
        self._is_throttled = self.sandbox.charge(READ_COST, self.read_on)
        return self._is_throttled

    def app_authenticated(self) -> None:
        """Connect to the bus, unless the rules or the address are missing.

        In that case `resume` is called as soon as both are there.
        """
        spec = self.sandbox.spec
        if not self.sandbox.has_rules(self.bus.name):
            self.sandbox.prepare()
            return
        server = spec.container_servers.get(self.bus.name)
        if server is None or server.instance:
            address = self.bus.address if server is None else server.address
            self._handshake.connect(self.sandbox.connector, address)

    @ends_connection_on_error
    def established(self, both: Established) -> None:
        """Judge messages from now on."""
        self._bus_side = both.bus_side  # assigned first, so that an error closes the stream
        # A container server has another id than the bus.
        if self.bus.name not in self.sandbox.spec.container_servers:
            self.bus.authenticated(both.bus_id)
        judging = self._judge_with(both.bus_side, app_takes_fds=both.takes_fds)
        if both.from_bus:
            judging.feed_bus(both.from_bus)
        if both.from_app:
            self._meter.feed_app(both.from_app, ())
        self._send()

    def _judge_with(self, bus_side: SocketStream, *, app_takes_fds: bool) -> Mediator:
        """Put a mediator between both streams, of which `_bus_side` is one already."""
        judging = self._filter = self.sandbox.make_filter(self.bus, app_takes_fds=app_takes_fds)
        self.bus.members.add(judging.state.verdicts)
        self.bus.connections.add(self)
        self._app.readable = self._judge_app
        bus_side.readable = self._judge_bus
        self._meter = Meter(judging, budget := self.sandbox.messages)
        judging.state.reply_handlers[KIND] = self._has_read
        if isinstance(judging, Filter):
            install_fast_path(self, Accounting(judging, budget, self._meter), self._app, bus_side)
        return judging

    # -- messages -------------------------------------------------------------------------------------

    @ends_connection_on_error
    def _judge_app(self) -> None:
        self._app_sent(*self._app.read())

    @ends_connection_on_error
    def _judge_bus(self) -> None:
        assert self._bus_side is not None
        self._bus_sent(*self._bus_side.read())

    @ends_connection_on_error
    def app_sent(self, data: bytes, ancillary: Sequence[Ancillary], flags: int) -> None:
        """Judge bytes from the app, with the other results of recvmsg."""
        self._app_sent(*self._app.received(data, ancillary, flags))

    @ends_connection_on_error
    def bus_sent(self, data: bytes, ancillary: Sequence[Ancillary], flags: int) -> None:
        """Judge bytes from the bus, with the other results of recvmsg."""
        assert self._bus_side is not None
        self._bus_sent(*self._bus_side.received(data, ancillary, flags))

    def _app_sent(self, data: bytes, fds: Sequence[int]) -> None:
        self._meter.feed_app(data, fds)
        self._send()
        if fds:
            self._check_fds()

    def _bus_sent(self, data: bytes, fds: Sequence[int]) -> None:
        most = self.sandbox.limits.bytes_queued // BEHIND
        self._meter.feed_bus(data, fds, pays=self.behind > most)
        self._send()
        if fds:
            self._check_fds()

    @ends_connection_on_error
    def cut_short(self, stream: SocketStream, rest: bytes) -> None:
        """Send the rest of a message of which the other end took only a part."""
        stream.queue(rest)
        self._send()

    @ends_connection_on_error
    def failed(self, exc: Exception) -> None:
        """End the connection because of an error."""
        raise exc

    def _send(self) -> None:
        judging = self._filter
        bus_side = self._bus_side
        assert judging is not None
        assert bus_side is not None
        state = judging.state
        if state.to_app:
            self._app.write(state.to_app)
            if self._app.queued:
                end_slowest_reader(self, self.sandbox.connections, self.sandbox.limits.bytes_queued)
        if state.to_bus:
            bus_side.write(state.to_bus)
        if judging.spent:
            first = judging.from_app.unfinished == self._was_unfinished != 0
            self._is_throttled = self.sandbox.charge(judging.spent, self.read_on, goes_first=first)
            self._was_unfinished = judging.from_app.unfinished
            judging.spent = 0
        if judging.yielded:
            self._resume_reading_soon()
        if state.chores:
            self._do_chores_soon(bus_side)
        if judging.from_app.unfinished and not self._has_deadline:
            self._watch_message(judging.from_app.unfinished)
        reads = not (judging.held or bus_side.queued or self._is_throttled)
        self._app.pause(reading=reads)
        self._app.is_clear = reads and judging.from_app.is_idle
        bus_side.is_clear = not self._app.queued and judging.bus_is_clear

    def _check_fds(self) -> None:
        limit = self.sandbox.limits.fds
        if self.sandbox.fds > limit:
            raise PeerQuotaError(f"more than fds={limit} file descriptors in transit")

    @ends_connection_on_error
    def bus_drained(self) -> None:
        """Read the app again, after the bus has read all queued data."""
        if self._filter is not None:
            self._send()

    # -- budgets --------------------------------------------------------------------------------------

    def usage(self) -> Usage:
        """Return the connection's use of the sandbox's budgets."""
        judging = self._filter
        if judging is None:
            return Usage(connections=1, handshake_seconds=1)
        state = judging.state
        return Usage(
            connections=1,
            bytes_queued=self._app.queued,
            pending_calls=len(state.pending.calls_to_bus) + len(state.pending.calls_to_app),
            match_rules=state.matches.count,
            names=len(state.requested_names),
            tracked_names=judging.tracked_names,
            fds=self.fds,
            handshake_seconds=not state.unique_name,
            message_seconds=bool(judging.from_app.unfinished),
        )

    @property
    def fds(self) -> int:
        """The number of descriptors that came with messages and have not left."""
        count = self._app.queued_fds + (self._filter.fds if self._filter is not None else 0)
        return count + (self._bus_side.queued_fds if self._bus_side is not None else 0)

    @ends_connection_on_error
    def read_on(self) -> None:
        """Read the app again, because the sandbox's budget of messages has filled up."""
        self._is_throttled = False
        if self._filter is not None:
            self._send()
        else:
            self._handshake.read_on()

    def _resume_reading_soon(self) -> None:
        bus_side = self._bus_side
        assert bus_side is not None
        if not (self._resumes_soon or bus_side.queued or self._is_throttled):
            self._resumes_soon = True
            self._loop.next_turn(self._resume_reading)

    def _do_chores_soon(self, bus_side: SocketStream) -> None:
        if not self._does_chores_soon:
            self._does_chores_soon = True
            bus_side.pause(reading=False)
            self._loop.next_turn(self._do_chores)

    @ends_connection_on_error
    def _do_chores(self) -> None:
        """Do a slice of the chores, and read the bus again after the last slice."""
        self._does_chores_soon = False
        if self._filter is None or self._bus_side is None or self._closed:
            return
        self._filter.do_chores()
        if not self._filter.state.chores:
            self._bus_side.pause(reading=True)
        self._send()

    @ends_connection_on_error
    def settle(self) -> None:
        """Do all chores now, because the connection is about to be handed over."""
        if self._filter is None or self._bus_side is None:
            return
        while self._filter.state.chores:
            self._filter.do_chores()
            self._send()
        self._bus_side.pause(reading=True)

    @ends_connection_on_error
    def _resume_reading(self) -> None:
        self._resumes_soon = False
        if self._filter is not None and not self._closed:
            self._meter.resume_reading()
            self._send()

    def _watch_message(self, number: int) -> None:
        self._watched = number
        self._message_deadline = self._loop.call_later(
            self.sandbox.limits.message_seconds, functools.partial(self._check_message, number)
        )

    def _check_message(self, number: int) -> None:
        """End the connection if the app has not sent the rest of a message in time.

        Time in which the gate did not read the app does not count.
        """
        self._message_deadline = None
        judging, bus_side = self._filter, self._bus_side
        assert judging is not None
        assert bus_side is not None
        paused = judging.held or bus_side.queued or self._is_throttled
        if judging.from_app.unfinished == number and not paused:
            seconds = self.sandbox.limits.message_seconds
            text = f"a message unfinished for message_seconds={seconds}"
            self.sandbox.limited_log.warning("peer-violation", text)
            self.close(text)
        elif judging.from_app.unfinished:
            self._watch_message(judging.from_app.unfinished)

    @property
    def _has_deadline(self) -> bool:
        return self._message_deadline is not None or self._handshake.deadline is not None

    def _cancel_message_deadline(self) -> None:
        if self._message_deadline is not None:
            self._message_deadline.cancel()
            self._message_deadline = None

    # -- handing over -----------------------------------------------------------------------------------

    def dump(self, fds: Fds) -> AppConnectionDump:
        """Return the state, with descriptors as indexes."""
        handshake, watch = self._handshake, self._message_deadline
        app_side = self._app.dump(fds)
        bus_side = handshake.dump_bus_side(fds)
        if self._bus_side is not None:
            bus_side = self._bus_side.dump(fds)
        return AppConnectionDump(
            bus=self.bus.name,
            guid=self._guid,
            app_side=app_side,
            said=handshake.app_said,
            bus_side=bus_side,
            bus_said=handshake.bus_said,
            filter=self._filter.dump(fds) if self._filter is not None else None,
            deadline=watch.when if watch is not None else handshake.deadline,
            watched=self._watched,
            was_unfinished=self._was_unfinished,
            is_throttled=self._is_throttled,
        )

    def load(self, dump: AppConnectionDump, fds: Sequence[int]) -> None:
        """Restore the state from `dump`. `resume` continues."""
        self._app.load(dump.app_side, fds)
        self._was_unfinished, self._is_throttled = dump.was_unfinished, dump.is_throttled
        self._load_deadline(dump)
        if dump.filter is None or dump.bus_side is None:
            if dump.bus_side is not None:
                self.sandbox.judge(self.bus.name)  # The end of the handshake needs compiled rules.
            self._handshake.load(dump.said, dump.bus_side, dump.bus_said, fds)
            return
        sock = stream_socket_from_fd(fds[dump.bus_side.fd])
        bus_side = self._bus_side = SocketStream(self._loop, sock, _nothing, self.bus_drained)
        bus_side.load(dump.bus_side, fds)
        judging = self._judge_with(bus_side, app_takes_fds=dump.filter.app_takes_fds)
        judging.load(dump.filter, fds)
        if unique_name := judging.state.unique_name:
            self.bus.set_broadcast_judge(unique_name, judging.state.judge)
            self.bus.payers.joined(unique_name, self.sandbox.messages)

    def _load_deadline(self, dump: AppConnectionDump) -> None:
        self._watched = dump.watched
        self._handshake.load_deadline(None if dump.watched else dump.deadline)
        if dump.watched and dump.deadline is not None:
            check = functools.partial(self._check_message, dump.watched)
            self._message_deadline = self._loop.call_at(dump.deadline, check)

    def discard(self) -> None:
        """Leave the loop and the bus, and close nothing. No method is called any more."""
        self._closed = True
        self._handshake.leave()
        self._cancel_message_deadline()
        self._app.leave()
        if self._bus_side is not None:
            self._bus_side.leave()
        self.bus.connections.discard(self)
        if self._filter is not None:
            self.bus.members.discard(self._filter.state.verdicts)
            self.bus.broadcast_judges.pop(self._filter.state.unique_name, None)

    @ends_connection_on_error
    def resume(self) -> None:
        """Continue after `load`, or after `app_authenticated` had to wait."""
        judging = self._filter
        if judging is not None:
            if not judging.fits_rules:
                judging.change_rules(judging.state.judge)
            self._send()
        elif self._handshake.waits_for_connect:
            self.app_authenticated()


def _nothing() -> None:
    pass
