from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, strategies as st

from broker.control_protocol.trace_file import (
    FROM_APP,
    FROM_BUS,
    SIZE,
    SLOT,
    SLOTS,
    Entry,
    RecordedHeader,
    describe,
    read_rings,
)
from broker.gate import recorder
from broker.gate.filter.filter import pass_on
from broker.gate.recorder import HeaderRecorder
from broker.wire.errors import PeerProtocolError
from broker.wire.header import Header, MessageType, parse_header, serialise_header

if TYPE_CHECKING:
    from broker.gate.output import Output


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
    recorder.trace_into(path)
    yield path
    recorder.trace_into(None)


def test_headers_are_written_and_bodies_not(traced: Path) -> None:
    first, second = make_call(body=b"secret"), make_call("/b")
    data = b"before" + first + second
    assert HeaderRecorder("c1").parse_from_app(data, 6).path == "/a"
    assert HeaderRecorder("c22").parse_from_bus(data, 6 + len(first)).path == "/b"
    assert b"secret" not in traced.read_bytes()
    entries = read_rings(traced.read_bytes())
    assert [(e.sandbox, e.direction) for e in entries] == [("c1", FROM_APP), ("c22", FROM_BUS)]
    assert first.startswith(entries[0].header)
    assert entries[0].when <= entries[1].when
    assert describe(entries[0]) == (
        "'c1' app to bus method_call serial=7 body=6 fds=0"
        " destination='org.example.D' path='/a' interface='org.example.I' member='Do'"
    )


def test_the_newest_stay_in_order(traced: Path) -> None:
    for number in range(SLOTS + 10):
        HeaderRecorder(f"c{number}").parse_from_app(make_call(), 0)
    entries = read_rings(traced.read_bytes())
    assert [e.sandbox for e in entries] == [f"c{n}" for n in range(10, SLOTS + 10)]
    assert traced.stat().st_size == SIZE
    assert traced.stat().st_mode & 0o777 == 0o600


def test_a_message_that_breaks_the_protocol_is_on_record(traced: Path) -> None:
    with pytest.raises(PeerProtocolError):
        HeaderRecorder("c1").parse_from_app(b"l\x09" + bytes(14), 0)
    (entry,) = read_rings(traced.read_bytes())
    assert describe(entry).endswith((b"l\x09" + bytes(14)).hex())


def test_another_gate_gets_a_file_of_its_own(traced: Path) -> None:
    HeaderRecorder("c1").parse_from_app(make_call(), 0)
    with traced.open("rb") as old:
        recorder.trace_into(traced)
        HeaderRecorder("c2").parse_from_app(make_call(), 0)
        assert [e.sandbox for e in read_rings(old.read())] == ["c1"]
    assert [e.sandbox for e in read_rings(traced.read_bytes())] == ["c2"]
    assert [path.name for path in traced.parent.iterdir()] == ["gate-trace"]


def test_without_a_file_nothing_is_written(tmp_path: Path) -> None:
    assert HeaderRecorder("c1").parse_from_app(make_call(), 0).member == "Do"
    assert HeaderRecorder("c1").parse_from_bus(make_call(little=False), 0).member == "Do"
    HeaderRecorder("c1").note_from_app(make_call(), 0, 16)
    with pytest.raises(FileNotFoundError):
        recorder.trace_into(tmp_path / "not" / "there")


def test_known_messages_are_on_record_and_drive_no_others_out(traced: Path) -> None:
    HeaderRecorder("c1").parse_from_app(make_call("/first"), 0)
    note = HeaderRecorder("c2").note_from_bus
    for number in range(SLOTS + 10):
        data = b"before" + make_call(f"/n{number}", body=b"secret")
        note(data, 6, len(data) - 6 - len(b"secret"))
    HeaderRecorder("c3").parse_from_app(make_call("/last"), 0)
    assert b"secret" not in traced.read_bytes()
    first, *known, last = read_rings(traced.read_bytes())
    assert (first.sandbox, last.sandbox) == ("c1", "c3")
    assert not first.is_known
    assert len(known) == SLOTS
    assert all(entry.is_known and entry.sandbox == "c2" for entry in known)
    assert describe(known[-1]) == (
        "'c2' bus to app known method_call serial=7 body=6 fds=0"
        f" destination='org.example.D' path='/n{SLOTS + 9}' interface='org.example.I' member='Do'"
    )


def test_run_of_known_messages_is_passed_on_and_its_first_on_record(traced: Path) -> None:
    out: Output = []
    first, second = make_call("/a"), make_call("/b")
    pass_on(
        out, HeaderRecorder("c1").note_from_app, b"x" + first + second, 1, 1 + len(first + second)
    )
    assert out == [first + second]
    assert [first.startswith(entry.header) for entry in read_rings(traced.read_bytes())] == [True]


def test_a_long_known_header_is_cut_to_its_slot(traced: Path) -> None:
    long, short = make_call("/" + "x" * 2000), make_call()
    note = HeaderRecorder("c1").note_from_app
    for data in (long, short):
        note(data, 0, len(data))
    cut, whole = read_rings(traced.read_bytes())
    assert long.startswith(cut.header)
    assert "cut short" in describe(cut)
    assert whole.header == short


def test_a_long_header_is_cut_to_its_slot() -> None:
    ring = bytearray(SIZE)
    RecordedHeader(5, 1.0, FROM_APP, "c1").write(
        memoryview(ring), 5 * SLOT, make_call("/" + "x" * 2000), 0
    )
    assert not any(ring[: 5 * SLOT])
    assert not any(ring[6 * SLOT :])
    (entry,) = read_rings(bytes(ring))
    assert len(entry.header) < SLOT
    assert describe(entry).startswith("'c1' app to bus")


@given(st.binary(max_size=2 * SLOT))
def test_any_bytes_are_a_list(data: bytes) -> None:
    for entry in read_rings(data):
        assert describe(entry).isprintable()


@given(st.binary(max_size=100))
def test_what_is_said_of_a_message_is_printable(header: bytes) -> None:
    entry = Entry(number=1, when=0.0, direction=FROM_BUS, sandbox="c1\n", header=header)
    assert describe(entry).isprintable()
    assert parse_header(make_call()).member == "Do"
