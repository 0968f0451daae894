"""The bus at the other end of the gate's own connection: a socket pair, and a driver that a test chooses."""

import socket
from dataclasses import dataclass, field
from typing import Any

from broker.bus.values import pack, unpack
from broker.wire.errors import CallRefusedError
from broker.wire.header import (
    FIXED_SIZE,
    Header,
    MessageType,
    measure,
    parse_header,
    serialise_header,
)
from broker.wire.interfaces import CONTAINERS1, DRIVER, DRIVER_PATH
from broker.wire.sasl import SaslServer
from tests.helpers.fake_driver import FakeDriver

NAME = ":1.7"


@dataclass
class OwnBus:
    """One connection. `turn` answers what has come; in `quiet` it only takes it."""

    driver: FakeDriver = field(default_factory=FakeDriver)
    guid: str = "0123456789abcdef" * 2
    quiet: bool = False
    is_reachable: bool = True
    refuses_hello: bool = False
    serial: int = 0
    calls: list[Header] = field(default_factory=list)
    count: int = 0  # of connections

    def connect(self, _loop: object, _address: str, _uid: int, done: Any) -> None:
        """Stand in for broker.gate.io.connect.connect_unix."""
        self.count += 1
        if not self.is_reachable:
            done(None)
            return
        self.close()
        theirs, self.sock = socket.socketpair()
        self.sock.setblocking(False)
        theirs.setblocking(False)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        self.is_greeting = True
        self.sasl = SaslServer(self.guid)
        self.buffer = bytearray()
        done(theirs)

    def turn(self) -> None:
        """Do what a bus does with what has come."""
        try:
            data = self.sock.recv(1 << 20)
        except (BlockingIOError, ConnectionError):
            return
        if self.is_greeting:
            self.sock.send(self.sasl.feed(data) or b"")
            self.is_greeting = not self.sasl.done
            data = self.sasl.leftover
        self.buffer += data
        while len(self.buffer) >= FIXED_SIZE:
            size = measure(self.buffer)
            message = bytes(self.buffer[:size])
            del self.buffer[:size]
            header = parse_header(message)
            self.calls.append(header)
            if not self.quiet:
                self.take(header, message[header.size :])

    def take(self, header: Header, body: bytes) -> None:
        """Answer a call."""
        member = header.member or ""
        try:
            if self.refuses_hello:
                raise CallRefusedError("org.x.No", "go away")
            hello = {"Hello": ("s", [NAME]), "AddMatch": ("", [])}
            result = hello.get(member) or self.driver.answer(member, unpack(header.signature, body))
        except CallRefusedError as exc:
            self.reply(header, "s", [str(exc)], error=exc.dbus_name)
            return
        if result is not None and not header.flags & 1:
            self.reply(header, *result)

    def reply(self, call: Header, signature: str, values: list[Any], error: str = "") -> None:
        """Answer, with an error if one is named."""
        kind = MessageType.ERROR if error else MessageType.METHOD_RETURN
        self._send(kind, signature, values, error_name=error or None, reply_serial=call.serial)

    def emit_removed(self, instance: str, **fields: Any) -> None:
        """Say that an instance is gone."""
        self.driver.instances.pop(instance, None)
        known = {"path": DRIVER_PATH, "interface": CONTAINERS1, "member": "InstanceRemoved"}
        self._send(MessageType.SIGNAL, "o", [instance], **(known | fields))

    def call(self, **fields: Any) -> None:
        """Call the gate, as somebody on the bus."""
        known = {"path": "/x", "interface": "org.x", "member": "Do", "sender": ":1.9"}
        self._send(MessageType.METHOD_CALL, "", [], **(known | fields))

    def _send(self, kind: int, signature: str, values: list[Any], **fields: Any) -> None:
        body = pack(signature, values) if signature else b""
        self.serial += 1
        header = Header(
            little=True,
            type=kind,
            flags=fields.pop("flags", 1),
            body_length=len(body),
            serial=self.serial,
            destination=NAME,
            signature=signature,
            **({"sender": DRIVER} | fields),
        )
        self.sock.send(serialise_header(header, sender=True) + body)

    def close(self) -> None:
        """Be gone."""
        if hasattr(self, "sock"):
            self.sock.close()
