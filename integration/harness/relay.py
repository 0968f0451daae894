"""A socket in front of a bus that counts what each connection sends to it: to see what a gate passes on, and when.

Passes bytes and descriptors: newer buses put some into what they say about a connection.
"""

import array
import os
import selectors
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from integration.harness.rawclient import connect_socket

MAX_FDS: Final = 253  # in one message, by the kernel


class Relay:
    """A relay that runs, in a thread of its own."""

    def __init__(self, path: Path, address: str) -> None:
        self.address: Final = f"unix:path={path}"
        self.passed = 0  # bytes to the bus, of all connections
        self._bus_address: Final = address
        self._listening: Final = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._selector: Final = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ, None)
        self._waker, self._wakened = socket.socketpair()
        self._selector.register(self._wakened, selectors.EVENT_READ, None)

    def run(self) -> None:
        """Relay until `stop`."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._wakened:
                    return
                if key.fileobj is self._listening:
                    self._accept()
                else:
                    self._pass(key.fileobj, *key.data)

    def stop(self) -> None:
        """Have `run` return."""
        self._waker.send(b"x")

    def close(self) -> None:
        """Close all sockets."""
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()
        self._waker.close()

    def _accept(self) -> None:
        client, _ = self._listening.accept()
        bus = connect_socket(self._bus_address)
        self._selector.register(client, selectors.EVENT_READ, (bus, True))
        self._selector.register(bus, selectors.EVENT_READ, (client, False))

    def _pass(self, source: object, sink: socket.socket, to_bus: bool) -> None:
        assert isinstance(source, socket.socket)
        if source.fileno() < 0:
            return  # closed with the other one, in this turn
        try:
            data, fds = receive_all(source)
        except OSError:
            data, fds = b"", []
        try:
            if data:
                send_all(sink, data, fds)
        except OSError:
            data = b""
        finally:
            for fd in fds:
                os.close(fd)
        if not data:
            for sock in (source, sink):
                self._selector.unregister(sock)
                sock.close()
        elif to_bus:
            self.passed += len(data)


def receive_all(source: socket.socket) -> tuple[bytes, list[int]]:
    """Return what is there to be read, and the descriptors that came with it, which are the caller's."""
    fds = array.array("i")
    data, ancillary, flags, _ = source.recvmsg(65536, socket.CMSG_SPACE(MAX_FDS * fds.itemsize))
    assert not flags & socket.MSG_CTRUNC, "descriptors were lost"
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


def send_all(sink: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Send it all, with the descriptors at its first byte."""
    sent = socket.send_fds(sink, [data], list(fds)) if fds else 0
    sink.sendall(data[sent:])


@contextmanager
def running_relay(path: Path, address: str) -> Iterator[Relay]:
    """Run a relay to a bus for as long as the block."""
    relay = Relay(path, address)
    thread = threading.Thread(target=relay.run, daemon=True)
    thread.start()
    try:
        yield relay
    finally:
        relay.stop()
        thread.join(10)
        relay.close()
