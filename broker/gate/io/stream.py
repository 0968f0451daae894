"""A stream socket in the loop, with descriptors, and a queue for unsent messages.

A paused stream is still watched for hang-ups. epoll would report a hang-up in every turn until a
read. So the stream leaves the loop after a hang-up, and comes back with the next
`pause(reading=True)`:

    in the loop, reading  --pause-->  in the loop, not reading  --hang-up-->  away
            ^                                 |                                |
            +-----------resume----------------+------------resume--------------+
"""

import contextlib
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from broker.gate.dumps import ChunkDump, Fds, StreamDump, pick
from broker.gate.io.loop import BROKEN, READABLE, WRITABLE, Loop
from broker.gate.output import EMPTY_QUEUE, Chunk, Output
from broker.posix.descriptors import ANCILLARY_SIZE, Ancillary, close_fds, received_fds, rights
from broker.wire.errors import PeerProtocolError

READ_SIZE: Final = 65536
# After a full read. A larger read needs fewer system calls, and cuts fewer messages in two.
READ_SIZE_FOR_MUCH: Final = 262144
# Plain integers, because an operation on the socket module's enum members runs Python code for
# every message. MSG_DONTWAIT replaces O_NONBLOCK, which every process that holds the socket may
# clear.
DONTWAIT: Final = int(socket.MSG_DONTWAIT)
RECEIVE: Final = int(socket.MSG_CMSG_CLOEXEC) | DONTWAIT
TRUNCATED: Final = int(socket.MSG_CTRUNC)
# Parts of one sendmsg. The kernel accepts up to 1024 (UIO_MAXIOV).
MAX_PARTS: Final = 64


class StreamClosedError(Exception):
    """The other end has closed the connection."""


