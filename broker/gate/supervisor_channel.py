"""The gate's end of the control socket: requests, answers and events.

There is a connection to one supervisor at a time.

Requests are passed to the gate one by one, in order. A request that takes longer than a turn of the
loop sets `is_busy`. Later requests then wait until the gate calls `serve_requests` again.

The gate outlives the supervisor. Events without a trace in a snapshot are numbered and kept
(event_journal.py). The next supervisor receives all unconfirmed events:

    supervisor 1      gate                          supervisor 2
     | <-- Ended, 7 -- |                             |
     | dies            |                             |
     |                 | keeps Ended, 8              |
     |                 | <------------- connects --- |
     |                 | -- Ended, 7 ; Ended, 8 ---> |
     |                 | <-- a request, number 8 --- |
     |                 | forgets both events         |
"""

import contextlib
import logging
import math
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from broker.control_protocol.framing import FrameReader, make_frame
from broker.control_protocol.messages import Answer, Envelope, Event
from broker.gate.dumps import Fds, SupervisorChannelDump, pick
from broker.gate.event_journal import EventJournal
from broker.gate.io.loop import READABLE, Loop
from broker.gate.io.stream import SocketStream, StreamClosedError
from broker.gate.output import Chunk
from broker.posix.descriptors import close_fds
from broker.posix.sockets import peer_uid, stream_socket_from_fd
from broker.wire.errors import PeerProtocolError

LOGGER: Final = logging.getLogger(__name__)
# Bytes. The gate never waits for a supervisor that does not read. Beyond the limit the connection
# is ended, and the supervisor may connect again.
MAX_UNREAD: Final = 64 * 1024 * 1024

OnRequest = Callable[[Envelope, list[int]], None]


class SupervisorChannel:
    """The control socket, the supervisor's connection, and the unconfirmed events."""

    def __init__(self, loop: Loop, on_request: OnRequest, on_lost: Callable[[], None]) -> None:
        """Make a channel that does not listen yet.

        `on_request` is called with each request and the descriptors of the request. `on_lost` is
        called after the end of a supervisor's connection.
        """
        self._loop: Final = loop
        self._on_request: Final = on_request
        self._on_lost: Final = on_lost
        self._journal = EventJournal()
        self._stream: SocketStream | None = None
        self._reader = FrameReader()
        self._requests: Final[deque[tuple[Envelope, list[int]]]] = deque()
        self.is_busy = False
        self._listening: socket.socket | None = None
        self._most_unread: float = MAX_UNREAD

    @property
    def connection(self) -> SocketStream | None:
        """The connection of the present supervisor."""
        return self._stream

    def serve(self, listening: socket.socket) -> None:
        """Accept supervisors of the gate's own uid or root.

        The channel owns the socket from here on.
        """
        listening.setblocking(False)
        self._listening = listening
        self._loop.add(listening.fileno(), READABLE, lambda _events: self._accept(listening))

    def drain(self, seconds: float) -> None:
        """Wait at most `seconds` until the supervisor has read all sent data.

        The gate serves nothing else meanwhile.
        """
        if self._stream is not None:
            self._stream.drain(seconds)

    def lose(self, reason: str) -> None:
        """End the connection, and drop the requests that wait."""
        LOGGER.info("supervisor-gone: %s", reason)
        while self._requests:
            close_fds(self._requests.popleft()[1])
        close_fds(self._reader.take_all_fds())
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            self._on_lost()

    # -- requests ----------------------------------------------------------------------------------

    def serve_requests(self) -> None:
        """Pass the waiting requests to the gate, until a request sets `is_busy`."""
        while self._requests and not self.is_busy:
            self._on_request(*self._requests.popleft())

    def confirm(self, number: int) -> None:
        """Forget the events up to `number`, which the supervisor has handled."""
        self._journal.confirm(number)

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
        if self._stream is not None:
            LOGGER.warning("control-refused: a supervisor is connected")
            sock.close()
            return
        sock.setblocking(False)
        self._reader = FrameReader()
        self._stream = self._make_stream(sock)
        self._bound_unread()
        for number, event in self._journal.replay():
            self._send(Envelope(serial=0, body=event, number=number))

    def _make_stream(self, sock: socket.socket) -> SocketStream:
        return SocketStream(self._loop, sock, self._readable, self._bound_unread)

    def _readable(self) -> None:
        stream = self._stream
        assert stream is not None
        try:
            data, fds, cut = stream.read_or_lose_fds()
            self._requests.extend(self._reader.feed(data, fds, cut=cut))
            self.serve_requests()
        except BlockingIOError:
            return
        except StreamClosedError:
            self.lose("closed")
        except PeerProtocolError as exc:
            self.lose(str(exc))

    # -- answers and events ------------------------------------------------------------------------

    def answer(self, serial: int, answer: Answer, fds: Sequence[int] = ()) -> None:
        """Answer the request with that serial. The channel owns the descriptors from here on."""
        self._send(Envelope(serial=serial, body=answer, fds=len(fds)), fds)

    def emit(self, event: Event) -> None:
        """Send an event. Keep the event if no snapshot has the same information."""
        number = self._journal.add(event, was_sent=self._stream is not None)
        self._send(Envelope(serial=0, body=event, number=number))

    def forget_end(self, sandbox: str) -> None:
        """Drop unconfirmed `Ended` events of an id that is being reused."""
        self._journal.forget_end(sandbox)

    @contextlib.contextmanager
    def without_bound(self) -> Iterator[None]:
        """Allow more than MAX_UNREAD, for an answer of any size that the supervisor requested."""
        self._most_unread = math.inf
        yield
        self._bound_unread()

    def _bound_unread(self) -> None:
        """Allow MAX_UNREAD in addition to the data that is queued now."""
        queued = self._stream.queued if self._stream is not None else 0
        self._most_unread = queued + MAX_UNREAD

    def _send(self, envelope: Envelope, fds: Sequence[int] = ()) -> None:
        stream = self._stream
        if stream is None:
            close_fds(fds)
            return
        frame = make_frame(envelope)
        try:
            stream.write([Chunk(frame, tuple(fds)) if fds else frame])
        except StreamClosedError:
            self.lose("closed")
            return
        if stream.queued > self._most_unread:
            self.lose("does not read")

    # -- handing over ------------------------------------------------------------------------------

    def dump(self, fds: Fds) -> SupervisorChannelDump:
        """Return the state, with descriptors as indexes."""
        rest, rest_fds = self._reader.rest()
        waiting = [make_frame(envelope) for envelope, _ in self._requests]
        waiting_fds = [fd for _, own in self._requests for fd in own]
        return SupervisorChannelDump(
            listening=fds.put(self._listening.fileno() if self._listening is not None else -1),
            stream=self._stream.dump(fds) if self._stream is not None else None,
            requests=b"".join([*waiting, rest]),
            request_fds=fds.put_all([*waiting_fds, *rest_fds]),
            journal=self._journal,
        )

    def load(self, dump: SupervisorChannelDump, fds: Sequence[int]) -> None:
        """Restore the state from `dump`.

        The next call is `serve_requests`, for waiting requests.
        """
        self.serve(stream_socket_from_fd(fds[dump.listening]))
        if dump.stream is not None:
            self._stream = self._make_stream(stream_socket_from_fd(fds[dump.stream.fd]))
            self._stream.load(dump.stream, fds)
            self._bound_unread()
        self._requests.extend(self._reader.feed(dump.requests, pick(fds, dump.request_fds)))
        self._journal = dump.journal
