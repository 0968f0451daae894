"""dbus-next's MessageBus, hardened against hostile peers.

Only broker.bus.connection uses this module.

The code keeps the connecting and the reply handlers of dbus-next 0.2.3. The parts below are
replaced, because another program on the bus, or a busy moment, could end the connection or block
the supervisor:

- dbus-next's reader ends the connection for an unknown header field or message type, and
  dbus-broker forwards both. The reader takes a descriptor for whatever message comes next. The
  reader also unpacks each message before checking whether anyone wants the message.
- dbus-next's writer ends the connection when the socket's buffer is full.
- dbus-next's handshake loops for ever when the bus hangs up, and the connect blocks.
- dbus-next's codec reads and writes a body at once, however long that takes.

So the socket is already authenticated when passed to this class. Values are those of
broker.bus.values. No message that a bus may legally deliver ends the connection: unwanted messages
are skipped by their headers (broker.bus.message_intake).
"""

import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import trio
from dbus_next.aio.message_bus import MessageBus
from dbus_next.message_bus import BaseMessageBus

from broker.bus.codec import MAX_BODY
from broker.bus.message_intake import ArrivedMessage, Dropped, MessageIntake, Oversize
from broker.bus.values import unpack
from broker.posix.descriptors import ANCILLARY_SIZE, close_fds, received_fds, rights
from broker.wire.errors import LIMITS_EXCEEDED, BrokerError, PeerProtocolError
from broker.wire.header import Flag, Header, MessageType
from broker.wire.interfaces import DRIVER
from broker.wire.marshal import make_error

LOGGER: Final = logging.getLogger(__name__)
_CHUNK: Final = 64 * 1024
# Reads of skipped bytes in a turn. Other work must not wait behind 128 MiB of skipped bytes.
SKIPS_A_TURN: Final = 32
# Unsent bytes beyond which refusals are dropped, because callers can cause refusals faster than the
# bus reads.
MAX_UNSENT: Final = 4 * 1024 * 1024


class BusLostError(BrokerError):
    """The connection to a bus is gone."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to a call of this program."""

    header: Header
    values: list[Any]


class Taker(Protocol):
    """The receiver of a link's calls and signals."""

    def look(self, header: Header) -> bool:
        """Return whether to read a call or signal.

        A taker that returns False for a call answers the caller itself.
        """

    def take(self, header: Header, body: bytes, fds: list[int]) -> None:
        """Take a wanted message with its descriptors."""


@dataclass(slots=True)
class _Expected:
    """A reply that a caller waits for."""

    destination: str
    take: Callable[[Reply | None, Exception | None], None]


