"""What is left of a connection whose app has gone: the bus's side, until the bus lets go of it.

The bus may hold much that the app sent, and has its unique name listed as long as it does. So that side is closed half:
the bus reads what there is, then the end of the file, and hangs up. Until then the connection is its sandbox's, by
name and in number. There is no deadline: nobody but the bus can say when it has read all. One that it does not let
go of costs its own sandbox a place, and nobody else anything.

    app          gate                         bus
     | hangs up -> |                           |
     |             | -- SHUT_WR -------------> | (goes on reading what was sent)
     |             | <- messages, thrown away  |
     |             | <- end of the file ------ | (the name is gone, or about to go)
     |             | tells Gone                |
"""

import contextlib
import socket
from collections.abc import Callable
from typing import Final

from broker.gate.handover import Fds, LingerDump
from broker.gate.loop import READABLE, Loop
from broker.gate.pipe import ANCILLARY, READ_SIZE_FOR_MUCH, RECEIVE, close_fds, descriptors


class Linger:
    """One such connection. Its socket is its own from here on."""

    def __init__(
        self,
        loop: Loop,
        bus: str,
        unique_name: str,
        sock: socket.socket,
        ended: Callable[["Linger"], None],
    ) -> None:
        self.bus: Final = bus
        self.unique_name: Final = unique_name
        self._loop: Final = loop
        self._sock: Final = sock
        self._ended: Final = ended
        self._is_over = False
        with contextlib.suppress(OSError):  # the bus has hung up: reading finds out
            sock.shutdown(socket.SHUT_WR)
        loop.add(sock.fileno(), READABLE, self._readable)

    def close(self) -> None:
        """Let go of it. Does nothing the second time."""
        if not self._is_over:
            self._is_over = True
            self._loop.remove(self._sock.fileno())
            self._sock.close()
            self._ended(self)

    def leave(self) -> None:
        """Leave the loop, and close nothing."""
        self._is_over = True
        self._loop.remove(self._sock.fileno())
        self._sock.detach()

    def dump(self, fds: Fds) -> LingerDump:
        """Return it, its descriptor as an index."""
        return LingerDump(
            bus=self.bus, unique_name=self.unique_name, fd=fds.put(self._sock.fileno())
        )

    def _readable(self, _events: int) -> None:
        try:
            data, ancillary, _, _ = self._sock.recvmsg(READ_SIZE_FOR_MUCH, ANCILLARY, RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if ancillary:
            close_fds(descriptors(ancillary))
        if not data:
            self.close()