class SocketStream:
    """A non-blocking stream socket in the loop."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        readable: Callable[[], None],
        drained: Callable[[], None],
    ) -> None:
        self._loop: Final = loop
        self.sock: Final = sock
        self.fd: Final = sock.fileno()
        self.readable = readable  # replaced when the connection enters another state
        self._drained: Final = drained
        self._queue: deque[Chunk] = EMPTY_QUEUE
        self.queued = 0  # bytes that the other end has not taken
        self.queued_fds = 0
        # The queue has more than one message, or was not empty when the last message came.
        self.is_behind = False
        self.handler: Callable[[int], None] = self.on_event
        # The stream is read, and nothing waits that has to go before the next message
        # (fast_path.py).
        self.is_clear = False
        self._reading = True
        self._is_away = False  # out of the loop, because the other end hung up during a pause
        self._events: int = READABLE
        self._recvmsg = sock.recvmsg
        self._read_size = READ_SIZE
        self._send = sock.send
        loop.add(self.fd, READABLE, self.handler)

    def read(self) -> tuple[bytes, Sequence[int]]:
        """Read once, and return bytes and descriptors.

        Raises StreamClosedError, BlockingIOError and PeerProtocolError.
        """
        try:
            data, ancillary, flags, _ = self._recvmsg(self._read_size, ANCILLARY_SIZE, RECEIVE)
        except ConnectionError as exc:
            raise StreamClosedError from exc
        return self.received(data, ancillary, flags)

    def read_or_lose_fds(self) -> tuple[bytes, Sequence[int], bool]:
        """Read once, also if the process has no room for descriptors.

        Return bytes, descriptors, and whether descriptors were lost. Raises StreamClosedError,
        BlockingIOError and PeerProtocolError.
        """
        try:
            data, ancillary, flags, _ = self._recvmsg(self._read_size, ANCILLARY_SIZE, RECEIVE)
        except ConnectionError as exc:
            raise StreamClosedError from exc
        if not flags & TRUNCATED:
            return (*self.received(data, ancillary, flags), False)
        # A part of the descriptors of a message is of no use.
        close_fds(received_fds(ancillary) if ancillary else ())
        return data, (), True

    def received(
        self, data: bytes, ancillary: Sequence[Ancillary], flags: int
    ) -> tuple[bytes, Sequence[int]]:
        """Return the bytes and descriptors of a recvmsg.

        Raises StreamClosedError and PeerProtocolError.
        """
        self._read_size = READ_SIZE if len(data) < READ_SIZE else READ_SIZE_FOR_MUCH
        fds = received_fds(ancillary) if ancillary else ()
        if flags & TRUNCATED:
            close_fds(fds)
            raise PeerProtocolError("more file descriptors than fit")
        if not data:
            close_fds(fds)
            raise StreamClosedError
        return data, fds

    def write(self, output: Output) -> None:
        """Send all of `output`, which is then empty.

        Queue the bytes that the other end does not take.

        Raises StreamClosedError, except if the other end has hung up. In that case the last bytes
        of the other end are still to be read, and `read` raises the error afterwards.
        """
        if not self._queue and len(output) == 1 and output[0].__class__ is bytes:
            data = output[0]
            output.clear()
            try:
                sent = self._send(data, DONTWAIT)
            except BlockingIOError:
                sent = 0
            except ConnectionError:
                return
            except OSError as exc:
                raise StreamClosedError from exc
            if sent < len(data):
                self.queue(data[sent:])
            return
        was_waiting = bool(self._queue)
        for item in output:
            self._enqueue(item if isinstance(item, Chunk) else Chunk(item, ()))
        output.clear()
        # While the loop waits for room, another attempt to write is of no use.
        if not self._events & WRITABLE or self._is_away:
            self._flush()
        self.is_behind = len(self._queue) > 1 or (was_waiting and bool(self._queue))

    def set_handler(self, handler: Callable[[int], None]) -> None:
        """Set another handler in the loop, which leaves other events to `on_event`."""
        self.handler = handler
        if not self._is_away:
            self._loop.replace(self.fd, handler)

    def queue(self, data: bytes) -> None:
        """Queue the rest of a message whose beginning the caller has written."""
        self._enqueue(Chunk(data, ()))
        self._listen()

    def pause(self, *, reading: bool) -> None:
        """Stop or resume reading."""
        if reading is not self._reading:
            self._reading = reading
            self._listen()

    def dump(self, fds: Fds) -> StreamDump:
        """Return the socket and the queue, with descriptors as indexes."""
        return StreamDump(
            fd=fds.put(self.fd),
            queue=tuple(ChunkDump(bytes(c.data), fds.put_all(c.fds)) for c in self._queue),
            reading=self._reading,
        )

    def load(self, dump: StreamDump, fds: Sequence[int]) -> None:
        """Restore the queue and the pause from `dump`."""
        for one in dump.queue:
            self._enqueue(Chunk(one.data, pick(fds, one.fds)))
        self._reading = dump.reading
        self._listen()

    def drain(self, seconds: float) -> None:
        """Wait at most `seconds` until the queue is empty.

        The gate serves nothing else meanwhile.
        """
        deadline = time.monotonic() + seconds
        taking = select.poll()
        taking.register(self.fd, select.POLLOUT)
        with contextlib.suppress(StreamClosedError):
            while self._queue and (left := deadline - time.monotonic()) > 0:
                if taking.poll(left * 1000):
                    self._flush()

    def close(self) -> None:
        """Close the socket, and the descriptors in the queue."""
        self._loop.remove(self.fd)
        self.sock.close()
        self._drop_queue()

    def leave(self) -> None:
        """Leave the loop, and keep the descriptor open."""
        self._loop.remove(self.fd)
        self.sock.detach()

    def release(self) -> socket.socket:
        """Leave the loop, drop the queue, and return the socket, which the caller has to close."""
        self._loop.remove(self.fd)
        self._drop_queue()
        return self.sock

    def _drop_queue(self) -> None:
        for chunk in self._queue:
            close_fds(chunk.fds)
        self._queue = EMPTY_QUEUE
        self.queued = self.queued_fds = 0

    def on_event(self, events: int) -> None:
        """Read or write according to the events of the loop."""
        if events == READABLE:
            if self._reading:
                self.readable()
            return
        if events & WRITABLE and self._queue:
            try:
                self._flush()
            except StreamClosedError:
                events |= READABLE  # The read fails as well, and its caller ends the connection.
            else:
                if not self._queue:
                    self.is_behind = False
                    self._drained()
        if self._reading:
            if events & (READABLE | BROKEN):
                self.readable()
        elif events & BROKEN and not self._is_away:
            # epoll is level-triggered, and would report the hang-up in every turn.
            self._is_away = True
            self._loop.remove(self.fd)

    def _enqueue(self, chunk: Chunk) -> None:
        if self._queue is EMPTY_QUEUE:
            self._queue = deque()
        self._queue.append(chunk)
        self.queued += len(chunk.data)
        self.queued_fds += len(chunk.fds)

    def _listen(self) -> None:
        if self._is_away:
            if self._reading:
                self._is_away = False
                self._events = READABLE
                self._loop.add(self.fd, READABLE, self.handler)
            return
        wanted = (READABLE if self._reading else 0) | (WRITABLE if self._queue else 0)
        if wanted != self._events:
            self._events = wanted
            self._loop.change(self.fd, wanted)

    def _flush(self) -> None:
        """Send as much of the queue as the other end takes. Raises StreamClosedError."""
        while self._queue:
            try:
                sent = self._send_some()
            except BlockingIOError:
                break
            except ConnectionError:
                self._drop_queue()
                break
            except OSError as exc:
                raise StreamClosedError from exc
            self._took(sent)
        if not self._queue:
            self._queue = EMPTY_QUEUE
        self._listen()

    def _send_some(self) -> int:
        first = self._queue[0]
        if first.fds:
            # A separate write tells the receiver which message the descriptors belong to.
            sent = self.sock.sendmsg([first.data], rights(first.fds), DONTWAIT)
            close_fds(first.fds)
            self.queued_fds -= len(first.fds)
            self._queue[0] = Chunk(first.data, ())
            return sent
        parts: list[bytes | memoryview] = []
        for chunk in self._queue:
            if chunk.fds or len(parts) == MAX_PARTS:
                break
            parts.append(chunk.data)
        return self.sock.sendmsg(parts, (), DONTWAIT)

    def _took(self, sent: int) -> None:
        self.queued -= sent
        while sent:
            first = self._queue[0]
            if sent < len(first.data):
                # A view, because each partial write would copy the rest of a large message
                # otherwise.
                self._queue[0] = Chunk(memoryview(first.data)[sent:], first.fds)
                return
            sent -= len(first.data)
            self._queue.popleft()
