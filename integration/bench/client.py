"""A D-Bus client that costs as little as Python can: blocking socket, bytes made beforehand.

Its loops send the same call again and again, with only the serial changed, and count the bytes that
come back; `measure_reply` says how many to wait for, and whether calls are still answered.
"""

import array
import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn, Self

from broker.wire.header import FIXED_SIZE, MessageType, measure, parse_header
from broker.wire.marshal import Value, make_call

# Longer than any pause of a busy machine; a lost reply ends the run instead of hanging it.
TIMEOUT: Final = 30  # seconds
# For all clients of a process: what is read there is counted, and not kept.
BUFFER: Final = bytearray(1024 * 1024)
SERIAL_AT: Final = 8  # of a message's bytes; little-endian in all of ours


class BenchError(Exception):
    """The measurement cannot be made; the text says why."""


class Client:
    """A connection that has said Hello."""

    def __init__(self, path: str | Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # In the kernel: Python's own timeouts would cost a poll() for every call.
        limit = struct.pack("@ll", TIMEOUT, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._socket.connect(str(path))
        self._rest = b""
        self._serial = 0
        try:
            self._authenticate()
            reply = self.ask(make_driver_call("Hello"))
        except BaseException:
            self._socket.close()
            raise
        self.unique_name = reply[parse_header(reply).size + 4 : -1].decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def ask(self, call: bytes) -> bytes:
        """Return the reply to the call; what came before it is dropped. Raises BenchError."""
        self._send_next(call)
        while True:
            reply = self._next()
            header = parse_header(reply)
            if header.reply_serial == self._serial:
                break
        if header.type != MessageType.METHOD_RETURN:
            raise BenchError(f"an error instead of a reply: {reply[header.size + 4 : -1]!r}")
        return reply

    @property
    def connection(self) -> socket.socket:
        """The socket, for a loop of the caller's own, who asks for serials."""
        return self._socket

    def take_serial(self) -> int:
        """Return a serial that nothing was sent with."""
        self._serial += 1
        return self._serial

    def add_match(self, rule: str) -> None:
        """Subscribe to signals."""
        self.ask(make_driver_call("AddMatch", "s", (rule,)))

    def own(self, name: str) -> None:
        """Own a name."""
        self.ask(make_driver_call("RequestName", "su", (name, 0)))

    def take_socket(self) -> socket.socket:
        """Return the socket, without its time limits, for a loop of the caller's own."""
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", 0, 0))
        return self._socket

    def settle(self) -> None:
        """Return when nothing that the bus sent of itself is under way any more."""
        self.ask(make_driver_call("GetId"))
        if self._rest:
            raise BenchError("bytes behind the last reply")

    def send(self, message: bytes) -> None:
        """Send a message with the next serial, and wait for nothing."""
        self._send_next(message)

    def next_message(self) -> bytes:
        """Return the next message that comes, whatever it is."""
        return self._next()

    def measure_reply(self, call: bytes) -> int:
        """Return how long the reply to such a call is. Raises BenchError if that is not what comes."""
        self._send_next(call)
        reply = self._next()
        header = parse_header(reply)
        if header.type != MessageType.METHOD_RETURN or header.reply_serial != self._serial:
            raise BenchError(f"not the reply that was waited for: {reply[:200]!r}")
        return len(reply)

    def roundtrips(self, template: bytes, reply_size: int, count: int) -> float:
        """Make calls one after the other; return the seconds."""
        call = bytearray(template)
        send, receive, buffer = self._socket.send, self._socket.recv_into, BUFFER
        pack = struct.Struct("<I").pack_into
        first = self._serial + 1
        start = time.perf_counter()
        for serial in range(first, first + count):
            pack(call, SERIAL_AT, serial)
            send(call)
            missing = reply_size - receive(buffer)
            while missing > 0:
                missing -= receive(buffer) or _closed()
        taken = time.perf_counter() - start
        self._serial += count
        return taken

    def pipelined(self, template: bytes, reply_size: int, batches: int, batch: int) -> float:
        """Keep two batches of calls under way all the time; return the seconds."""
        calls = bytearray(template * batch)
        start = time.perf_counter()
        self._send_batch(calls, batch)
        for _ in range(batches - 1):
            self._send_batch(calls, batch)
            self._count_bytes(reply_size * batch)
        self._count_bytes(reply_size * batch)
        return time.perf_counter() - start

    def _send_batch(self, calls: bytearray, batch: int) -> None:
        first = self._serial + 1
        serials = array.array("I", range(first, first + batch)).tobytes()
        stride = len(calls) // batch
        for byte in range(4):  # each of a serial's bytes, in all the calls at once
            calls[SERIAL_AT + byte :: stride] = serials[byte::4]
        self._serial += batch
        self._socket.sendall(calls)

    def _count_bytes(self, missing: int) -> None:
        receive, view = self._socket.recv_into, memoryview(BUFFER)
        while missing > 0:
            # No further than asked for: what lies behind belongs to the next batch.
            missing -= receive(view[:missing]) or _closed()

    def _send_next(self, call: bytes) -> None:
        numbered = bytearray(call)
        self._serial += 1
        struct.pack_into("<I", numbered, SERIAL_AT, self._serial)
        self._socket.sendall(numbered)

    def _authenticate(self) -> None:
        # Step by step, as xdg-dbus-proxy before 0.1.6 needs it.
        uid = str(os.getuid()).encode().hex().encode()
        self._say(b"\0AUTH EXTERNAL " + uid + b"\r\n", b"OK ")
        self._say(b"NEGOTIATE_UNIX_FD\r\n", b"AGREE_UNIX_FD")
        self._socket.sendall(b"BEGIN\r\n")

    def _say(self, line: bytes, expected: bytes) -> None:
        self._socket.sendall(line)
        answer = b""
        while not answer.endswith(b"\r\n"):
            answer += self._receive()
        if not answer.startswith(expected):
            raise BenchError(f"handshake: {answer!r} in answer to {line!r}")

    def _next(self) -> bytes:
        while len(self._rest) < FIXED_SIZE or len(self._rest) < measure(self._rest):
            self._rest += self._receive()
        size = measure(self._rest)
        whole, self._rest = self._rest[:size], self._rest[size:]
        return whole

    def _receive(self) -> bytes:
        data = self._socket.recv(len(BUFFER))
        if not data:
            _closed()
        return data


def _closed() -> NoReturn:
    raise BenchError("the connection was closed")


def make_driver_call(member: str, signature: str = "", values: Sequence[Value] = ()) -> bytes:
    """Return a call to the bus itself; its serial is still to be set."""
    return make_call(
        1,
        destination="org.freedesktop.DBus",
        path="/org/freedesktop/DBus",
        interface="org.freedesktop.DBus",
        member=member,
        signature=signature,
        values=values,
    )
