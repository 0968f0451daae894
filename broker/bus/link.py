"""dbus-next's MessageBus, made to stand a bus with hostile peers on it. Only broker.bus.connection uses it.

Of dbus-next 0.2.3 its calls, replies, handlers and messages are kept. Replaced is what would let somebody
else on the bus, or a busy moment, end the connection:
- its reader ends it for a header field or message type that it does not know (dbus-broker forwards both),
  and takes a descriptor for whatever message comes next;
- its writer ends it when the socket's buffer is full;
- its handshake spins for ever when the bus hangs up, and its connect blocks.
So the socket comes here authenticated. Values are those of broker.bus.values.
"""

import array
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.message_bus import BaseMessageBus

from broker.bus.values import unpack
from broker.wire.errors import INVALID_ARGS, LIMITS_EXCEEDED, BrokerError, PeerProtocolError
from broker.wire.header import FIXED_SIZE, Header, measure, parse_header

LOGGER: Final = logging.getLogger(__name__)
_CHUNK: Final = 64 * 1024
# What anybody may want of us is far shorter (10 000 rules are 2 MiB), and Python takes up to thirty times as
# much for the values: a longer body is not looked at.
MAX_BODY: Final = 8 * 1024 * 1024
_INT: Final = array.array("i").itemsize
_ANCILLARY: Final = socket.CMSG_SPACE(253 * _INT)  # as many as the kernel lets through at once
_FIELDS: Final = (
    "path",
    "interface",
    "member",
    "error_name",
    "reply_serial",
    "destination",
    "sender",
)


class BusLostError(BrokerError):
    """The connection to a bus is gone."""


class Link(MessageBus):
    """One connection. `on_message` gets every call and signal, and owns the descriptors in it."""

    def __init__(self, sock: socket.socket, on_message: Callable[[Message, Header], None]) -> None:
        self._given: Final = sock
        self._on_each: Final = on_message
        super().__init__(bus_address="unix:path=/", negotiate_unix_fd=True)
        self._out: Final = _Writer(self)
        self._writer: Any = self._out
        self._input = bytearray()
        self._input_fds: deque[int] = deque()
        self.on_lost: Callable[[], None] = lambda: None
        self.on_sent: Callable[[], None] = lambda: None  # nothing waits to be sent any more

    def _setup_socket(self) -> None:
        self._sock = self._given
        self._sock.setblocking(False)
        self._stream: Any = self._sock.makefile("wb")  # connect() writes Hello to it
        self._fd = self._sock.fileno()

    async def _authenticate(self) -> None:
        """Nothing is left to do."""

    def next_serial(self) -> int:
        serial: int = self._serial % 0xFFFFFFFF + 1
        self._serial = serial
        return serial

    def close(self) -> None:
        """Close everything. Calls that wait fail."""
        self._finalize(BusLostError("closed"))
        self._stream.detach()  # closing it would flush
        self._sock.close()
        _close_all(self._input_fds)

    def put_raw(self, data: bytes) -> None:
        """Send a message that dbus-next cannot make."""
        self._out.put(data, [])

    @property
    def backlog(self) -> int:
        """How many messages wait to be sent."""
        return self._out.backlog

    # -- reading ----------------------------------------------------------------------------------

    def _message_reader(self) -> None:
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                _CHUNK, _ANCILLARY, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._finalize(exc)
            return
        self._input += data
        self._input_fds.extend(_take_fds(ancillary))
        try:
            if not data or flags & socket.MSG_CTRUNC:
                raise BusLostError("the bus hung up" if not data else "descriptors were cut off")
            self._cut()
        except (BusLostError, PeerProtocolError) as exc:
            self._finalize(exc)

    def _cut(self) -> None:
        buffer = self._input
        while len(buffer) >= FIXED_SIZE and len(buffer) >= (length := measure(buffer)):
            raw = bytes(buffer[:length])
            del buffer[:length]
            header = parse_header(raw)
            if header.unix_fds > len(self._input_fds):
                raise PeerProtocolError("a message without its descriptors")
            fds = [self._input_fds.popleft() for _ in range(header.unix_fds)]
            self._take(header, raw[header.size :], fds)

    def _take(self, header: Header, body: bytes, fds: list[int]) -> None:
        try:
            message = _make_message(header, body, fds)
        except ValueError as exc:
            LOGGER.debug("a message from %s cannot be read: %s", header.sender, exc)
            _close_all(fds)
            self._refuse(header, str(exc))
            return
        if message is None:
            _close_all(fds)
        elif message.message_type in (MessageType.METHOD_CALL, MessageType.SIGNAL):
            self._on_each(message, header)
        else:
            _close_all(fds)  # nothing that we ask for has any
            self._on_message(message)

    def _refuse(self, header: Header, text: str) -> None:
        if header.type == MessageType.METHOD_CALL.value:
            call = _make_message(header, b"", [])
            if call is not None and not header.flags & MessageFlag.NO_REPLY_EXPECTED:
                self.send(Message.new_error(call, INVALID_ARGS, text))
        elif header.reply_serial in self._method_return_handlers:
            self._method_return_handlers.pop(header.reply_serial)(None, PeerProtocolError(text))

    def _finalize(self, err: BaseException | None = None) -> None:
        if self._disconnected:
            return
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._out.clear()
        # Not our superclass's, which keeps the error in a future that nobody awaits.
        BaseMessageBus._finalize(self, BusLostError(str(err)))  # noqa: SLF001
        self.on_lost()


