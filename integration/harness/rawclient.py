"""A small blocking D-Bus client on a raw socket, for tests that must say exactly what is sent.

Nothing is hidden: replies that are errors come back as messages, what arrives while a reply is waited for
is kept in order in `queue`, and `send_raw` sends any bytes. Everything that waits has a timeout and
raises TimeoutError; a connection that the other end closed raises EOFError.
"""

import array
import itertools
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Self

from broker.wire.address import parse_address
from broker.wire.header import FIXED_SIZE, Flag, Header, MessageType, measure, parse_header
from broker.wire.sasl import SaslClient
from integration.harness.messages import Message, make_header, make_message

BUS: Final = "org.freedesktop.DBus"
BUS_PATH: Final = "/org/freedesktop/DBus"
PEER: Final = "org.freedesktop.DBus.Peer"
TIMEOUT: Final = 10.0  # seconds, for whatever waits


class CallError(Exception):
    """An error reply, where `ask` was used."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name: Final = name
        self.text: Final = text


class RawClient:
    """One connection to a bus, or to whatever passes for one."""

    def __init__(self, sock: socket.socket, *, uid: int | None = None) -> None:
        self.sock = sock
        self.queue: deque[Message] = deque()
        self.unique_name = ""
        self._serials = itertools.count(1)
        self._buffer = bytearray()
        self._fds: deque[int] = deque()
        try:
            self._authenticate(os.getuid() if uid is None else uid)
        except BaseException:
            sock.close()
            raise

    @classmethod
    def connect(cls, address: str, *, hello: bool = True) -> Self:
        """Connect to the first address that can be connected to, and say Hello."""
        client = cls(connect_socket(address))
        try:
            if hello:
                client.hello()
        except BaseException:
            client.close()
            raise
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and every descriptor that no test took."""
        self.sock.close()
        for message in self.queue:
            self._fds.extend(message.fds)
        self.queue.clear()
        while self._fds:
            os.close(self._fds.popleft())

    # Sending

    def next_serial(self) -> int:
        return next(self._serials)

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are, the descriptors with the first of them."""
        self.sock.settimeout(TIMEOUT)
        sent = socket.send_fds(self.sock, [data], list(fds)) if fds else 0
        if sent < len(data):  # even nothing cannot be sent to who has hung up meanwhile
            self.sock.sendall(memoryview(data)[sent:])

    def start_call(
        self,
        destination: str | None,
        path: str,
        interface: str | None,
        member: str,
        signature: str = "",
        values: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
        flags: int = 0,
    ) -> int:
        """Send a call and return its serial, without waiting for the reply."""
        header = self._make_call(
            destination, path, interface, member, signature, flags=flags, unix_fds=len(fds)
        )
        self.send_raw(make_message(header, values), fds)
        return header.serial

    def make_mute_call(
        self, destination: str, path: str, interface: str, member: str, text: str = ""
    ) -> bytes:
        """Return a call that wants no reply, not sent yet."""
        flags = Flag.NO_REPLY_EXPECTED
        header = self._make_call(destination, path, interface, member, "s", flags=flags)
        return make_message(header, (text,))

    def _make_call(
        self,
        destination: str | None,
        path: str,
        interface: str | None,
        member: str,
        signature: str,
        *,
        flags: int,
        unix_fds: int = 0,
    ) -> Header:
        return make_header(
            MessageType.METHOD_CALL,
            self.next_serial(),
            flags=flags,
            path=path,
            interface=interface,
            member=member,
            destination=destination,
            signature=signature,
            unix_fds=unix_fds,
        )

    def emit(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        values: Sequence[Any] = (),
        *,
        destination: str | None = None,
    ) -> None:
        """Send a signal: a broadcast, if it has no destination."""
        header = make_header(
            MessageType.SIGNAL,
            self.next_serial(),
            path=path,
            interface=interface,
            member=member,
            destination=destination,
            signature=signature,
        )
        self.send_raw(make_message(header, values))

    def reply(
        self,
        call: Message,
        signature: str = "",
        values: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
        error: str | None = None,
    ) -> None:
        """Answer a call, with an error if `error` names one."""
        header = make_header(
            MessageType.ERROR if error else MessageType.METHOD_RETURN,
            self.next_serial(),
            error_name=error,
            reply_serial=call.header.serial,
            destination=call.header.sender,
            signature=signature,
            unix_fds=len(fds),
        )
        self.send_raw(make_message(header, values), fds)

    # Receiving

    def receive(self, timeout: float = TIMEOUT) -> Message:
        """Return the oldest message that no one has taken yet."""
        if self.queue:
            return self.queue.popleft()
        return self._read_message(time.monotonic() + timeout)

    def wait_reply(self, serial: int, timeout: float = TIMEOUT) -> Message:
        """Return the reply to a call; what else arrives goes to `queue`."""
        deadline = time.monotonic() + timeout
        for message in self.queue:
            if message.header.reply_serial == serial:
                self.queue.remove(message)
                return message
        while (message := self._read_message(deadline)).header.reply_serial != serial:
            self.queue.append(message)
        return message

    def wait_signal(self, member: str, timeout: float = TIMEOUT) -> Message:
        """Return the oldest signal of that member; what else arrives stays in `queue`."""
        return self._wait(MessageType.SIGNAL, member, timeout)

    def wait_call(self, member: str, timeout: float = TIMEOUT) -> Message:
        """Return the oldest call of that member; what else arrives stays in `queue`."""
        return self._wait(MessageType.METHOD_CALL, member, timeout)

    def drain(self, settle: float = 0.2) -> list[Message]:
        """Return all that has come, once nothing more has come for `settle` seconds."""
        while True:
            try:
                self.queue.append(self._read_message(time.monotonic() + settle))
            except TimeoutError:
                break
        messages = list(self.queue)
        self.queue.clear()
        return messages

    def is_closed(self, timeout: float = TIMEOUT) -> bool:
        """Return whether the other end closes the connection within the time."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                self.queue.append(self._read_message(deadline))
        except TimeoutError:
            return False
        except (EOFError, ConnectionError):
            return True

    # Calls

    def call(
        self,
        destination: str | None,
        path: str,
        interface: str | None,
        member: str,
        signature: str = "",
        values: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
        flags: int = 0,
        timeout: float = TIMEOUT,
    ) -> Message:
        """Call and return the reply, be it an error."""
        serial = self.start_call(
            destination, path, interface, member, signature, values, fds=fds, flags=flags
        )
        return self.wait_reply(serial, timeout)

    def ask(
        self,
        destination: str | None,
        path: str,
        interface: str | None,
        member: str,
        signature: str = "",
        values: Sequence[Any] = (),
    ) -> tuple[Any, ...]:
        """Call and return the values of the reply. Raises CallError."""
        reply = self.call(destination, path, interface, member, signature, values)
        if reply.error is not None:
            raise CallError(reply.error, "".join(map(str, reply.values[:1])))
        return reply.values

    def driver(self, member: str, signature: str = "", *values: Any) -> tuple[Any, ...]:
        """Ask the bus itself. Raises CallError."""
        return self.ask(BUS, BUS_PATH, BUS, member, signature, values)

    def hello(self) -> str:
        (self.unique_name,) = self.driver("Hello")
        return self.unique_name

    def request_name(self, name: str, flags: int = 4) -> int:
        """Return the bus's answer: 1 is owner. The default does not wait in the queue."""
        (answer,) = self.driver("RequestName", "su", name, flags)
        return int(answer)

    def release_name(self, name: str) -> int:
        (answer,) = self.driver("ReleaseName", "s", name)
        return int(answer)

    def add_match(self, rule: str) -> None:
        self.driver("AddMatch", "s", rule)

    def remove_match(self, rule: str) -> None:
        self.driver("RemoveMatch", "s", rule)

    def name_owner(self, name: str) -> str:
        (owner,) = self.driver("GetNameOwner", "s", name)
        return str(owner)

    def list_names(self) -> list[str]:
        (names,) = self.driver("ListNames")
        return list(names)

    def round_trip(self) -> None:
        """Ask the bus for nothing, and wait for the answer."""
        # Every sandbox may Ping; for GetId one with `bus_by_rule` needs a rule.
        self.ask(BUS, BUS_PATH, PEER, "Ping")

    # Inside

    def _authenticate(self, uid: int) -> None:
        sasl = SaslClient(uid)
        self.send_raw(sasl.start())  # sets the timeout, too
        while not sasl.done:
            data = self.sock.recv(4096)
            if not data:
                raise EOFError("closed during authentication")
            sasl.feed(data)
        assert sasl.unix_fds, "the bus does not pass descriptors"
        self._buffer += sasl.leftover

    def _wait(self, kind: MessageType, member: str, timeout: float) -> Message:
        deadline = time.monotonic() + timeout
        for message in self.queue:
            if (message.header.type, message.header.member) == (kind, member):
                self.queue.remove(message)
                return message
        while True:
            message = self._read_message(deadline)
            if (message.header.type, message.header.member) == (kind, member):
                return message
            self.queue.append(message)

    def _read_message(self, deadline: float) -> Message:
        self._fill(FIXED_SIZE, deadline)
        length = measure(bytes(self._buffer[:FIXED_SIZE]))
        self._fill(length, deadline)
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        header = parse_header(data)
        fds = [self._fds.popleft() for _ in range(header.unix_fds)]
        return Message(header, data[header.size :], fds)

    def _fill(self, size: int, deadline: float) -> None:
        while len(self._buffer) < size:
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            data, fds = _receive(self.sock)
            self._fds.extend(fds)
            if not data:
                raise EOFError("the other end closed the connection")
            self._buffer += data


def connect_socket(address: str) -> socket.socket:
    """Return a stream socket that is connected to the first address of the text that works."""
    failure: OSError | None = None
    for one in parse_address(address):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(one.path)
        except OSError as exc:
            sock.close()
            failure = exc
        else:
            return sock
    raise failure or ConnectionError(f"no address in {address!r}")


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    fds = array.array("i")
    data, ancillary, flags, _ = sock.recvmsg(65536, socket.CMSG_SPACE(253 * fds.itemsize))
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    assert not flags & socket.MSG_CTRUNC, "descriptors were lost"
    return data, list(fds)
