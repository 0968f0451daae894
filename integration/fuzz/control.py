"""Control frames give the same envelopes however they are cut, or PeerProtocolError; no descriptor is lost.

The first bytes of an input say in what pieces the rest arrives, and with how many descriptors.
"""

from typing import Final

from broker.control_protocol.framing import FrameReader, make_frame
from broker.control_protocol.messages import (
    AddSandbox,
    Answer,
    BusSpec,
    Denied,
    Envelope,
    Event,
    Listener,
    Request,
    SandboxSpec,
    SetAccess,
    SetBuses,
    TakeUsage,
    Usage,
    WhoIs,
)
from broker.wire.errors import PeerProtocolError
from integration.fuzz.pieces import Choices, cut
from policy.rules import AccessList, Identity
from policy.text import parse_rule

_MAX_FDS: Final = 4
Item = tuple[Envelope, list[int]]


def check(data: bytes) -> None:
    """Hold the invariant."""
    choices = Choices(data)
    fds = list(range(choices.byte() % _MAX_FDS))
    sizes = list(choices.take(3))
    stream = choices.rest()
    pieces, pieces_failed = read(cut(stream, sizes), fds)
    items, failed = read([stream[n : n + 1] for n in range(len(stream))], fds)
    assert pieces_failed is failed
    # What is whole when a later frame in the same piece is broken, is lost with it.
    assert pieces == items[: len(pieces)]
    assert failed or pieces == items
    for envelope, _ in items:
        claimed = list(range(envelope.fds))
        assert read([make_frame(envelope)], claimed) == ([(envelope, claimed)], False)


def read(parts: list[bytes], fds: list[int]) -> tuple[list[Item], bool]:
    """Return what a reader finds in a stream, and whether it failed. Descriptors come first."""
    reader = FrameReader()
    items = reader.feed(b"", fds)
    try:
        for part in parts:
            items += reader.feed(part)
    except PeerProtocolError:
        return items, True
    assert [fd for _, claimed in items for fd in claimed] + reader.take_all_fds() == fds
    return items, False


def seeds() -> list[bytes]:
    """Return a stream of frames, and frames that are wrong."""
    access = AccessList(rules=(parse_rule("send:org.a@/a:org.i.M,peer=host", origin="x"),))
    spec = SandboxSpec(
        id="c1",
        identity=Identity(type="io.snap", app="a", component="b"),
        uid=1000,
        listeners=(Listener(bus="session", fd=0, path="/run/x"),),
        access=access,
        close_notify=1,
    )
    denied = Denied(sandbox="c1", bus="session", direction="send", kind="call", peer="org.a")
    bodies: tuple[Request | Answer | Event, ...] = (
        SetBuses((BusSpec(name="session", address="unix:path=/x"),)),
        SetAccess("c1", access),
        TakeUsage(),
        WhoIs("session", ":1.7"),
        denied,
        Usage(connections=3),
    )
    stream = b"".join(make_frame(Envelope(serial=n, body=body)) for n, body in enumerate(bodies))
    added = make_frame(Envelope(serial=9, body=AddSandbox(spec), fds=2))
    return [
        b"\0\7\0\60" + stream,
        b"\2\1\1\1" + added,
        b"\1\0\0\0" + added,
        b"\0\0\0\0\1\0\0\0\300",
    ]
