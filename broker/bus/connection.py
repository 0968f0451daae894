"""A connection to a bus, for trio code.

`open_bus` gives a Bus for as long as its block lasts. Calls to us come in at `Bus.calls`, each with its
descriptors, which whoever takes it must close (`with call:`). What a bus answers with an error
comes out of `Bus.call` as CallRefusedError; a bus that went away as BusLostError, from everything.
"""

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Self

import trio
import trio_asyncio
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message

from broker.bus.link import BusLostError, Link
from broker.bus.values import to_wire
from broker.wire.address import UnixAddress, parse_address
from broker.wire.errors import (
    FAILED,
    LIMITS_EXCEEDED,
    CallRefusedError,
    ConfigError,
    PeerProtocolError,
)
from broker.wire.header import Header, MessageType as WireType, serialise_header
from broker.wire.sasl import SaslClient

# Calls that wait to be taken. Beyond it they are refused, so that nobody can make us grow.
MAX_CALLS: Final = 1024
CONNECT_TIMEOUT: Final = 10.0  # seconds, from connect to the answer to Hello
# Seconds that the bus has at the end to take what was answered and told last.
CLOSE_TIMEOUT: Final = 0.5
# A message field that D-Bus does not define and this project uses: the sender's instance path.
INSTANCE_FIELD: Final = 10
_PROBE: Final = ("/org/buswarden/Probe", "org.buswarden.Probe", "Probe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whom a call is for."""

    destination: str
    path: str
    interface: str


DRIVER: Final = Target(
    destination="org.freedesktop.DBus",
    path="/org/freedesktop/DBus",
    interface="org.freedesktop.DBus",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """A signal that came in."""

    sender: str
    path: str
    interface: str
    member: str
    signature: str
    values: list[Any]


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """A method call that came in. It owns its descriptors: use it in a `with`."""

    sender: str
    path: str
    interface: str | None
    member: str
    signature: str
    values: list[Any]
    fds: list[int] = field(default_factory=list)
    message: Any  # what the reply is made from

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptors. Fine to call again."""
        while self.fds:
            os.close(self.fds.pop())


class Bus:
    """An open connection. Made by `open_bus`."""

    def __init__(self, address: str) -> None:
        self.address: Final = address
        self.unique_name = ""
        self.lost: Final = trio.Event()
        self.on_signal: Callable[[Signal], None] = _ignore
        sender, self.calls = trio.open_memory_channel[Call](MAX_CALLS)
        self._calls_in: Final = sender
        self._link: Link | None = None
        self._probed: trio.Event | None = None
        self._probe_had_field = False

    @property
    def backlog(self) -> int:
        """How many messages wait to be sent because the bus does not take them."""
        return self._link.backlog if self._link is not None else 0

    async def call(
        self,
        target: Target,
        member: str,
        signature: str = "",
        values: Sequence[object] = (),
        *,
        fds: Sequence[int] = (),
    ) -> list[Any]:
        """Return the values of the reply. Descriptors must stay open until then.

        Raises CallRefusedError, BusLostError; ValueError if the values do not have this signature.
        """
        link = self._open_link()
        message = _make_call(target, member, signature, values, fds)
        message.serial = link.next_serial()
        answered = trio.Event()
        reply: Any = None
        error: Any = None

        def take(its_reply: Message | None, its_error: Exception | None) -> None:
            nonlocal reply, error
            reply, error = its_reply, its_error
            answered.set()

        link._method_return_handlers[message.serial] = take  # noqa: SLF001
        try:
            link.send(message)
            await answered.wait()
        finally:
            link._method_return_handlers.pop(message.serial, None)  # noqa: SLF001
        return _read_reply(reply, error)

    def send(
        self, target: Target, member: str, signature: str = "", values: Sequence[object] = ()
    ) -> None:
        """Call without wanting a reply."""
        message = _make_call(target, member, signature, values, ())
        message.flags = MessageFlag.NO_REPLY_EXPECTED
        self._open_link().send(message)

    def emit(
        self, path: str, interface: str, member: str, signature: str, values: Sequence[object]
    ) -> None:
        """Broadcast a signal. Does nothing once the bus is lost."""
        if self._link is not None and not self.lost.is_set():
            body = to_wire(list(values))
            self._link.send(Message.new_signal(path, interface, member, signature, body))

    def answer(self, call: Call, signature: str = "", values: Sequence[object] = ()) -> None:
        """Answer a call, if it wants to be answered. Raises ValueError if the values do not fit."""
        if self._wants_reply(call):
            body = to_wire(list(values))
            self._open_link().send(Message.new_method_return(call.message, signature, body))

    def refuse(self, call: Call, name: str, text: str) -> None:
        """Answer a call with an error."""
        if self._wants_reply(call):
            self._open_link().send(Message.new_error(call.message, name, text))

    async def wait_sent(self) -> None:
        """Wait until the bus has taken all that it was sent, or is lost."""
        if self._link is not None and self.backlog:
            sent = trio.Event()
            self._link.on_sent = sent.set
            await sent.wait()

    async def request_name(self, name: str) -> bool:
        """Take a well-known name; say whether it is ours now. Never waits for it."""
        do_not_queue, primary_owner, already_owner = 4, 1, 4
        (result,) = await self.call(DRIVER, "RequestName", "su", [name, do_not_queue])
        return result in (primary_owner, already_owner)

    async def forwards_instance_field(self) -> bool:
        """Find out whether this bus passes header field 10 on: dbus-broker does, dbus-daemon strips it."""
        if self._probed is None:
            self._probed = trio.Event()
            self._send_probe()
        with trio.fail_after(CONNECT_TIMEOUT):
            await self._probed.wait()
        return self._probe_had_field

    def _open_link(self) -> Link:
        if self._link is None or self.lost.is_set():
            raise BusLostError(f"no connection to the bus at {self.address}")
        return self._link

    def _wants_reply(self, call: Call) -> bool:
        return not self.lost.is_set() and not call.message.flags & MessageFlag.NO_REPLY_EXPECTED

    def _send_probe(self) -> None:
        path, interface, member = _PROBE
        link = self._open_link()
        header = Header(
            little=True,
            type=WireType.SIGNAL,
            flags=0,
            body_length=0,
            serial=link.next_serial(),
            path=path,
            interface=interface,
            member=member,
            destination=self.unique_name,
        )
        link.put_raw(serialise_header(header, extra={INSTANCE_FIELD: ("o", "/")}))

    def _take(self, message: Message, header: Header) -> None:
        if message.message_type is MessageType.SIGNAL:
            _close(message.unix_fds)
            self._take_signal(message, header)
            return
        call = Call(
            sender=message.sender or "",
            path=message.path,
            interface=message.interface,
            member=message.member,
            signature=message.signature,
            values=message.body,
            fds=message.unix_fds,
            message=message,
        )
        try:
            self._calls_in.send_nowait(call)
        except (trio.WouldBlock, trio.BrokenResourceError):
            call.close()
            self.refuse(call, LIMITS_EXCEEDED, f"more than {MAX_CALLS} calls are waiting")

    def _take_signal(self, message: Message, header: Header) -> None:
        if message.sender == self.unique_name and message.interface == _PROBE[1]:
            self._probe_had_field = header.has_unknown
            if self._probed is not None:
                self._probed.set()
            return
        self.on_signal(
            Signal(
                sender=message.sender or "",
                path=message.path,
                interface=message.interface,
                member=message.member,
                signature=message.signature,
                values=message.body,
            )
        )

    async def _hello(self, sock: socket.socket) -> Link:
        # Before anything that may fail: the link closes the socket from here on.
        link = Link(sock, self._take)
        self._link = link
        link.on_lost = self.lost.set
        await trio_asyncio.aio_as_trio(link.connect)()
        name = str(link.unique_name)
        if not name.startswith(":"):
            raise ConfigError(f"the bus at {self.address} refused Hello: {name[:80]!r}")
        self.unique_name = name
        return link

    def _close(self) -> None:
        if self._link is not None:
            self._link.close()
        self._calls_in.close()
        with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
            while True:
                self.calls.receive_nowait().close()
        self.calls.close()


@asynccontextmanager
async def open_bus(address: str, *, runtime_dir: str | None = None) -> AsyncIterator[Bus]:
    """Connect, say Hello, and close at the end. Raises ConfigError if the bus is not there."""
    async with open_loop():
        sock = await _connect(address, runtime_dir)
        bus = Bus(address)
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                await bus._hello(sock)  # noqa: SLF001
        except (trio.TooSlowError, BusLostError) as exc:
            bus._close()  # noqa: SLF001
            raise ConfigError(f"the bus at {address} does not answer") from exc
        except BaseException:
            bus._close()  # noqa: SLF001
            raise
        try:
            yield bus
        finally:
            with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
                await bus.wait_sent()
            bus._close()  # noqa: SLF001


@asynccontextmanager
async def open_loop() -> AsyncIterator[None]:
    """Have the loop that connections run in, for all of them that are opened within."""
    if trio_asyncio.current_loop.get(None) is not None:
        yield
        return
    failure: Exception | None = None
    async with trio_asyncio.open_loop():
        try:
            yield
        except Exception as exc:  # noqa: BLE001 - carried past the loop's nurseries, which would wrap it
            failure = exc
    if failure is not None:
        raise failure


async def _connect(address: str, runtime_dir: str | None) -> socket.socket:
    """Return an authenticated socket. Raises ConfigError."""
    problem = "no address"
    for candidate in parse_address(address, runtime_dir=runtime_dir):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                await _shake_hands(sock, candidate)
        except (OSError, PeerProtocolError, trio.TooSlowError) as exc:
            sock.close()
            problem = getattr(exc, "strerror", None) or str(exc) or "it does not answer"
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise ConfigError(f"cannot connect to the bus at {address}: {problem}")


async def _shake_hands(sock: socket.socket, address: UnixAddress) -> None:
    # Only lent to trio, as it is dbus-next's afterwards: so trio's object must never be closed.
    stream = trio.socket.from_stdlib_socket(sock)
    await stream.connect(address.path)
    client = SaslClient(os.geteuid())
    waiting = client.start()
    while waiting:
        waiting = waiting[await stream.send(waiting) :]
    while not client.done:
        data = await stream.recv(4096)
        if not data:
            raise PeerProtocolError("it hung up during the handshake")
        client.feed(data)
    if not client.unix_fds:
        raise PeerProtocolError("it cannot pass descriptors")


def _make_call(
    target: Target, member: str, signature: str, values: Sequence[object], fds: Sequence[int]
) -> Message:
    return Message(
        destination=target.destination,
        path=target.path,
        interface=target.interface,
        member=member,
        signature=signature,
        body=to_wire(list(values)),
        unix_fds=list(fds),
    )


def _read_reply(reply: Any, error: Any) -> list[Any]:
    if error is not None:
        raise error
    if reply is None:
        raise BusLostError("the bus went away")
    if reply.message_type is MessageType.ERROR:
        text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else reply.error_name
        raise CallRefusedError(reply.error_name or FAILED, text)
    values: list[Any] = reply.body
    return values


def _ignore(_signal: Signal) -> None:
    pass


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
