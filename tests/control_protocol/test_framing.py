"""Frames between supervisor and gate: whole, in pieces, with descriptors, broken."""

import itertools
import struct

import msgspec
import pytest
from hypothesis import given, strategies as st

from broker.control_protocol.framing import LOST, MAX_FRAME, FrameReader, make_frame
from broker.control_protocol.messages import (
    AddSandbox,
    Answer,
    BusSpec,
    CallBus,
    Called,
    Confirm,
    Connected,
    ContainerServer,
    ContainerServerLost,
    Denied,
    Done,
    Ended,
    Envelope,
    Event,
    Gone,
    Listener,
    Listeners,
    Refused,
    Request,
    RequestInstanceField,
    SandboxLimits,
    SandboxOf,
    SandboxSpec,
    SandboxState,
    SetAccess,
    SetBuses,
    SetContainerServer,
    Shutdown,
    Snapshot,
    StopListening,
    StopSandbox,
    TakeListeners,
    TakeSnapshot,
    TakeUsage,
    Usage,
    WhoIs,
)
from broker.wire.errors import PeerProtocolError
from policy.rules import Identity
from tests.helpers.messages import access

SPEC = SandboxSpec(
    id="c1",
    identity=Identity(type="org.test", app="me", component="x"),
    uid=1000,
    listeners=(Listener(bus="session", fd=0, path="/run/x", device=1, inode=2),),
    access=access("send:org.a", deny=["see:org.b"], receive_from_host=False),
    close_notify=1,
    limits=SandboxLimits(names=3),
)
BUS = BusSpec(name="session", address="unix:path=/x")
STATE = SandboxState(
    spec=SPEC, listening=True, connections=(("session", ":1.5"),), opening=1, denied=2
)
BODIES: list[Request | Answer | Event] = [
    SetBuses((BUS,)),
    AddSandbox(SPEC),
    SetAccess("c1", access("own:org.me")),
    StopListening("c1"),
    StopSandbox("c1"),
    StopSandbox("c1", "process-ended"),
    WhoIs("session", ":1.5"),
    RequestInstanceField("session", ":1.5"),
    RequestInstanceField("session", ":1.5", wanted=False),
    TakeListeners(("c1", "c2")),
    Confirm(),
    TakeSnapshot(),
    TakeUsage("c1"),
    TakeUsage(),
    CallBus(bus="session", uid=7, interface="org.x.I", member="M", body=b"x", undo="Stop"),
    SetContainerServer("c1", "session", ContainerServer(instance="/i", address="unix:path=/i")),
    SetContainerServer("c1", "session", None),
    Shutdown(),
    Done(),
    Called(signature="s", body=b"y", little=True),
    Refused("a.b", "text"),
    SandboxOf(None),
    Listeners((("c1", "session"), ("c1", ""))),
    Usage(connections=1, fds=2) + Usage(fds=3),
    Snapshot(protocol=1, pid=2, buses=(BUS,), sandboxes=(STATE,)),
    Connected("c1", "session", ":1.5"),
    Gone("c1", "session", ":1.5"),
    Ended("c1", "stopped"),
    ContainerServerLost("c1", "session"),
    Denied(sandbox="c1", bus="session", direction="send", kind="call", peer="org.a", more=4),
]
ENVELOPES = [Envelope(serial=n, body=body, number=n % 3) for n, body in enumerate(BODIES)]
STREAM = b"".join(map(make_frame, ENVELOPES))


@pytest.mark.parametrize("envelope", ENVELOPES, ids=lambda each: type(each.body).__name__)
def test_what_is_framed_is_read(envelope: Envelope) -> None:
    assert FrameReader().feed(make_frame(envelope)) == [(envelope, [])]


@given(st.sets(st.integers(1, len(STREAM) - 1), max_size=20))
def test_frames_do_not_depend_on_how_they_are_cut(cuts: set[int]) -> None:
    reader = FrameReader()
    places = [0, *sorted(cuts), len(STREAM)]
    got = []
    for start, end in itertools.pairwise(places):
        got += reader.feed(STREAM[start:end])
    assert [envelope for envelope, _ in got] == ENVELOPES


def test_frames_are_read_byte_by_byte() -> None:
    reader = FrameReader()
    got = [item for n in range(len(STREAM)) for item in reader.feed(STREAM[n : n + 1])]
    assert [envelope for envelope, _ in got] == ENVELOPES


def test_descriptors_go_to_the_envelopes_that_name_them() -> None:
    reader = FrameReader()
    frames = [make_frame(Envelope(serial=n, body=Done(), fds=n)) for n in (1, 0, 2)]
    got = reader.feed(b"".join(frames), [5, 6, 7, 8])
    assert [fds for _, fds in got] == [[5], [], [6, 7]]
    assert reader.take_all_fds() == [8]
    assert reader.take_all_fds() == []


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(struct.pack("<I", MAX_FRAME + 1), id="too-long"),
        pytest.param(struct.pack("<I", 3) + b"\xc1\xc1\xc1", id="no-msgpack"),
        pytest.param(struct.pack("<I", 1) + b"\x80", id="no-envelope"),
        pytest.param(
            struct.pack("<I", 17) + b"\x81\xa4body\x81\xa4type\xa4" + b"\xff" * 4, id="no-utf-8"
        ),
        pytest.param(struct.pack("<I", 5002) + b"\x81\xa0" + b"\x91" * 5000, id="too-deep"),
        pytest.param(make_frame(Envelope(serial=1, body=Done(), fds=2)), id="too-few-fds"),
        pytest.param(make_frame(Envelope(serial=1, body=Done(), fds=-1)), id="negative-fds"),
    ],
)
def test_broken_frame_is_an_error(frame: bytes) -> None:
    reader = FrameReader()
    with pytest.raises(PeerProtocolError, match="control frame"):
        reader.feed(frame, [5])
    assert reader.take_all_fds() == [5]


@given(st.binary(max_size=200))
def test_garbage_gives_envelopes_or_a_protocol_error(data: bytes) -> None:
    try:
        FrameReader().feed(struct.pack("<I", len(data)) + data)
    except PeerProtocolError:
        return


def test_unknown_message_is_an_error() -> None:
    body = msgspec.msgpack.encode({"serial": 1, "body": {"type": "Nonsense"}})
    with pytest.raises(PeerProtocolError, match="Nonsense"):
        FrameReader().feed(struct.pack("<I", len(body)) + body)


def test_an_older_supervisor_gives_no_reason_for_a_stop() -> None:
    body = msgspec.msgpack.encode({"serial": 1, "body": {"type": "StopSandbox", "sandbox": "c1"}})
    ((envelope, _),) = FrameReader().feed(struct.pack("<I", len(body)) + body)
    assert envelope.body == StopSandbox("c1", "stopped")


def test_attack_c9_descriptors_that_did_not_fit_are_said_of_their_envelope() -> None:
    first, second = (make_frame(Envelope(serial=n, body=Done(), fds=2)) for n in (1, 2))
    plain = make_frame(Envelope(serial=3, body=Done()))
    reader = FrameReader()
    found = reader.feed(plain + first[:5], cut=True)
    found += reader.feed(first[5:] + plain)
    found += reader.feed(second, [7, 8])
    assert [(envelope.serial, envelope.fds, fds) for envelope, fds in found] == [
        (3, 0, []),
        (1, LOST, []),
        (3, 0, []),
        (2, 2, [7, 8]),
    ]
    reader.feed(b"", [5], cut=True)
    assert reader.rest() == (b"", (5,))
    assert reader.take_all_fds() == [5]
