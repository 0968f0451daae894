"""A connection to a bus, for trio code.

`open_bus` gives a BusConnection for the time of a block. `BusConnection.next_call` returns incoming
calls, in turns of the callers (broker.bus.callers). A call owns its descriptors, and the receiver
closes the descriptors (`with call:`). The body of a call is not read before `Call.unpack`.

`BusConnection.call` raises CallRefusedError for an error of the called service. Every method raises
BusLostError after the connection is lost, unless the method says otherwise.
"""

import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Self

import trio
import trio_asyncio

from broker.bus.callers import Callers
from broker.bus.codec import MAX_BODY, TooLongError
from broker.bus.message_bus import BusLostError, PatchedMessageBus, Reply
from broker.bus.values import Turn, pack, unpack, unpack_in_turns
from broker.posix.descriptors import close_fds
from broker.posix.reserve import is_reserved
from broker.wire.address import UnixAddress, parse_address
from broker.wire.errors import (
    FAILED,
    INVALID_ARGS,
    LIMITS_EXCEEDED,
    CallRefusedError,
    ConfigError,
    PeerProtocolError,
)
from broker.wire.header import Flag, Header, MessageType
from broker.wire.interfaces import DRIVER, DRIVER_PATH, INSTANCE_FIELD
from broker.wire.marshal import make_call, make_return, make_signal
from broker.wire.sasl import SaslClient

