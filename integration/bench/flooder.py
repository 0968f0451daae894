"""A process in a sandbox that takes all it can get, in one of several ways.

    python -m integration.bench.flooder KIND SOCKET

It writes a line when it is ready. A byte on its input has it flood, the next one has it drop its connections and
say, in a line, how often it could do something; and when it is ready again it writes another.
"""

import contextlib
import os
import select
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from broker.wire.header import MessageType
from broker.wire.marshal import make_call
from broker.wire.sasl import MAX_DIALOGUE
from integration.bench.client import (
    BUFFER,
    SERIAL_AT,
    TIMEOUT,
    BenchError,
    Client,
    make_driver_call,
)
from integration.bench.traffic import Load
from integration.harness.messages import make_header, make_message

COMMANDS: Final = 0
MIB: Final = 1024 * 1024
CONNECTIONS: Final = 8  # of those that send; half of what a sandbox may have
MANY_CONNECTIONS: Final = 14  # of those that send little at a time; nearly all
HIDDEN: Final = "org.example.Hidden"  # what the sandbox may not talk to
OWNED: Final = "org.buswarden.Flip"  # below it are the names that the sandbox may own
FLIPPED: Final = f"{OWNED}.Name"
MANY_NAMES: Final = 250
LISTENERS: Final = 14  # beside one that sends
RULES_EACH: Final = 68  # match rules; all together just below what a sandbox may have
DO_NOT_QUEUE: Final = 4


class Flood(Protocol):
    """A way to flood."""

    def get_ready(self) -> None:
        """Do what has to be done before."""

    def step(self) -> bool:
        """Do a bit more; return whether anything could be done."""

    def close(self) -> None:
        """Leave."""


class Sender:
    """Connections that send the same bytes for ever, and read what is answered or do not."""

    def __init__(
        self,
        path: str,
        data: bytes,
        *,
        reads: bool = True,
        connections: int = CONNECTIONS,
        piece: int = sys.maxsize,
        senders: int = sys.maxsize,
        prepare: Callable[[Client], None] | None = None,
    ) -> None:
        self._path: Final = path
        self._data: Final = memoryview(data)
        self._connections: Final = connections
        self._piece: Final = piece  # bytes that are sent at a time
        self._senders: Final = senders  # the other connections only read
        self._prepare: Final = prepare  # for each connection
        self._wanted: Final = select.EPOLLOUT | (select.EPOLLIN if reads else 0)
        self._poll: Final = select.epoll()
        self._sockets: Final[dict[int, socket.socket]] = {}
        self._sent: Final[dict[int, int]] = {}

    def get_ready(self) -> None:
        """Make the connections, if there is more to do for each."""
        while self._prepare is not None and len(self._sockets) < self._connections:
            self._connect()

    def step(self) -> bool:
        """Send and read whatever goes."""
        if len(self._sockets) < self._connections:
            # It was cut off, or has not begun. There may be one too many for a moment.
            with contextlib.suppress(BenchError, OSError):
                self._connect()
        done = False
        for fd, events in self._poll.poll(0.01):
            try:
                done |= self._serve(fd, events)
            except BlockingIOError:
                pass
            except OSError:
                self._drop(fd)
        return done

    def close(self) -> None:
        """Leave without a word."""
        for fd in list(self._sockets):
            self._drop(fd)
        self._poll.close()

    def _connect(self) -> None:
        client = Client(self._path)
        if self._prepare is not None:
            self._prepare(client)
        sock = client.take_socket()
        sock.setblocking(False)
        sends = len(self._sockets) >= self._connections - self._senders
        self._sockets[sock.fileno()] = sock
        self._sent[sock.fileno()] = 0
        self._poll.register(sock.fileno(), self._wanted if sends else select.EPOLLIN)

    def _drop(self, fd: int) -> None:
        self._poll.unregister(fd)
        self._sockets.pop(fd).close()

    def _serve(self, fd: int, events: int) -> bool:
        sock = self._sockets[fd]
        if events & (select.EPOLLHUP | select.EPOLLERR):
            raise ConnectionResetError
        if events & select.EPOLLIN and not sock.recv_into(BUFFER):
            raise ConnectionResetError
        if not events & select.EPOLLOUT:
            return bool(events)
        at = self._sent[fd]
        sent = at + sock.send(self._data[at : at + self._piece])
        self._sent[fd] = sent % len(self._data)
        return True


