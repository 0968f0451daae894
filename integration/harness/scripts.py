"""What a client says, byte for byte: for tests that write handshakes and messages themselves."""

import contextlib
import os
import re
import socket
from pathlib import Path
from typing import Final

from broker.wire.header import MessageType
from integration.harness.messages import make_header, make_message
from integration.harness.rawclient import BUS, BUS_PATH, RawClient, connect_socket
from integration.harness.service import ECHO, PATH
from integration.harness.supervised import Sandbox, Warden

_LEDGER: Final = re.compile(r"/sandboxed-names-[0-9a-f]{32}$")


def open_fds(warden: Warden) -> int:
    """Return how many descriptors the gate has, but for the ledger of each bus.

    The gate opens a ledger at the first Hello, because its name is the id of the bus, and keeps it open. A second
    descriptor of the same ledger counts, and so does a ledger that was removed.
    """
    files = []
    for entry in Path(f"/proc/{warden.gate_pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            files.append(str(entry.readlink()))
    ledgers = {file for file in files if _LEDGER.search(file)}
    return len(files) - len(ledgers)


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


def patched(at: int, value: int) -> bytes:
    data = bytearray(echo_message(7))
    data[at] = value
    return bytes(data)


def twice_destination() -> bytes:
    data = bytearray(echo_message(7))
    length = int.from_bytes(data[12:16], "little")
    padded = length + 7 & ~7
    field = b"\x06\x01s\0\x05\0\0\0a.b.c\0"
    new = data[: 16 + padded] + field
    new[12:16] = (padded + len(field)).to_bytes(4, "little")
    return bytes(new + bytes(-len(new) % 8) + data[16 + padded :])


def with_path(path: str) -> bytes:
    header = make_header(
        MessageType.METHOD_CALL, 7, path=path, interface=ECHO, member="Echo", destination=ECHO
    )
    return make_message(header)


def with_text(interface: str = ECHO, member: str = "Echo", destination: str = ECHO) -> bytes:
    header = make_header(
        MessageType.METHOD_CALL,
        7,
        path=PATH,
        interface=interface,
        member=member,
        destination=destination,
    )
    return make_message(header)
