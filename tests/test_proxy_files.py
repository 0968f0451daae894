"""Small files are read whole; whatever is none is an error, and nothing is waited for."""

import os
from pathlib import Path

import pytest

from broker.proxy.files import read_small


def test_a_file_is_read_if_it_is_no_larger(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    assert read_small(str(tmp_path / "f"), 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_small(os.fsencode(tmp_path / "f"), 4)


def test_a_folder_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"1")
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert read_small("f", 5, folder=fd) == b"1"
    finally:
        os.close(fd)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), str(tmp_path), "/dev/zero"):
        with pytest.raises(OSError, match=r"not a file|Is a directory"):
            read_small(path, 5)
    assert set(Path("/proc/self/fd").iterdir()) == before
    with pytest.raises(FileNotFoundError):
        read_small(str(tmp_path / "none"), 5)
