"""Messages and rules for tests of the gate, in few words."""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from broker.wire import marshal
from broker.wire.header import Flag, Header, MessageType, measure, parse_header, serialise_header
from broker.wire.interfaces import DRIVER, DRIVER_PATH
from broker.wire.marshal import Value
from policy.rules import AccessList
from policy.text import parse_rule

NO_REPLY: Final = int(Flag.NO_REPLY_EXPECTED)


@dataclass(frozen=True, kw_only=True)
class Message:
    """What went past: its header, and its body if it is of the types that are read here."""

    header: Header
    raw: bytes
    fds: tuple[int, ...] = ()

    @property
    def body(self) -> tuple[Value, ...]:
        raw = self.raw[self.header.size :]
        return marshal.read_body(self.header.signature, raw, little=self.header.little)

    @property
    def text(self) -> str:
        """Return it in short, as `call Ping` or `error AccessDenied`."""
        header = self.header
        if header.type == MessageType.ERROR:
            return f"error {(header.error_name or '').rpartition('.')[2]}"
        return {
            MessageType.METHOD_CALL: f"call {header.member}",
            MessageType.METHOD_RETURN: "return",
            MessageType.SIGNAL: f"signal {header.member}",
        }.get(MessageType(header.type), "other")


def names(messages: Iterable[Message]) -> list[str]:
    """Return them in short."""
    return [message.text for message in messages]


def call(
    serial: int,
    destination: str | None,
    member: str = "Do",
    *,
    path: str = "/",
    interface: str | None = "org.example.I",
    signature: str = "",
    values: Sequence[Value] = (),
    flags: int = 0,
) -> bytes:
    return marshal.make_call(
        serial,
        destination=destination,
        path=path,
        interface=interface,
        member=member,
        signature=signature,
        values=values,
        flags=flags,
    )


def driver_call(
    serial: int, member: str, signature: str = "", *values: Value, flags: int = 0
) -> bytes:
    return call(
        serial,
        DRIVER,
        member,
        path=DRIVER_PATH,
        interface=DRIVER,
        signature=signature,
        values=values,
        flags=flags,
    )


def signal(
    serial: int,
    member: str = "Changed",
    *,
    destination: str | None = None,
    sender: str | None = None,
    path: str = "/",
    interface: str = "org.example.I",
    values: Sequence[str] = (),
) -> bytes:
    return marshal.make_signal(
        serial,
        path=path,
        interface=interface,
        member=member,
        destination=destination,
        sender=sender,
        signature="s" * len(values),
        values=values,
    )


def big(message: bytes) -> bytes:
    """Return a message (with a body of one string at the most) in the other byte order."""
    header = parse_header(message)
    body = message[header.size :]
    assert header.signature in ("", "s")
    if body:
        (length,) = struct.unpack_from("<I", body)
        body = struct.pack(">I", length) + body[4:]
    return serialise_header(replace(header, little=False), sender=True) + body


def changed(
    message: bytes, *, extra: dict[int, tuple[str, str]] | None = None, **change: object
) -> bytes:
    """Return a message with other header fields."""
    header = replace(parse_header(message), **change)  # type: ignore[arg-type]
    body = message[parse_header(message).size :]
    return serialise_header(header, sender=True, extra=extra or {}) + body


def misplaced(message: bytes, path: str) -> bytes:
    """Return a little-endian message with a PATH in front of its fields, which no serialiser of ours writes in a reply."""
    raw = path.encode()
    field = b"\1\1o\0" + struct.pack("<I", len(raw)) + raw + b"\0"
    field += bytes(-len(field) % 8)
    (length,) = struct.unpack_from("<I", message, 12)
    return message[:12] + struct.pack("<I", length + len(field)) + field + message[16:]


def split(data: bytes) -> list[bytes]:
    """Return the messages of a stream."""
    found = []
    at = 0
    while at < len(data):
        size = measure(data, at)
        found.append(data[at : at + size])
        at += size
    return found


def access(*rules: str, deny: Iterable[str] = (), receive_from_host: bool = True) -> AccessList:
    """Return the list of rules as people write them."""
    allowed = [parse_rule(text, origin="test") for text in rules]
    denied = [parse_rule(text, deny=True, origin="test-deny") for text in deny]
    return AccessList(rules=(*allowed, *denied), receive_from_host=receive_from_host)


def make_reply(to: Message, *, sender: str, destination: str, serial: int = 500) -> bytes:
    """Return the answer to a message that went past."""
    return marshal.make_return(
        serial, reply_serial=to.header.serial, destination=destination, sender=sender
    )
