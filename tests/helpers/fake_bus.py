"""A message bus in this process: enough of one for connections of ours to talk to each other.

It answers Hello, RequestName, NameHasOwner, GetConnectionCredentials and the match calls, delivers messages by
unique or well-known name, and broadcasts every signal to everybody. `keep_fields` makes it pass on
header fields that it does not know, as dbus-broker does.
"""

import array
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import trio

from broker.bus.values import Variant, pack, unpack
from broker.wire.header import (
    FIXED_SIZE,
    Header,
    MessageType,
    measure,
    parse_header,
    serialise_header,
)
from broker.wire.sasl import SaslServer

GUID: Final = "0123456789abcdef" * 2
DRIVER: Final = "org.freedesktop.DBus"
_FDS: Final = socket.CMSG_SPACE(64 * 4)


@dataclass
class FakeBus:
    """Everything there is on it."""

    address: str
    keep_fields: bool = False
    id: str = GUID
    taken: set[str] = field(default_factory=set)  # names that somebody else has
    users: dict[str, int] = field(default_factory=dict)  # of clients, if not ours
    clients: dict[str, trio.socket.SocketType] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    calls: list[tuple[str, list[Any]]] = field(default_factory=list)  # to the bus itself
    greeting: Callable[[str], str] = lambda name: name
    serial: int = 0
    count: int = 0  # of connections so far

    async def serve(self, sock: trio.socket.SocketType) -> None:
        """Serve a client to its end."""
        self.count += 1
        name = f":1.{self.count}"
        with sock:
            try:
                rest = await self._authenticate(sock)
                self.clients[name] = sock
                await self._read(sock, name, rest)
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                pass
            await self._forget(name)

    async def _authenticate(self, sock: trio.socket.SocketType) -> bytes:
        server = SaslServer(GUID)
        while not server.done:
            data = await sock.recv(1)
            if not data:
                raise BrokenPipeError
            await sock.send(server.feed(data) or b"")
        return server.leftover

    async def _read(self, sock: trio.socket.SocketType, name: str, rest: bytes) -> None:
        buffer, fds = bytearray(rest), list[int]()
        while True:
            while len(buffer) >= FIXED_SIZE and len(buffer) >= (length := measure(buffer)):
                message = bytes(buffer[:length])
                del buffer[:length]
                header = parse_header(message)
                mine = [fds.pop(0) for _ in range(header.unix_fds)]
                await self._route(name, header, message, mine)
                for fd in mine:
                    os.close(fd)
            data, ancillary, _, _ = await sock.recvmsg(65536, _FDS)
            if not data:
                return
            buffer += data
            for _, _, raw in ancillary:
                fds += array.array("i", raw)

    async def _route(self, name: str, header: Header, message: bytes, fds: Sequence[int]) -> None:
        body = message[header.size :]
        if header.destination == DRIVER:
            await self._drive(name, header, unpack(header.signature, body))
            return
        extra = {10: ("o", "/")} if self.keep_fields and header.has_unknown else {}
        stamped = serialise_header(replace(header, sender=name), sender=True, extra=extra) + body
        if header.destination is None:
            for sock in list(self.clients.values()):
                await send(sock, stamped)
            return
        owner = self.owners.get(header.destination, header.destination)
        if owner in self.clients:
            await send(self.clients[owner], stamped, fds)

    async def _drive(self, name: str, header: Header, values: list[Any]) -> None:
        assert header.member is not None
        self.calls.append((header.member, values))
        if header.flags & 1:
            return
        signature, result = self._result(name, header.member, values)
        kind = MessageType.ERROR if signature == "!" else MessageType.METHOD_RETURN
        body = pack("s" if signature == "!" else signature, result)
        reply = Header(
            little=True,
            type=kind,
            flags=1,
            body_length=len(body),
            serial=self._next(),
            error_name=f"{DRIVER}.Error.NameHasNoOwner" if signature == "!" else None,
            reply_serial=header.serial,
            destination=name,
            sender=DRIVER,
            signature="s" if signature == "!" else signature,
        )
        await send(self.clients[name], serialise_header(reply, sender=True) + body)

    def _result(  # noqa: PLR0911 - a table
        self, name: str, member: str, values: list[Any]
    ) -> tuple[str, list[Any]]:
        match member:
            case "Hello":
                return "s", [self.greeting(name)]
            case "RequestName":
                if values[0] in self.taken:
                    return "u", [3]
                self.owners[values[0]] = name
                return "u", [1]
            case "GetId":
                return "s", [self.id]
            case "NameHasOwner":
                return "b", [values[0] in self.clients or values[0] in self.owners]
            case "GetConnectionCredentials" if values[0] in self.clients:
                return "a{sv}", [{"UnixUserID": Variant("u", os.geteuid())}]
            case "GetConnectionUnixUser" if values[0] in self.clients:
                return "u", [self.users.get(values[0], os.geteuid())]
            case "GetConnectionCredentials" | "GetConnectionUnixUser":
                return "!", [f"nobody is {values[0]}"]
            case _:
                return "", []

    async def _forget(self, name: str) -> None:
        self.clients.pop(name, None)
        body = pack("sss", [name, name, ""])
        header = Header(
            little=True,
            type=MessageType.SIGNAL,
            flags=1,
            body_length=len(body),
            serial=self._next(),
            path="/org/freedesktop/DBus",
            interface=DRIVER,
            member="NameOwnerChanged",
            sender=DRIVER,
            signature="sss",
        )
        for sock in list(self.clients.values()):
            await send(sock, serialise_header(header, sender=True) + body)

    def _next(self) -> int:
        self.serial += 1
        return self.serial


async def send(sock: trio.socket.SocketType, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send a whole message, if somebody is there."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        while data:
            sent = await sock.sendmsg([data], ancillary)
            ancillary = []
            data = data[sent:]
    except (OSError, trio.ClosedResourceError):
        pass


@asynccontextmanager
async def open_fake_bus(folder: Path, *, name: str = "bus") -> AsyncIterator[FakeBus]:
    """Run a bus for as long as the block."""
    path = folder / name
    bus = FakeBus(address=f"unix:path={path}")
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    await listening.bind(str(path))
    listening.listen(16)

    async def accept(nursery: trio.Nursery) -> None:
        while True:
            sock, _ = await listening.accept()
            nursery.start_soon(bus.serve, sock)

    with listening:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept, nursery)
            yield bus
            nursery.cancel_scope.cancel()
