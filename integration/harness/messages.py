"""Whole messages for tests: made from header fields and values, and taken apart again."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from broker.wire.header import Header, MessageType, serialise_header
from integration.harness.values import decode, encode


class Message(NamedTuple):
    """A message that came in. Its descriptors are the test's to close."""

    header: Header
    body: bytes
    fds: list[int]

    @property
    def values(self) -> tuple[Any, ...]:
        return decode(self.header.signature or "", self.body)

    @property
    def error(self) -> str | None:
        """The error's name, if it is one."""
        return self.header.error_name if self.header.type == MessageType.ERROR else None


def make_header(
    kind: MessageType,
    serial: int,
    *,
    flags: int = 0,
    path: str | None = None,
    interface: str | None = None,
    member: str | None = None,
    error_name: str | None = None,
    reply_serial: int | None = None,
    destination: str | None = None,
    signature: str = "",
    unix_fds: int = 0,
) -> Header:
    """Return a little-endian header, whose body length is set by `make_message`."""
    return Header(
        little=True,
        type=kind,
        flags=flags,
        body_length=0,
        serial=serial,
        path=path,
        interface=interface,
        member=member,
        error_name=error_name,
        destination=destination,
        sender=None,
        signature=signature,
        reply_serial=reply_serial,
        unix_fds=unix_fds,
        reply_serial_at=-1,
        has_unknown=False,
        size=0,
    )


def make_message(header: Header, values: Sequence[Any] = ()) -> bytes:
    """Return the whole message."""
    body = encode(header.signature or "", values)
    head = bytearray(serialise_header(header))
    head[4:8] = len(body).to_bytes(4, "little")
    return bytes(head) + body
