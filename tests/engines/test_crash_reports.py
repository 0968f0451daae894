import os
import signal
from pathlib import Path

import pytest

from broker.control_protocol.trace_file import FROM_APP, SIZE, RecordedHeader
from broker.engines.crash_reports import MAX_CRASHES, TRACE, keep_crash, last_crash
from tests.gate.test_recorder import make_call


def write_trace(folder: Path) -> None:
    ring = bytearray(SIZE)
    RecordedHeader(1, 1e9, FROM_APP, "c1").write(memoryview(ring), 0, make_call(), 0)
    (folder / TRACE).write_bytes(ring)


def records(folder: Path) -> list[Path]:
    return sorted(folder.glob("gate-crash-*"))


def test_a_crash_is_on_record_with_its_last_messages(tmp_path: Path) -> None:
    write_trace(tmp_path)
    line = keep_crash(tmp_path, 42, signal.SIGSEGV, 1e9)
    (record,) = records(tmp_path)
    first, message = record.read_text().splitlines()
    assert first == "the gate (process 42) was killed by SIGSEGV at 2001-09-09 01:46:40 UTC"
    assert message.startswith("01:46:40.000000 'c1' app to bus method_call serial=7")
    assert line == f"{first}; the headers of its last messages are in {record}"
    assert last_crash(tmp_path) == f"{first}: {record}"
    assert not (tmp_path / TRACE).exists()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (signal.SIGKILL, "was killed by SIGKILL"),
        (63, "was killed by signal 63"),
        (3 << 8, "exited with 3"),
        (None, "only the supervisor that started it knows how"),
    ],
)
def test_how_it_ended_is_said(tmp_path: Path, status: int | None, words: str) -> None:
    assert words in keep_crash(tmp_path, 42, status, 1e9)


def test_the_newest_stay(tmp_path: Path) -> None:
    for number in range(MAX_CRASHES + 3):
        keep_crash(tmp_path, number, 0, 1e9 + number)
    assert len(records(tmp_path)) == MAX_CRASHES
    assert f"process {MAX_CRASHES + 2})" in last_crash(tmp_path)


def test_nothing_on_record_is_no_line(tmp_path: Path) -> None:
    assert last_crash(tmp_path) == ""
    (tmp_path / "gate-crash-x.txt").mkdir()
    assert last_crash(tmp_path) == ""


def test_where_nothing_can_be_written_it_is_only_said(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    assert keep_crash(folder, 42, 0, 1e9).endswith("UTC")


@pytest.mark.parametrize("trace", [b"", os.urandom(SIZE), b"\xff" * SIZE])
def test_whatever_is_in_the_trace_there_is_a_record(tmp_path: Path, trace: bytes) -> None:
    (tmp_path / TRACE).write_bytes(trace)
    keep_crash(tmp_path, 42, 0, 1e9)
    assert "process 42" in last_crash(tmp_path)
