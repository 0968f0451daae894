"""What a client says, byte for byte: for tests that write handshakes and messages themselves."""

import os
import socket
from pathlib import Path

from broker.wire.header import MessageType
from integration.messages import make_header, make_message
from integration.rawclient import BUS, BUS_PATH, RawClient, connect_socket
from integration.service import ECHO, PATH
from integration.supervised import Sandbox, Warden


def open_fds(warden: Warden) -> int:
    """Return how many descriptors the gate has."""
    return len(list(Path(f"/proc/{warden.gate_pid}/fd").iterdir()))


def echo(client: RawClient, text: str = "hello") -> None:
    """Call the service and see that it answers."""
    assert client.ask(ECHO, PATH, ECHO, "Echo", "s", (text,)) == (text,)


def handshake(sandbox: Sandbox, data: bytes) -> socket.socket:
    """Connect and send these bytes."""
    sock = connect_socket(sandbox.address)
    sock.settimeout(10)
    sock.sendall(data)
    return sock


def auth() -> bytes:
    """Return what begins every handshake, up to the line that asks for EXTERNAL."""
    return b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n"


def hello_message(serial: int = 1) -> bytes:
    header = make_header(
        MessageType.METHOD_CALL,
        serial,
        path=BUS_PATH,
        interface=BUS,
        member="Hello",
        destination=BUS,
    )
    return make_message(header)


def echo_message(serial: int, text: str = "hello") -> bytes:
    header = make_header(
        MessageType.METHOD_CALL,
        serial,
        path=PATH,
        interface=ECHO,
        member="Echo",
        destination=ECHO,
        signature="s",
    )
    return make_message(header, (text,))


def read_until(sock: socket.socket, what: bytes) -> bytes:
    """Return all that comes, once these bytes are in it."""
    data = b""
    while what not in data:
        more = sock.recv(65536)
        assert more, data
        data += more
    return data
