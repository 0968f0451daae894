"""The bus side of a connection whose app has gone, until the bus closes too.

The bus may still hold messages of the app, and keeps the app's unique name until these messages are
read. If the gate forgot the name earlier, the app's last messages would look like messages of a
host. So the gate shuts down only the sending half of the socket. The bus reads the rest and then
EOF, and closes the connection. Until then the unique name belongs to the sandbox, and the
connection counts against `max_connections_per_container` of the sandbox.

There is no deadline, because only the bus knows when all messages are read. A connection that the
bus never closes takes a place of that sandbox, and takes nothing from other sandboxes.

    app          gate                         bus
     | closes ---> |                           |
     |             | -- SHUT_WR -------------> | (still reads the app's messages)
     |             | <- messages, discarded -- |
     |             | <- EOF ------------------ | (the name is released now or soon)
     |             | -- Gone --> supervisor    |
"""

import contextlib
import socket
from collections.abc import Callable
from typing import Final

from broker.gate.dumps import Fds, LingeringDump
from broker.gate.io.loop import READABLE, Loop
from broker.gate.io.stream import READ_SIZE_FOR_MUCH, RECEIVE
from broker.posix.descriptors import ANCILLARY_SIZE, close_fds, received_fds


class LingeringConnection:
    """A lingering connection, as the owner of the socket."""

    def __init__(
        self,
        loop: Loop,
        bus: str,
        unique_name: str,
        sock: socket.socket,
        ended: Callable[["LingeringConnection"], None],
    ) -> None:
        self.bus: Final = bus
        self.unique_name: Final = unique_name
        self._loop: Final = loop
        self._sock: Final = sock
        self._ended: Final = ended
        self._is_over = False
        # If the bus has closed already, the shutdown fails, and the next read returns EOF.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        loop.add(sock.fileno(), READABLE, self._readable)

    def close(self) -> None:
        """Close the connection. A second call does nothing."""
        if not self._is_over:
            self._is_over = True
            self._loop.remove(self._sock.fileno())
            self._sock.close()
            self._ended(self)

    def leave(self) -> None:
        """Leave the loop and keep the socket open, for a hand-over."""
        self._is_over = True
        self._loop.remove(self._sock.fileno())
        self._sock.detach()

    def dump(self, fds: Fds) -> LingeringDump:
        """Return the connection for a hand-over, with the descriptor in `fds`."""
        return LingeringDump(
            bus=self.bus, unique_name=self.unique_name, fd=fds.put(self._sock.fileno())
        )

    def _readable(self, _events: int) -> None:
        try:
            data, ancillary, _, _ = self._sock.recvmsg(READ_SIZE_FOR_MUCH, ANCILLARY_SIZE, RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if ancillary:
            close_fds(received_fds(ancillary))
        if not data:
            self.close()
