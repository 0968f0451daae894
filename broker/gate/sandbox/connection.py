"""One connection of an app, with its connection to the bus: handshakes, then `Filter` in between.

Whatever one app's bytes do ends this link at the worst: see contain.py. `dump` and `load` are for another process
that is to go on with it.
"""

import contextlib
import functools
import logging
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from broker.control_protocol.messages import Usage
from broker.gate.dumps import AppConnectionDump, Fds, ReplyAction
from broker.gate.filter.bus_state import BusState
from broker.gate.filter.chores import SLICE, Work
from broker.gate.filter.filter import Filter
from broker.gate.filter.read_barrier import KIND
from broker.gate.io.loop import Loop, Timer
from broker.gate.io.stream import SocketStream
from broker.gate.output import descriptors_of
from broker.gate.sandbox.budgets import READ_COST
from broker.gate.sandbox.error_boundaries import ends_connection_on_error
from broker.gate.sandbox.fast_path import Accounting, install_fast_path
from broker.gate.sandbox.mediator import Mediator
from broker.gate.sandbox.meter import BEHIND, Meter
from broker.gate.sandbox.usage import connection_usage, end_slowest_reader
from broker.posix.descriptors import Ancillary, close_fds
from broker.posix.sockets import stream_socket_from_fd
from broker.wire.errors import PeerProtocolError, PeerQuotaError
from broker.wire.header import Header
from broker.wire.sasl import AuthClient, SaslClient, SaslServer
from policy.match import Judge

if TYPE_CHECKING:
    from broker.gate.sandbox.sandbox import Sandbox

LOGGER: Final = logging.getLogger(__name__)


