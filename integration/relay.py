"""A socket in front of a bus that counts what each connection sends to it: to see what a gate passes on, and when.

Passes bytes, and no descriptors: a gate behind it must be given none.
"""

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from integration.rawclient import connect_socket


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
            data = source.recv(65536)
            sink.sendall(data)
        except OSError:
            data = b""
        if not data:
            for sock in (source, sink):
                self._selector.unregister(sock)
                sock.close()
        elif to_bus:
            self.passed += len(data)


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
