from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from broker.gate import trace
from broker.wire.errors import PeerProtocolError
from broker.wire.header import Header, MessageType, parse_header, serialise_header
from broker.wire.trace import (
    FROM_APP,
    FROM_BUS,
    SIZE,
    SLOT,
    SLOTS,
    Entry,
    Note,
    describe,
    read_ring,
)


def make_call(path: str = "/a", body: bytes = b"", *, little: bool = True) -> bytes:
    header = Header(
        little=little,
        type=MessageType.METHOD_CALL,
        flags=0,
        body_length=len(body),
        serial=7,
        path=path,
        interface="org.example.I",
        member="Do",
        destination="org.example.D",
        signature="s" if body else "",
    )
    return serialise_header(header) + body


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "gate-trace"
    trace.trace_into(path)
    yield path
    trace.trace_into(None)


def test_headers_are_written_and_bodies_not(traced: Path) -> None:
    first, second = make_call(body=b"secret"), make_call("/b")
    data = b"before" + first + second
    assert trace.parse_from_app("c1", data, 6).path == "/a"
    assert trace.parse_from_bus("c22", data, 6 + len(first)).path == "/b"
    assert b"secret" not in traced.read_bytes()
    entries = read_ring(traced.read_bytes())
    assert [(e.sandbox, e.direction) for e in entries] == [("c1", FROM_APP), ("c22", FROM_BUS)]
    assert first.startswith(entries[0].header)
    assert entries[0].when <= entries[1].when
    assert describe(entries[0]) == (
        "'c1' app to bus method_call serial=7 body=6 fds=0"
        " destination='org.example.D' path='/a' interface='org.example.I' member='Do'"
    )


def test_the_newest_stay_in_order(traced: Path) -> None:
    for number in range(SLOTS + 10):
        trace.parse_from_app(f"c{number}", make_call(), 0)
    entries = read_ring(traced.read_bytes())
    assert [e.sandbox for e in entries] == [f"c{n}" for n in range(10, SLOTS + 10)]
    assert traced.stat().st_size == SIZE
    assert traced.stat().st_mode & 0o777 == 0o600


def test_a_message_that_breaks_the_protocol_is_on_record(traced: Path) -> None:
    with pytest.raises(PeerProtocolError):
        trace.parse_from_app("c1", b"l\x09" + bytes(14), 0)
    (entry,) = read_ring(traced.read_bytes())
    assert describe(entry).endswith((b"l\x09" + bytes(14)).hex())


def test_another_gate_gets_a_file_of_its_own(traced: Path) -> None:
    trace.parse_from_app("c1", make_call(), 0)
    with traced.open("rb") as old:
        trace.trace_into(traced)
        trace.parse_from_app("c2", make_call(), 0)
        assert [e.sandbox for e in read_ring(old.read())] == ["c1"]
    assert [e.sandbox for e in read_ring(traced.read_bytes())] == ["c2"]
    assert [path.name for path in traced.parent.iterdir()] == ["gate-trace"]


def test_without_a_file_nothing_is_written(tmp_path: Path) -> None:
    assert trace.parse_from_app("c1", make_call(), 0).member == "Do"
    assert trace.parse_from_bus("c1", make_call(little=False), 0).member == "Do"
    with pytest.raises(FileNotFoundError):
        trace.trace_into(tmp_path / "not" / "there")


def test_a_long_header_is_cut_to_its_slot() -> None:
    ring = bytearray(SIZE)
    Note(5, 1.0, FROM_APP, "c1").write(memoryview(ring), make_call("/" + "x" * 2000), 0)
    assert not any(ring[: 5 * SLOT])
    assert not any(ring[6 * SLOT :])
    (entry,) = read_ring(bytes(ring))
    assert len(entry.header) < SLOT
    assert describe(entry).startswith("'c1' app to bus")


@given(st.binary(max_size=2 * SLOT))
def test_any_bytes_are_a_list(data: bytes) -> None:
    for entry in read_ring(data):
        assert describe(entry).isprintable()


@given(st.binary(max_size=100))
def test_what_is_said_of_a_message_is_printable(header: bytes) -> None:
    entry = Entry(number=1, when=0.0, direction=FROM_BUS, sandbox="c1\n", header=header)
    assert describe(entry).isprintable()
    assert parse_header(make_call()).member == "Do"
