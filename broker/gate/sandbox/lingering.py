"""The bus side of a connection whose app has gone, until the bus closes it.

The bus may still hold messages of the app, and lists the app's unique name until it has read them. If the gate forgot
the name before that, the app's last messages would look like a host's. So the gate shuts down its sending half only.
The bus reads the rest, then the end of the file, and closes. Until then the unique name belongs to the sandbox, and
the connection counts against its `max_connections_per_container`.

There is no deadline, because only the bus knows when it has read everything. A connection that the bus never closes
takes one place of its own sandbox and nothing of others.

    app          gate                         bus
     | closes ---> |                           |
     |             | -- SHUT_WR -------------> | (still reads the app's messages)
     |             | <- messages, discarded -- |
     |             | <- end of the file ------ | (the name is released, or about to be)
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
    """A lingering connection, which owns its socket."""

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
        with contextlib.suppress(OSError):  # the bus has closed already: the next read shows it
            sock.shutdown(socket.SHUT_WR)
        loop.add(sock.fileno(), READABLE, self._readable)

    def close(self) -> None:
        """Close the connection. Does nothing the second time."""
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
        """Return the connection for a hand-over, with its descriptor in `fds`."""
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