class Connector:
    """Connections that are dropped as soon as they are of use."""

    def __init__(self, path: str) -> None:
        self._path: Final = path

    def get_ready(self) -> None:
        """Do nothing: this flood needs no preparation."""

    def step(self) -> bool:
        """Connect once."""
        try:
            with Client(self._path):
                return True
        except (BenchError, OSError):
            return False

    def close(self) -> None:
        """Nothing is kept."""


class Greeter:
    """Connections that say as much as fits into a handshake, in lines that mean nothing."""

    def __init__(self, path: str) -> None:
        self._path: Final = path

    def get_ready(self) -> None:
        """Do nothing: this flood needs no preparation."""

    def step(self) -> bool:
        """Connect once, and wait for a word or the end."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT)
            try:
                sock.connect(self._path)
                sock.sendall(b"\0" + b"\r\n" * (MAX_DIALOGUE // 2 - 1))
                sock.recv_into(BUFFER)
            except ConnectionError:
                return True
            except OSError:
                return False
        return True

    def close(self) -> None:
        """Nothing is kept."""


FLOODS: Final[Mapping[str, Callable[[str], Flood]]] = {
    "denied": lambda path: Sender(path, repeat(make_denied(), 256)),
    "allowed": lambda path: Sender(path, repeat(Load().make_call(), 256)),
    "huge": lambda path: Sender(path, repeat(Load(payload=8 * MIB).make_call(), 1)),
    "deaf": lambda path: Sender(path, repeat(Load(payload=65536).make_call(), 16), reads=False),
    "connects": Connector,
    "greets": Greeter,
    "bytes": lambda path: Sender(
        path,
        repeat(Load(payload=MIB).make_call(), 1),
        connections=MANY_CONNECTIONS,
        piece=1,
    ),
    "flip": lambda path: Sender(
        path, make_flips(), connections=LISTENERS + 1, senders=1, prepare=listen_for_names
    ),
    "flip-250": lambda path: Sender(path, make_flips(), connections=1, prepare=own_many),
    "broadcast": lambda path: Sender(
        path, make_news(), connections=LISTENERS + 1, senders=1, prepare=listen_for_news
    ),
    "churn": Connector,
}


def make_flips() -> bytes:
    """Return calls that take a name and give it back, in turns."""
    take = make_driver_call("RequestName", "su", (FLIPPED, DO_NOT_QUEUE))
    give = make_driver_call("ReleaseName", "s", (FLIPPED,))
    both = bytearray((take + give) * 128)
    for number in range(128):
        at = number * len(take + give)
        struct.pack_into("<I", both, at + SERIAL_AT, 2 * number + 1000)
        struct.pack_into("<I", both, at + len(take) + SERIAL_AT, 2 * number + 1001)
    return bytes(both)


def make_news() -> bytes:
    """Return broadcasts."""
    header = make_header(MessageType.SIGNAL, 1, path="/", interface=OWNED, member="News")
    return repeat(make_message(header), 256)


def listen_for_names(client: Client) -> None:
    """Ask for owner changes of many names, none of which changes."""
    for number in range(RULES_EACH):
        rule = f"type='signal',member='NameOwnerChanged',arg0='{OWNED}.x{number}'"
        client.send(make_driver_call("AddMatch", "s", (rule,)))
    client.ask(make_driver_call("GetId"))


def listen_for_news(client: Client) -> None:
    """Ask for broadcasts that no rule lets in."""
    client.add_match(f"type='signal',interface='{OWNED}'")


def own_many(client: Client) -> None:
    """Own as many names as may be, but for one."""
    for number in range(MANY_NAMES - 1):
        client.send(make_driver_call("RequestName", "su", (f"{OWNED}.n{number}", DO_NOT_QUEUE)))
    client.ask(make_driver_call("GetId"))


def make_denied() -> bytes:
    """Return a call that the gate answers by itself."""
    return make_call(1, destination=HIDDEN, path="/", interface=HIDDEN, member="Echo")


def repeat(call: bytes, count: int) -> bytes:
    """Return the call so many times, with different serials."""
    calls = bytearray(call * count)
    for number in range(count):
        struct.pack_into("<I", calls, number * len(call) + SERIAL_AT, number + 100)
    return bytes(calls)


def main(argv: list[str]) -> int:
    """Flood whenever told, until the input ends."""
    kind, path = argv
    while True:
        flood, count = FLOODS[kind](path), 0
        flood.get_ready()
        print("ready", flush=True)
        if not os.read(COMMANDS, 1):
            return 0
        while not select.select([COMMANDS], [], [], 0)[0]:
            count += flood.step()
        os.read(COMMANDS, 1)
        flood.close()
        print(count, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