class PatchedMessageBus(MessageBus):
    """A dbus-next connection with this module's own reading and writing."""

    def __init__(self, sock: socket.socket, taker: Taker) -> None:
        self._given: Final = sock
        self._taker: Final = taker
        super().__init__(bus_address="unix:path=/", negotiate_unix_fd=True)
        self._out: Final = _Writer(self)
        self._writer: Any = self._out
        self._intake: Final = MessageIntake(self._look)
        self._expected: Final[dict[int, _Expected]] = {}
        self.on_lost: Callable[[], None] = lambda: None
        self.sent = trio.Event()  # set when nothing waits to be sent
        self.room = trio.Event()  # set when little waits to be sent
        self.room.set()

    def _setup_socket(self) -> None:
        self._sock = self._given
        self._sock.setblocking(False)
        self._stream: Any = self._sock.makefile("wb")  # connect() writes Hello to this stream
        self._fd = self._sock.fileno()

    async def _authenticate(self) -> None:
        """Do nothing, because the socket is already authenticated."""

    def next_serial(self) -> int:
        serial: int = self._serial % 0xFFFFFFFF + 1
        self._serial = serial
        return serial

    def close(self) -> None:
        """Close the connection. Waiting calls fail."""
        self._finalize(BusLostError("closed"))
        self._stream.detach()  # closing would flush the stream
        self._sock.close()
        close_fds(self._intake.close())

    def put_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message. The caller keeps the descriptors open until the message is sent."""
        self._out.put(data, list(fds))

    def expect(
        self, serial: int, destination: str, take: Callable[[Reply | None, Exception | None], None]
    ) -> None:
        """Pass the reply to a call to `take`, once, if `destination` sent the reply."""
        self._expected[serial] = _Expected(destination, take)

    def forget(self, serial: int) -> None:
        """Stop waiting for the reply to a call."""
        self._expected.pop(serial, None)

    def refuse(self, header: Header | Oversize, name: str, text: str) -> None:
        """Answer a call with an error, if the call wants an answer."""
        if header.sender and not header.flags & Flag.NO_REPLY_EXPECTED:
            self.put_error(header.sender, header.serial, name, text)

    def put_error(self, destination: str, reply_serial: int, name: str, text: str) -> None:
        """Send an error to a caller, unless too much waits to be sent."""
        if self.has_room:
            error = make_error(
                self.next_serial(),
                reply_serial=reply_serial,
                name=name,
                text=text.encode(errors="replace").decode().replace("\0", "?"),
                destination=destination,
            )
            self.put_raw(error)

    @property
    def backlog(self) -> int:
        """Return the number of messages that wait to be sent."""
        return self._out.backlog

    @property
    def has_room(self) -> bool:
        """Return whether the send queue has room."""
        return self.room.is_set()

    # -- reading -----------------------------------------------------------------------------------

    def _message_reader(self) -> None:
        for _ in range(SKIPS_A_TURN):
            if not self._read() or self._disconnected or not self._intake.is_skipping:
                return

    def _read(self) -> bool:
        """Read once and handle the bytes; return whether there were any bytes."""
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                _CHUNK, ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as exc:
            self._finalize(exc)
            return False
        fds = received_fds(ancillary)
        if not data:
            close_fds(fds)
            self._finalize(BusLostError("the bus hung up"))
            return False
        try:
            for item in self._intake.feed(data, fds, cut=bool(flags & socket.MSG_CTRUNC)):
                self._take(item)
        except PeerProtocolError as exc:
            self._finalize(exc)
        return True

    def _look(self, header: Header) -> bool:
        if header.type in (MessageType.METHOD_CALL, MessageType.SIGNAL):
            return self._taker.look(header)
        expected = self._expected.get(header.reply_serial or 0)
        if expected is None or not _may_answer(expected.destination, header.sender):
            # The handler of Hello belongs to dbus-next, and the answer to Hello is the first
            # message.
            is_hello = header.reply_serial in self._method_return_handlers
            return is_hello and header.sender in (None, DRIVER)
        if header.body_length > MAX_BODY:
            self._answered(header, None, f"a reply of more than {MAX_BODY} bytes")
            return False
        return True

    def _take(self, item: ArrivedMessage | Oversize | Dropped) -> None:
        match item:
            case ArrivedMessage(header, body, fds, cut):
                self._take_message(header, body, fds, cut=cut)
            case Oversize():
                if item.type == MessageType.METHOD_CALL:
                    self.refuse(item, LIMITS_EXCEEDED, "the header of the call is too long")
            case Dropped():
                close_fds(item.fds)

    def _take_message(self, header: Header, body: bytes, fds: list[int], *, cut: bool) -> None:
        if header.type not in (MessageType.METHOD_CALL, MessageType.SIGNAL):
            close_fds(fds)  # no expected reply has descriptors
            try:
                values = unpack(header.signature, body, little=header.little) if body else []
            except ValueError as exc:
                self._answered(header, None, str(exc))
            else:
                self._answered(header, values, "")
        elif cut:
            text = "lost the descriptors of a message of %s: raise the limit of open files"
            LOGGER.warning(text, header.sender)
            self.refuse(
                header, LIMITS_EXCEEDED, "the broker has no file descriptors left for this call"
            )
        else:
            self._taker.take(header, body, fds)

    def _answered(self, header: Header, values: list[Any] | None, problem: str) -> None:
        serial = header.reply_serial or 0
        reply = Reply(header, values) if values is not None else None
        error = PeerProtocolError(problem) if problem else None
        if (expected := self._expected.pop(serial, None)) is not None:
            expected.take(reply, error)
        elif (handler := self._method_return_handlers.pop(serial, None)) is not None:
            handler(_HelloReply(values or []), error)

    def _finalize(self, err: BaseException | None = None) -> None:
        if self._disconnected:
            return
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._out.clear()
        # The method of the direct superclass would keep the error in a future that is never
        # awaited.
        BaseMessageBus._finalize(self, BusLostError(str(err)))  # noqa: SLF001
        waiting = list(self._expected.values())
        self._expected.clear()
        for expected in waiting:
            expected.take(None, BusLostError(str(err)))
        self.on_lost()


@dataclass(frozen=True, slots=True)
class _HelloReply:
    """The part of a message that dbus-next's handler of Hello reads."""

    body: list[Any]


class _Writer:
    """The send queue. Senders keep their descriptors open until the reply."""

    def __init__(self, link: Any) -> None:
        self._link = link
        self._queue: deque[tuple[memoryview, list[int]]] = deque()
        self._waiting = False
        self.unsent = 0  # bytes

    @property
    def backlog(self) -> int:
        return len(self._queue)

    def clear(self) -> None:
        self._queue.clear()
        self.unsent = 0
        self._link.sent.set()
        self._link.room.set()

    def schedule_write(self, _msg: None = None, _future: None = None) -> None:
        """Send when the connection is ready. dbus-next prescribes the name and the arguments."""
        if self._link.unique_name and not self._waiting:
            self._flush()

    def put(self, data: bytes, fds: list[int]) -> None:
        # A memoryview is cut without a copy. Copying a long message's rest at each write would take
        # time in proportion to the square of the length.
        self._queue.append((memoryview(data), fds))
        self.unsent += len(data)
        self.schedule_write()
        if self.unsent > MAX_UNSENT and self._link.room.is_set():
            self._link.room = trio.Event()

    def _flush(self) -> None:
        link = self._link
        while self._queue:
            data, fds = self._queue[0]
            try:
                sent = link._sock.sendmsg([data], rights(fds), socket.MSG_NOSIGNAL)  # noqa: SLF001
            except (BlockingIOError, InterruptedError):
                break
            except OSError as exc:
                link._finalize(exc)  # noqa: SLF001
                return
            self.unsent -= sent
            if sent == len(data):
                self._queue.popleft()
            else:
                self._queue[0] = (data[sent:], [])
        if self.unsent <= MAX_UNSENT // 2:
            link.room.set()
        self._wait_or_not()

    def _wait_or_not(self) -> None:
        link = self._link
        if bool(self._queue) == self._waiting:
            return
        self._waiting = not self._waiting
        if self._waiting:
            link.sent = trio.Event()
            link._loop.add_writer(link._fd, self._flush)  # noqa: SLF001
        else:
            link._loop.remove_writer(link._fd)  # noqa: SLF001
            link.sent.set()


def _may_answer(destination: str, sender: str | None) -> bool:
    """Return whether a reply may come from the called connection.

    The check is needed because buses deliver forged replies.

    The owner of a well-known name is unknown here, so any sender may answer such a call. Only the
    command line calls a well-known name.
    """
    if sender in (None, DRIVER, destination):
        return True
    return destination != DRIVER and not destination.startswith(":")