# Descriptors of a call: twice the number that AddServer understands.
MAX_CALL_FDS: Final = 8
# Bytes of three names, at most 255 bytes each.
MAX_OWNER_CHANGE: Final = 1024
CONNECT_TIMEOUT: Final = 10.0  # seconds, from connect to the answer to Hello
# Seconds that the bus has at the end to take the last answers and signals.
CLOSE_TIMEOUT: Final = 0.5
_PROBE: Final = ("/org/buswarden/Probe", "org.buswarden.Probe", "Probe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """The destination of a call."""

    destination: str
    path: str
    interface: str


BUS_DRIVER: Final = Destination(destination=DRIVER, path=DRIVER_PATH, interface=DRIVER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """A received signal."""

    sender: str
    path: str
    interface: str
    member: str
    signature: str
    values: list[Any]


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """A received method call. A call owns its descriptors and is used in a `with` block."""

    sender: str
    path: str
    interface: str | None
    member: str
    signature: str
    values: list[Any] = field(default_factory=list)  # after `unpack`
    fds: list[int] = field(default_factory=list)
    serial: int = 1
    wants_reply: bool = True
    body: bytes = b""
    little: bool = True
    size: int = 0  # of the body on arrival
    fd_count: int = 0  # on arrival
    turn: Turn = trio.lowlevel.checkpoint  # to be awaited between slices of long work

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptors. May be called more than once."""
        close_fds(self.fds)
        self.fds.clear()

    async def unpack(self) -> list[Any]:
        """Read the body in turns, and return the values. Raises CallRefusedError."""
        if self.body:
            try:
                self.values = await unpack_in_turns(
                    self.signature, self.body, self.turn, little=self.little
                )
            except TooLongError as exc:
                raise CallRefusedError(LIMITS_EXCEEDED, f"the arguments are {exc}") from exc
            except ValueError as exc:
                text = f"the arguments are not of type {self.signature[:40]!r}: {exc}"
                raise CallRefusedError(INVALID_ARGS, text) from exc
            self.body = b""
        return self.values


class BusConnection:
    """An open connection, made by `open_bus`."""

    def __init__(self, address: str) -> None:
        self.address: Final = address
        self.unique_name = ""
        self.lost: Final = trio.Event()
        # Signals that are not wanted are dropped unread. The header alone decides.
        self.on_signal: Callable[[Signal], None] = _ignore
        self.wants_signal: Callable[[Header], bool] = is_owner_change
        # Raises CallRefusedError for a call that is refused by the header, before the call is
        # stored.
        self.look_at_call: Callable[[Header], None] = _look_at_nothing
        self.calls: Final = Callers(self._ask_user)
        self._link: PatchedMessageBus | None = None
        self._probed: trio.Event | None = None
        self._probe_had_field = False

    @property
    def backlog(self) -> int:
        """Return the number of messages that wait because the bus does not read."""
        return self._link.backlog if self._link is not None else 0

    async def call(
        self,
        target: Destination,
        member: str,
        signature: str = "",
        values: Sequence[object] = (),
        *,
        fds: Sequence[int] = (),
    ) -> list[Any]:
        """Return the values of the reply. Descriptors must stay open until the reply.

        Raises CallRefusedError and BusLostError; ValueError if the values do not fit the signature.
        """
        link = self._open_link()
        serial = link.next_serial()
        data = _make_call(serial, target, member, pack(signature, values), signature, len(fds))
        answered = trio.Event()
        reply: Reply | None = None
        error: Exception | None = None

        def take(its_reply: Reply | None, its_error: Exception | None) -> None:
            nonlocal reply, error
            reply, error = its_reply, its_error
            answered.set()

        link.expect(serial, target.destination, take)
        try:
            link.put_raw(data, fds)
            await answered.wait()
        finally:
            link.forget(serial)
        return _read_reply(reply, error)

    def send(
        self, target: Destination, member: str, signature: str = "", values: Sequence[object] = ()
    ) -> None:
        """Send a call that wants no reply."""
        link = self._open_link()
        body = pack(signature, values)
        serial = link.next_serial()
        link.put_raw(
            _make_call(serial, target, member, body, signature, flags=Flag.NO_REPLY_EXPECTED)
        )

    def emit(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str,
        values: Sequence[object],
        *,
        destination: str | None = None,
    ) -> None:
        """Send a signal to a connection, or broadcast a signal.

        Does nothing once the bus is lost.
        """
        if self._link is None or self.lost.is_set():
            return
        body = pack(signature, values)
        self._link.put_raw(
            make_signal(
                self._link.next_serial(),
                path=path,
                interface=interface,
                member=member,
                destination=destination,
                signature=signature,
                body=body,
            )
        )

    def answer(self, call: Call, signature: str = "", values: Sequence[object] = ()) -> None:
        """Answer a call if the call wants an answer. Raises ValueError if the values do not fit."""
        self.answer_body(call, signature, pack(signature, values))

    def answer_body(self, call: Call, signature: str, body: bytes) -> None:
        """Answer a call with a packed body."""
        if not call.wants_reply or self.lost.is_set():
            return
        link = self._open_link()
        link.put_raw(
            make_return(
                link.next_serial(),
                reply_serial=call.serial,
                destination=call.sender,
                signature=signature,
                body=body,
            )
        )

    def refuse(self, call: Call, name: str, text: str) -> None:
        """Answer a call with an error, if the call wants an answer."""
        if call.wants_reply and not self.lost.is_set():
            self._open_link().put_error(call.sender, call.serial, name, text)

    async def next_call(self) -> Call | None:
        """Wait for the next call in turn; None after the last call.

        Pass the call to `in_its_place`.
        """
        call = await self.calls.next()
        assert call is None or isinstance(call, Call)
        return call

    @contextmanager
    def in_its_place(self, call: Call) -> Iterator[None]:
        """Answer a call inside the block.

        The next call starts at the end of the block, however left.
        """
        try:
            yield
        finally:
            self.calls.done(call)

    async def wait_room(self) -> None:
        """Wait until the bus has taken most of the unsent messages."""
        if self._link is not None:
            await self._link.room.wait()

    async def wait_sent(self) -> None:
        """Wait until the bus has taken all messages, or is lost."""
        if self._link is not None and self.backlog:
            await self._link.sent.wait()

    async def request_name(self, name: str) -> bool:
        """Request a well-known name, and return whether this connection owns the name now.

        The request never queues.
        """
        do_not_queue, primary_owner, already_owner = 4, 1, 4
        (result,) = await self.call(BUS_DRIVER, "RequestName", "su", [name, do_not_queue])
        return result in (primary_owner, already_owner)

    async def forwards_instance_field(self) -> bool:
        """Return whether the bus passes on header field 10.

        dbus-broker does, and dbus-daemon does not.
        """
        if self._probed is None:
            self._probed = trio.Event()
            self._send_probe()
        with trio.fail_after(CONNECT_TIMEOUT):
            await self._probed.wait()
        return self._probe_had_field

    def _open_link(self) -> PatchedMessageBus:
        if self._link is None or self.lost.is_set():
            raise BusLostError(f"no connection to the bus at {self.address}")
        return self._link

    def _ask_user(self, sender: str) -> None:
        """Ask the bus for the user of a caller, and pass the answer to `calls`."""

        def take(reply: Reply | None, _error: Exception | None) -> None:
            values = reply.values if reply is not None else []
            is_known = reply is not None and reply.header.type == MessageType.METHOD_RETURN
            if is_known and values and isinstance(values[0], int):
                self.calls.know(sender, values[0])
            else:  # the caller left
                self.calls.gone(sender)

        link = self._open_link()
        serial = link.next_serial()
        link.expect(serial, DRIVER, take)
        body = pack("s", [sender])
        link.put_raw(_make_call(serial, BUS_DRIVER, "GetConnectionUnixUser", body, "s"))

    def _send_probe(self) -> None:
        path, interface, member = _PROBE
        link = self._open_link()
        link.put_raw(
            make_signal(
                link.next_serial(),
                path=path,
                interface=interface,
                member=member,
                destination=self.unique_name,
                extra={INSTANCE_FIELD: ("o", "/")},
            )
        )

    # -- incoming messages: broker.bus.message_bus.Taker -------------------------------------------

    def look(self, header: Header) -> bool:
        """Return whether to read a call or signal; refuse an unwanted call."""
        if header.type == MessageType.SIGNAL:
            return self._is_probe(header) or self.wants_signal(header)
        if header.sender is None:
            return False
        try:
            if header.body_length > MAX_BODY:
                raise _over(f"the arguments have more than {MAX_BODY} bytes")
            if header.unix_fds > MAX_CALL_FDS:
                raise _over(f"more than {MAX_CALL_FDS} file descriptors")
            self.look_at_call(header)
            self.calls.check(header.sender, header.body_length, header.unix_fds)
        except CallRefusedError as exc:
            if self._link is not None:
                self._link.refuse(header, exc.dbus_name, str(exc))
            return False
        return True

    def take(self, header: Header, body: bytes, fds: list[int]) -> None:
        """Take a wanted call or signal."""
        if header.type == MessageType.SIGNAL:
            close_fds(fds)
            self._take_signal(header, body)
            return
        if fds and is_reserved(fds):
            close_fds(fds)
            if self._link is not None:
                self._link.refuse(
                    header, LIMITS_EXCEEDED, "the broker has no file descriptors left"
                )
            return
        sender = header.sender or ""
        call = Call(
            sender=sender,
            path=header.path or "",
            interface=header.interface,
            member=header.member or "",
            signature=header.signature,
            fds=fds,
            serial=header.serial,
            wants_reply=not header.flags & Flag.NO_REPLY_EXPECTED,
            body=body,
            little=header.little,
            size=len(body),
            fd_count=len(fds),
            turn=partial(self.calls.turn, sender),
        )
        self.calls.put(call)

    def _is_probe(self, header: Header) -> bool:
        return header.sender == self.unique_name and header.interface == _PROBE[1]

    def _take_signal(self, header: Header, body: bytes) -> None:
        if self._is_probe(header):
            self._probe_had_field = header.has_unknown
            if self._probed is not None:
                self._probed.set()
            return
        try:
            values = unpack(header.signature, body, little=header.little) if body else []
        except ValueError:
            return
        self.on_signal(
            Signal(
                sender=header.sender or "",
                path=header.path or "",
                interface=header.interface or "",
                member=header.member or "",
                signature=header.signature,
                values=values,
            )
        )

    async def _hello(self, sock: socket.socket) -> PatchedMessageBus:
        # The link closes the socket from here on, so the link is stored before any step that may
        # fail.
        link = PatchedMessageBus(sock, self)
        self._link = link
        link.on_lost = self._lost
        await trio_asyncio.aio_as_trio(link.connect)()
        name = str(link.unique_name)
        if not name.startswith(":"):
            raise ConfigError(f"the bus at {self.address} refused Hello: {name[:80]!r}")
        self.unique_name = name
        return link

    def _lost(self) -> None:
        self.lost.set()
        self.calls.close()

    def _close(self) -> None:
        if self._link is not None:
            self._link.close()
        self.calls.close()


@asynccontextmanager
async def open_bus(address: str, *, runtime_dir: str | None = None) -> AsyncIterator[BusConnection]:
    """Connect, say Hello, and close at the end.

    Raises ConfigError if the bus cannot be reached.
    """
    async with open_loop():
        sock = await _connect(address, runtime_dir)
        bus = BusConnection(address)
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
    """Run the asyncio loop for connections that are opened within the block."""
    if trio_asyncio.current_loop.get(None) is not None:
        yield
        return
    failure: Exception | None = None
    async with trio_asyncio.open_loop():
        try:
            yield
        except Exception as exc:  # noqa: BLE001 - passed around the nurseries, which would wrap it
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
            problem = getattr(exc, "strerror", None) or str(exc) or "no answer"
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise ConfigError(f"cannot connect to the bus at {address}: {problem}")


async def _shake_hands(sock: socket.socket, address: UnixAddress) -> None:
    # trio borrows the socket, because dbus-next uses the socket afterwards. So trio's socket object
    # must never be closed.
    stream = trio.socket.from_stdlib_socket(sock)
    await stream.connect(address.path)
    client = SaslClient(os.geteuid())
    waiting = client.start()
    while waiting:
        waiting = waiting[await stream.send(waiting) :]
    while not client.done:
        data = await stream.recv(4096)
        if not data:
            raise PeerProtocolError("the bus hung up during the handshake")
        client.feed(data)
    if not client.unix_fds:
        raise PeerProtocolError("the bus cannot pass descriptors")


def _make_call(  # noqa: PLR0913 - each one is a field of the message
    serial: int,
    target: Destination,
    member: str,
    body: bytes,
    signature: str,
    fds: int = 0,
    *,
    flags: int = 0,
) -> bytes:
    return make_call(
        serial,
        destination=target.destination,
        path=target.path,
        interface=target.interface,
        member=member,
        signature=signature,
        body=body,
        flags=flags,
        unix_fds=fds,
    )


def _read_reply(reply: Reply | None, error: Exception | None) -> list[Any]:
    if error is not None:
        raise error
    if reply is None:
        raise BusLostError("the bus went away")
    name, values = reply.header.error_name, reply.values
    if reply.header.type == MessageType.ERROR:
        text = values[0] if values and isinstance(values[0], str) else name
        raise CallRefusedError(name or FAILED, text or FAILED)
    return values


def is_owner_change(header: Header) -> bool:
    """Return whether a signal is the bus's own NameOwnerChanged."""
    return (
        header.sender == DRIVER
        and header.interface == DRIVER
        and header.member == "NameOwnerChanged"
        and header.signature == "sss"
        and header.body_length <= MAX_OWNER_CHANGE
    )


def _over(text: str) -> CallRefusedError:
    return CallRefusedError(LIMITS_EXCEEDED, text)


def _look_at_nothing(_header: Header) -> None:
    pass


def _ignore(_signal: Signal) -> None:
    pass