class _Writer:
    """What waits to be sent. Descriptors are the sender's: it keeps them open until it has a reply."""

    def __init__(self, link: Any) -> None:
        self._link = link
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._waiting = False

    @property
    def backlog(self) -> int:
        return len(self._queue)

    def clear(self) -> None:
        self._queue.clear()
        self._link.on_sent()

    def schedule_write(self, msg: Message | None = None, future: Any = None) -> None:
        """Send it when the connection is ready; the name and form are dbus-next's."""
        if msg is not None:
            self._queue.append((_marshal(msg), list(msg.unix_fds or ())))
        if future is not None:
            future.set_result(None)
        if self._link.unique_name and not self._waiting:
            self._flush()

    def put(self, data: bytes, fds: list[int]) -> None:
        self._queue.append((data, fds))
        self.schedule_write()

    def _flush(self) -> None:
        link = self._link
        while self._queue:
            data, fds = self._queue[0]
            ancillary = (
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            )
            try:
                sent = link._sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)  # noqa: SLF001
            except (BlockingIOError, InterruptedError):
                break
            except OSError as exc:
                link._finalize(exc)  # noqa: SLF001
                return
            if sent == len(data):
                self._queue.popleft()
            else:
                self._queue[0] = (data[sent:], [])
        self._wait_or_not()

    def _wait_or_not(self) -> None:
        link = self._link
        if bool(self._queue) == self._waiting:
            return
        self._waiting = not self._waiting
        if self._waiting:
            link._loop.add_writer(link._fd, self._flush)  # noqa: SLF001
        else:
            link._loop.remove_writer(link._fd)  # noqa: SLF001
            link.on_sent()


def _marshal(message: Message) -> bytes:
    """Return its bytes, or those of an error if it is an answer that a bus might not take.

    What it does not take ends the connection: 128 MiB, or what it is configured to.
    """
    data = bytes(message._marshall(negotiate_unix_fd=True))  # noqa: SLF001
    if len(data) <= MAX_BODY or message.message_type is not MessageType.METHOD_RETURN:
        return data
    error = Message(
        message_type=MessageType.ERROR,
        destination=message.destination,
        error_name=LIMITS_EXCEEDED,
        reply_serial=message.reply_serial,
        serial=message.serial,
        signature="s",
        body=[f"the answer would have more than {MAX_BODY} bytes"],
    )
    return bytes(error._marshall(negotiate_unix_fd=True))  # noqa: SLF001


def _make_message(header: Header, body: bytes, fds: list[int]) -> Message | None:
    """Return dbus-next's form of it, or None for a type that is to be ignored. Raises ValueError."""
    try:
        kind = MessageType(header.type)
    except ValueError:
        return None
    fields: dict[str, Any] = {name: getattr(header, name) for name in _FIELDS}
    if len(body) > MAX_BODY:
        raise ValueError(f"a body of more than {MAX_BODY} bytes")
    values = unpack(header.signature, body, little=header.little) if body else []
    try:
        return Message(
            message_type=kind,
            flags=MessageFlag(header.flags & 7),
            serial=header.serial,
            unix_fds=fds,
            signature=header.signature if body else "",
            body=values,
            **fields,
        )
    except Exception as exc:
        raise ValueError(f"a message that cannot be read: {exc}") from exc


def _take_fds(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _INT])
    return fds.tolist()


def _close_all(fds: Any) -> None:
    for fd in fds:
        os.close(fd)
    fds.clear()