class AppConnection:
    """An app's connection, from accept to its end."""

    def __init__(
        self, loop: Loop, sandbox: "Sandbox", bus: BusState, sock: socket.socket, guid: str
    ) -> None:
        self._loop: Final = loop
        self.sandbox: Final = sandbox
        self.bus: Final = bus
        # Nothing waits for the app to read.
        self._app: Final = SocketStream(loop, sock, self._greet_app, lambda: None)
        self._guid: Final = guid
        self._server: Final = SaslServer(sandbox.spec.uid, guid, takes_fds=bus.takes_fds)
        # What was said in the handshakes, as long as they last.
        self._said = self._bus_said = b""
        self._bus_sock: socket.socket | None = None
        self._upstream: SocketStream | None = None
        self._client: AuthClient | None = None
        self._filter: Mediator | None = None
        self._closed = False
        self._new_judge: Judge | None = None
        self._resumes_soon = self._does_chores_soon = False  # in the next turn
        self._is_throttled = False
        self._was_unfinished = 0  # the message that was half here when it was last charged
        # First the handshake's; then, now and then, that of a message which is half here, by its number.
        self._watched = 0
        self._deadline: Timer | None = loop.call_later(
            sandbox.limits.handshake_seconds, self._too_slow
        )

    @property
    def filter(self) -> Mediator | None:
        """What judges it, once both handshakes are done."""
        return self._filter

    def change_rules(self, judge: Judge) -> Work:
        """Judge by other rules from now on, and be done when the app has been told what that takes."""
        self._new_judge = judge
        self._apply()
        while self._filter is not None and self._filter.is_changing and not self._closed:
            yield SLICE  # the link's own turns do it

    @ends_connection_on_error
    def _apply(self) -> None:
        if self._filter is not None and self._new_judge is not None:
            self._filter.change_rules(self._new_judge)
            self._send()

    @property
    def queued(self) -> int:
        """Bytes that the app has not taken yet."""
        return self._app.queued

    @property
    def behind(self) -> int:
        """The same, if they are of more than one message."""
        return self._app.queued if self._app.is_behind else 0

    def close(self, reason: str) -> None:
        """End both sides; the bus's lingers if the app had a name there. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        LOGGER.debug("link-closed sandbox=%s: %r", self.sandbox.id, reason)
        if self._deadline is not None:
            self._deadline.cancel()
        if self._filter is not None:
            self._filter_closed(self._filter)
        self._app.close()
        if self._upstream is None:
            if self._bus_sock is not None:
                self._bus_sock.close()
        elif self._filter is not None and (unique_name := self._filter.state.unique_name):
            self.sandbox.linger(self.bus, unique_name, self._upstream.release())
        else:  # it cannot have sent anything that the bus would deliver
            self._upstream.close()
        self.sandbox.connection_closed(self)

    def _filter_closed(self, closing: Mediator) -> None:
        state = closing.state
        self.sandbox.messages.take_more(closing.spent)  # by what ended it
        close_fds(closing.close())
        close_fds(descriptors_of([*state.to_bus, *state.to_app]))
        self.bus.members.discard(state.verdicts)
        self.bus.connections.discard(self)

    @ends_connection_on_error
    def ask_if_read(self, number: int) -> None:
        """Ask the bus a question whose answer shows that it has read all before it."""
        if self._filter is not None and self._filter.state.unique_name:
            self._filter.state.call_driver("GetId", "", (), ReplyAction(KIND, (number,)))
            self._send()

    def _has_read(
        self, then: ReplyAction, _reply: Header, _data: bytes, _fds: tuple[int, ...]
    ) -> None:
        assert self._filter is not None
        self.bus.has_read(self._filter.state.unique_name, int(then.values[0]))

    def _too_slow(self) -> None:
        seconds = self.sandbox.limits.handshake_seconds
        self.sandbox.limited_log.warning(
            "peer-violation", f"no Hello in handshake_seconds={seconds}"
        )
        self.close("no Hello in time")

    def said_hello(self) -> None:
        """The handshake deadline is kept."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    # -- handshakes -----------------------------------------------------------------------------------

    @ends_connection_on_error
    def _greet_app(self) -> None:
        data, fds = self._app.read()
        if fds:
            close_fds(fds)
            raise PeerProtocolError("file descriptors during authentication")
        self._said += data
        answer = self._server.feed(data)
        if answer:
            self._app.write([answer])
        self._is_throttled = self.sandbox.charge(READ_COST, self.read_on)
        self._app.pause(reading=not (self._server.done or self._is_throttled))
        if self._server.done:
            self._connect()

    def _connect(self) -> None:
        spec = self.sandbox.spec
        if not self.sandbox.has_rules(self.bus.name):
            self.sandbox.prepare()  # and `resume` comes then
            return
        server = spec.container_servers.get(self.bus.name)
        if server is None or server.instance:  # else the bus is being asked for another
            address = self.bus.address if server is None else server.address
            self.sandbox.connector.connect(self._loop, address, spec.uid, self._connected)

    def _connected(self, sock: socket.socket | None) -> None:
        if self._closed or self._bus_sock is not None:
            if sock is not None:
                sock.close()
            return
        if sock is None:
            self.sandbox.limited_log.warning("bus-unreachable", self.bus.name)
            self.close("the bus cannot be reached")
            return
        self._bus_sock = sock
        self._greet()

    @ends_connection_on_error
    def _greet(self) -> None:
        assert self._bus_sock is not None
        self._upstream = SocketStream(
            self._loop, self._bus_sock, self._greet_bus, self._bus_drained
        )
        self._client = self.sandbox.connector.make_client(self._bus_sock, self.sandbox.spec.uid)
        self._upstream.write([self._client.start()])

    @ends_connection_on_error
    def _greet_bus(self) -> None:
        assert self._upstream is not None
        assert self._client is not None
        data, fds = self._upstream.read()
        close_fds(fds)
        self._bus_said += data
        if answer := self._client.feed(data):
            self._upstream.write([answer])
        if not self._client.done:
            return
        # What the bus does not take we cannot pass on.
        takes_fds = self._server.unix_fds and self._client.unix_fds
        if self.bus.name not in self.sandbox.spec.container_servers:  # whose guids are their own
            self.bus.authenticated(self._client.guid)
        judging = self._judge_with(self._upstream, app_takes_fds=takes_fds)
        self._said = self._bus_said = b""
        if self._client.leftover:
            judging.feed_bus(self._client.leftover)
        if self._server.leftover:
            self._meter.feed_app(self._server.leftover, ())
        self._send()

    def _judge_with(self, upstream: SocketStream, *, app_takes_fds: bool) -> Mediator:
        """Have messages judged from now on."""
        judging = self._filter = self.sandbox.make_filter(self.bus, app_takes_fds=app_takes_fds)
        self.bus.members.add(judging.state.verdicts)
        self.bus.connections.add(self)
        self._app.readable = self._judge_app
        upstream.readable = self._judge_bus
        self._meter = Meter(judging, budget := self.sandbox.messages)
        judging.state.reply_handlers[KIND] = self._has_read
        if isinstance(judging, Filter):
            install_fast_path(self, Accounting(judging, budget, self._meter), self._app, upstream)
        return judging

    # -- messages -------------------------------------------------------------------------------------

    @ends_connection_on_error
    def _judge_app(self) -> None:
        self._app_sent(*self._app.read())

    @ends_connection_on_error
    def _judge_bus(self) -> None:
        assert self._upstream is not None
        self._bus_sent(*self._upstream.read())

    @ends_connection_on_error
    def app_sent(self, data: bytes, ancillary: Sequence[Ancillary], flags: int) -> None:
        """Judge what was read from the app, as recvmsg gave it."""
        self._app_sent(*self._app.received(data, ancillary, flags))

    @ends_connection_on_error
    def bus_sent(self, data: bytes, ancillary: Sequence[Ancillary], flags: int) -> None:
        """Judge what was read from the bus, as recvmsg gave it."""
        assert self._upstream is not None
        self._bus_sent(*self._upstream.received(data, ancillary, flags))

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
    def cut_short(self, pipe: SocketStream, rest: bytes) -> None:
        """Go on after a message that the other end did not take whole."""
        pipe.queue(rest)
        self._send()

    @ends_connection_on_error
    def failed(self, exc: Exception) -> None:
        """End as the exception says."""
        raise exc

    def _send(self) -> None:
        judging = self._filter
        upstream = self._upstream
        assert judging is not None
        assert upstream is not None
        state = judging.state
        if state.to_app:
            self._app.write(state.to_app)
            if self._app.queued:
                end_slowest_reader(self, self.sandbox.connections, self.sandbox.limits.bytes_queued)
        if state.to_bus:
            upstream.write(state.to_bus)
        if judging.spent:
            first = judging.from_app.unfinished == self._was_unfinished != 0
            self._is_throttled = self.sandbox.charge(judging.spent, self.read_on, goes_first=first)
            self._was_unfinished = judging.from_app.unfinished
            judging.spent = 0
        if judging.yielded:
            self._resume_reading_soon()
        if state.chores:
            self._do_chores_soon(upstream)
        if judging.from_app.unfinished and self._deadline is None:
            self._watch_message(judging.from_app.unfinished)
        reads = not (judging.held or upstream.queued or self._is_throttled)
        self._app.pause(reading=reads)
        self._app.is_clear = reads and judging.from_app.is_idle
        upstream.is_clear = not self._app.queued and judging.bus_is_clear

    def _check_fds(self) -> None:
        limit = self.sandbox.limits.fds
        if self.sandbox.fds > limit:
            raise PeerQuotaError(f"more than fds={limit} file descriptors on their way")

    @ends_connection_on_error
    def _bus_drained(self) -> None:
        if self._filter is not None:
            self._send()

    # -- budgets --------------------------------------------------------------------------------------

    def usage(self) -> Usage:
        """Return what this connection takes of the sandbox's budgets."""
        return connection_usage(self._filter, queued=self._app.queued, fds=self.fds)

    @property
    def fds(self) -> int:
        """How many descriptors of messages are here."""
        count = self._app.queued_fds + (self._filter.fds if self._filter is not None else 0)
        return count + (self._upstream.queued_fds if self._upstream is not None else 0)

    @ends_connection_on_error
    def read_on(self) -> None:
        """The sandbox's budget of messages has filled up."""
        self._is_throttled = False
        if self._filter is not None:
            self._send()
        else:
            self._app.pause(reading=not self._server.done)

    def _resume_reading_soon(self) -> None:
        upstream = self._upstream
        assert upstream is not None
        if not (self._resumes_soon or upstream.queued or self._is_throttled):
            self._resumes_soon = True
            self._loop.next_turn(self._resume_reading)

    def _do_chores_soon(self, upstream: SocketStream) -> None:
        if not self._does_chores_soon:
            self._does_chores_soon = True
            upstream.pause(reading=False)
            self._loop.next_turn(self._do_chores)

    @ends_connection_on_error
    def _do_chores(self) -> None:
        """Do a slice of what takes long, and read on when all is done."""
        self._does_chores_soon = False
        if self._filter is None or self._upstream is None or self._closed:
            return
        self._filter.do_chores()
        if not self._filter.state.chores:
            self._upstream.pause(reading=True)
        self._send()

    @ends_connection_on_error
    def settle(self) -> None:
        """Do all that takes long now: the connection is about to be handed over."""
        if self._filter is None or self._upstream is None:
            return
        while self._filter.state.chores:
            self._filter.do_chores()
            self._send()
        self._upstream.pause(reading=True)

    @ends_connection_on_error
    def _resume_reading(self) -> None:
        self._resumes_soon = False
        if self._filter is not None and not self._closed:
            self._meter.resume_reading()
            self._send()

    def _watch_message(self, number: int) -> None:
        self._watched = number
        self._deadline = self._loop.call_later(
            self.sandbox.limits.message_seconds, functools.partial(self._check_message, number)
        )

    def _check_message(self, number: int) -> None:
        """End the connection if the message of that number is still half here, and not by our doing."""
        self._deadline = None
        judging, upstream = self._filter, self._upstream
        assert judging is not None
        assert upstream is not None
        paused = judging.held or upstream.queued or self._is_throttled
        if judging.from_app.unfinished == number and not paused:
            seconds = self.sandbox.limits.message_seconds
            text = f"a message half sent for message_seconds={seconds}"
            self.sandbox.limited_log.warning("peer-violation", text)
            self.close(text)
        elif judging.from_app.unfinished:
            self._watch_message(judging.from_app.unfinished)

    # -- handing over -----------------------------------------------------------------------------------

    def dump(self, fds: Fds) -> AppConnectionDump:
        """Return all of it, descriptors as indexes."""
        return AppConnectionDump(
            bus=self.bus.name,
            guid=self._guid,
            app_side=self._app.dump(fds),
            said=self._said,
            bus_side=self._upstream.dump(fds) if self._upstream is not None else None,
            bus_said=self._bus_said,
            filter=self._filter.dump(fds) if self._filter is not None else None,
            deadline=self._deadline.when if self._deadline is not None else None,
            watched=self._watched,
            was_unfinished=self._was_unfinished,
            is_throttled=self._is_throttled,
        )

    def load(self, dump: AppConnectionDump, fds: Sequence[int]) -> None:
        """Be as the one was that made the dump, but for going on: `resume` does that."""
        self._app.load(dump.app_side, fds)
        self._said, self._bus_said = dump.said, dump.bus_said
        self._was_unfinished, self._is_throttled = dump.was_unfinished, dump.is_throttled
        self._load_deadline(dump)
        if dump.bus_side is not None:
            sock = self._bus_sock = stream_socket_from_fd(fds[dump.bus_side.fd])
            self._upstream = SocketStream(self._loop, sock, self._greet_bus, self._bus_drained)
            self._upstream.load(dump.bus_side, fds)
            if dump.filter is not None:
                judging = self._judge_with(self._upstream, app_takes_fds=dump.filter.app_takes_fds)
                judging.load(dump.filter, fds)
                if unique_name := judging.state.unique_name:
                    self.bus.set_broadcast_judge(unique_name, judging.state.judge)
                    self.bus.payers.joined(unique_name, self.sandbox.messages)
                return
            self.sandbox.judge(self.bus.name)  # is needed in the middle of a read
            self._client = SaslClient(self.sandbox.spec.uid)
            self._client.feed(self._bus_said)
        with contextlib.suppress(PeerProtocolError):  # another gate took it: the next line ends it
            self._server.feed(self._said)

    def discard(self) -> None:
        """Leave the loop and the bus, and close nothing. No method is called any more."""
        self._closed = True
        if self._deadline is not None:
            self._deadline.cancel()
        self._app.leave()
        if self._upstream is not None:
            self._upstream.leave()
        elif self._bus_sock is not None:
            self._bus_sock.detach()
        self.bus.connections.discard(self)
        if self._filter is not None:
            self.bus.members.discard(self._filter.state.verdicts)
            self.bus.broadcast_judges.pop(self._filter.state.unique_name, None)

    def _load_deadline(self, dump: AppConnectionDump) -> None:
        assert self._deadline is not None
        self._deadline.cancel()
        self._deadline, self._watched = None, dump.watched
        if dump.deadline is not None:
            check = functools.partial(self._check_message, dump.watched)
            self._deadline = self._loop.call_at(
                dump.deadline, check if dump.watched else self._too_slow
            )

    @ends_connection_on_error
    def resume(self) -> None:
        """Go on where the one was that made the dump."""
        judging = self._filter
        if judging is not None:
            if not judging.fits_rules:
                judging.change_rules(judging.state.judge)
            self._send()
        elif self._server.done and self._upstream is None:
            self._connect()
