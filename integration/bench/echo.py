"""The service: answers every call with an empty reply or, if the call has a body, with that body.

    python -m integration.bench.echo SOCKET NAME

Writes a line to its output when it owns the name. It reads big chunks and answers many calls in one
write; the reply to a caller is made once, and only its two serials change.
"""

import gc
import socket
import struct
import sys
from typing import Final

from broker.wire.header import MessageType, parse_header
from broker.wire.marshal import make_return
from integration.bench.client import Client

CHUNK: Final = 1024 * 1024
_HEAD: Final = struct.Struct("<IIII")
# A reply up to and with its REPLY_SERIAL, which is the first field.
_REPLY: Final = struct.Struct("<IIII4sI")
_CALL_KIND: Final = MessageType.METHOD_CALL << 8
_KIND_MASK: Final = 0xFF00


class Echo:
    """Calls in, replies out."""

    def __init__(self) -> None:
        self._rest = b""
        self._serial = 0
        # Header fields of a call -> (first word, length of fields, what follows REPLY_SERIAL).
        self._known: dict[bytes, tuple[int, int, bytes]] = {}

    def answer(self, data: bytes) -> bytes:
        """Return the replies to the calls that are complete now."""
        if self._rest:
            data = self._rest + data
        replies: list[bytes] = []
        at, end = 0, len(data)
        serial, known = self._serial, self._known
        while end - at >= 16:
            first, body, call_serial, fields = _HEAD.unpack_from(data, at)
            head = at + 16 + (fields + 7 & ~7)
            if end < head + body:
                break
            if first & _KIND_MASK == _CALL_KIND:
                key = data[at + 12 : head]
                shape = known.get(key) or self._learn(key, data[at : head + body])
                serial = (serial + 1) & 0x7FFFFFFF or 1
                replies.append(
                    _REPLY.pack(shape[0], body, serial, shape[1], b"\5\1u\0", call_serial)
                )
                replies.append(shape[2])
                if body:
                    replies.append(data[head : head + body])
            at = head + body
        self._serial = serial
        self._rest = data[at:]
        return b"".join(replies)

    def _learn(self, key: bytes, message: bytes) -> tuple[int, int, bytes]:
        call = parse_header(message)
        reply = make_return(
            1,
            reply_serial=1,
            destination=call.sender,
            signature=call.signature,
            values=("",) * len(call.signature),  # strings are all that is ever sent
        )
        header = reply[: parse_header(reply).size]
        first, _, _, size = _HEAD.unpack_from(header)
        self._known[key] = (first, size, header[_REPLY.size :])
        return self._known[key]


def main(argv: list[str]) -> int:
    """Serve until the bus or the starter goes away."""
    path, name = argv
    with Client(path) as client:
        client.own(name)
        client.settle()
        serve(client.take_socket())
    return 0


def serve(connection: socket.socket) -> None:
    """Answer until the bus closes the connection."""
    echo = Echo()
    gc.disable()
    print("ready", flush=True)
    receive, send = connection.recv, connection.sendall
    while data := receive(CHUNK):
        if replies := echo.answer(data):
            send(replies)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
