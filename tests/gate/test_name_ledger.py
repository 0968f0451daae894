"""The ledger of sandboxed names: spans, and a file that the next gate reads."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from broker.gate import name_ledger
from broker.gate.name_ledger import MAX_FILES, NameLedger, Spans

BUS = "a" * 32


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4))))
def test_spans_hold_what_was_added_and_do_not_touch(added: list[tuple[int, int]]) -> None:
    spans, numbers = Spans(), set()
    for first, more in added:
        spans.add(first, first + more)
        numbers |= set(range(first, first + more + 1))
    assert {number for number in range(60) if number in spans} == numbers
    flat = [end for span in spans for end in span]
    assert all(first <= last for first, last in spans)
    assert all(before + 1 < after for before, after in zip(flat[1::2], flat[2::2], strict=False))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4))))
def test_spans_that_are_made_of_many_are_those_added_one_by_one(
    added: list[tuple[int, int]],
) -> None:
    added = [(first, first + more) for first, more in added]
    one_by_one, again = Spans(), Spans()
    for span in added:
        one_by_one.add(*span)
    again.load(one_by_one.dump())
    assert list(Spans(added)) == list(one_by_one) == list(again)


def test_thinning_out_forgets_nobody_and_leaves_the_newer_half() -> None:
    spans = Spans()
    for number in range(0, 64, 2):
        spans.add(number, number)
    spans.thin_out()
    assert len(spans) == 24
    assert all(number in spans for number in range(0, 64, 2))
    assert 1 in spans
    assert [number for number in range(33, 64, 2) if number in spans] == []


def test_more_spans_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_ledger, "MAX_SPANS", 16)
    names = NameLedger()
    for number in range(0, 400, 2):
        names.add(f":1.{number}")
    assert len(names) <= 16
    assert all(f":1.{number}" in names for number in range(0, 400, 2))
    assert ":1.401" not in names


def spans_of(names: NameLedger) -> list[tuple[str, int, int]]:
    found: list[tuple[str, int, int]] = []
    for prefix, dump in names.dump():
        spans = Spans()
        spans.load(dump)
        found.extend((prefix, first, last) for first, last in spans)
    return sorted(found)


def make(folder: Path, bus: str = BUS) -> NameLedger:
    names = NameLedger(folder)
    names.meet(bus)
    return names


@given(
    st.lists(st.sampled_from([":1.0", ":1.1", ":1.2", ":1.7", ":2.1", ":x", ":busd.1", ":1.08"]))
)
def test_the_file_says_the_same(added: list[str]) -> None:
    import tempfile  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        names = make(Path(folder))
        for name in added:
            names.add(name)
        again = make(Path(folder))
        assert {name for name in added if name in again} == set(added)
        assert spans_of(again) == spans_of(names)
        names.close()


def test_names_that_follow_each_other_take_one_line(tmp_path: Path) -> None:
    names = make(tmp_path)
    for number in range(1000):
        names.add(f":1.{number}")
        names.add(f":1.{number}")
    (path,) = tmp_path.iterdir()
    assert path.read_text().count("\n") == 1
    assert path.stat().st_mode & 0o777 == 0o600
    names.close()


def test_a_file_that_repeats_itself_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name_ledger, "MAX_SURPLUS", 8)
    names = make(tmp_path)
    for number in [*range(0, 100, 2), *range(1, 100, 2)]:
        names.add(f":1.{number}")
    (path,) = tmp_path.iterdir()
    assert path.read_text().count("\n") <= 1 + 8
    assert spans_of(make(tmp_path)) == [(":1", 0, 99)]
    names.close()


def test_lines_that_are_not_whole_are_none(tmp_path: Path) -> None:
    names = make(tmp_path)
    names.add(":1.5")
    names.close()
    (path,) = tmp_path.iterdir()
    with path.open("a") as file:
        file.write(f":1 {7:020d} {3:020d}\n:1 {2**63:020d} {2**63:020d}\nx\n:1 0000")
    assert spans_of(make(tmp_path)) == [(":1", 5, 5)]


@pytest.mark.parametrize("how", ["error", "short"])
def test_a_full_disk_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def write(_fd: int, _data: bytes, _at: int) -> int:
        if how == "error":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return 3

    ledger = NameLedger(tmp_path)
    ledger.meet(BUS)
    ledger.add(":1.1")
    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(OSError, match=r"No space left on device: .*sandboxed-names-"):
        ledger.add(":1.5")
    assert ":1.5" not in ledger


def test_what_cannot_be_written_is_an_error_and_not_known(tmp_path: Path) -> None:
    names = make(tmp_path / "missing")
    with pytest.raises(OSError, match="No such file"):
        names.add(":1.5")
    assert ":1.5" not in names


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    names = make(tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("")
    (tmp_path / f"sandboxed-names-{BUS}").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"):
        names.add(":1.5")
    assert not victim.read_text()


def test_another_bus_forgets_all_and_removes_the_file(tmp_path: Path) -> None:
    names = make(tmp_path)
    names.add(":1.5")
    names.move("b" * 32)
    assert ":1.5" not in names
    assert not list(tmp_path.iterdir())
    names.add(":1.6")
    assert [path.name[-32:] for path in tmp_path.iterdir()] == ["b" * 32]
    names.close()


def test_files_of_many_buses_do_not_pile_up(tmp_path: Path) -> None:
    for n in range(MAX_FILES + 5):
        names = make(tmp_path, f"{n:032x}")
        names.add(":1.5")
        names.close()
        path = tmp_path / f"sandboxed-names-{n:032x}"
        os.utime(path, (n, n))
    make(tmp_path)
    assert len(list(tmp_path.iterdir())) == MAX_FILES
    assert not (tmp_path / f"sandboxed-names-{0:032x}").exists()


def test_before_the_bus_is_known_all_files_count(tmp_path: Path) -> None:
    for n, bus in enumerate(("a" * 32, "b" * 32)):
        names = make(tmp_path, bus)
        names.add(f":1.{n}")
        names.close()
    names = NameLedger(tmp_path)
    assert [names.is_doubtful(f":1.{n}") for n in range(3)] == [True, True, False]
    assert ":1.0" not in names
    names.meet("b" * 32)
    assert not any(names.is_doubtful(f":1.{n}") for n in range(3))
    assert [f":1.{n}" in names for n in range(3)] == [False, True, False]


def test_a_gate_that_takes_over_goes_on_in_the_same_file(tmp_path: Path) -> None:
    old = make(tmp_path)
    old.add(":1.5")
    new = NameLedger(tmp_path)
    new.load(BUS, old.dump())
    new.add(":1.6")
    assert spans_of(new) == spans_of(make(tmp_path)) == [(":1", 5, 6)]
    for names in (old, new):
        names.close()


# -- files that are not as they should be ----------------------------------------------------------------


def test_attack_i1_line_that_was_cut_off_takes_the_next_one_not_with_it(tmp_path: Path) -> None:
    path = tmp_path / f"sandboxed-names-{BUS}"
    path.write_text(f":1 {5:020d} {5:020d}\n:1 0000")
    names = make(tmp_path)
    names.add(":1.7")
    names.add(":1.8")
    names.close()
    assert spans_of(make(tmp_path)) == [(":1", 5, 5), (":1", 7, 8)]


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "linked", "secret"])
def test_attack_i1_file_that_is_none_of_ours_stops_no_gate(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / f"sandboxed-names-{BUS}", tmp_path / "other"
    other.write_text(f":1 {5:020d} {5:020d}\n")
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(other)
    elif kind == "linked":
        path.hardlink_to(other)
    else:
        path.write_text("")
        monkeypatch.setattr(name_ledger, "open_file", refuse)
    names = make(tmp_path)
    assert not names.is_doubtful(":1.5")
    assert ":1.5" not in names
    with pytest.raises(OSError, match=r"file|link|another|ermission|directory"):
        names.add(":1.7")
    assert caplog.text.count(f"{path}: ") == 1
    assert other.read_text() == f":1 {5:020d} {5:020d}\n"


def refuse(path: Path, flags: int) -> int:
    raise PermissionError(13, "Permission denied", str(path))


def test_file_that_is_too_long_is_read_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name_ledger, "MAX_FILE", 100)
    path = tmp_path / f"sandboxed-names-{BUS}"
    path.write_text("".join(f":1 {n:020d} {n:020d}\n" for n in range(0, 40, 2)))
    assert spans_of(make(tmp_path)) == [(":1", 36, 36), (":1", 38, 38)]


def test_file_does_not_grow_from_gate_to_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name_ledger, "MAX_SURPLUS", 8)
    monkeypatch.setattr(name_ledger, "MAX_SPANS", 16)
    for gate in range(20):
        names = make(tmp_path)
        for number in range(7):
            names.add(f":1.{gate * 100 + number * 2}")
        names.close()
    (path,) = tmp_path.iterdir()
    assert path.read_text().count("\n") <= 16 + 8 + 1


def test_file_that_cannot_be_written_anew_is_not_tried_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name_ledger, "MAX_SURPLUS", 8)
    (tmp_path / f"sandboxed-names-{BUS}.new").mkdir()
    names, tries = make(tmp_path), []
    write = names._write_anew

    def counted() -> None:
        tries.append(1)
        write()

    monkeypatch.setattr(names, "_write_anew", counted)
    for number in [*range(0, 100, 2), *range(1, 100, 2)]:
        names.add(f":1.{number}")
    names.close()
    assert 0 < len(tries) <= 100 // 8


def test_files_are_read_when_somebody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a hand-over, while everybody waits."""
    names = make(tmp_path)
    names.add(":1.5")
    names.close()
    monkeypatch.setattr(name_ledger, "open_file", pytest.fail)
    again = NameLedger(tmp_path)
    again.load(BUS, names.dump())
    assert spans_of(again) == [(":1", 5, 5)]


def test_attack_i1_names_from_before_the_bus_said_its_id_stay(tmp_path: Path) -> None:
    old = make(tmp_path)
    old.add(":1.5")
    old.close()
    names = NameLedger(tmp_path)
    for name in (":1.8", ":1.9", ":strange"):
        names.add(name)
    names.meet(BUS)
    names.close()
    for ledger_now in (names, make(tmp_path)):
        assert all(name in ledger_now for name in (":1.5", ":1.8", ":1.9", ":strange"))
        assert ":1.7" not in ledger_now
