"""Folders and files that another user may have made, and small files."""

import os
import stat
from pathlib import Path

import pytest

from broker.posix import files
from broker.posix.files import (
    UnsafeFileError,
    check_entries,
    open_file,
    open_folder,
    read_small,
    write_file,
)

STRANGER = 54321
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def give_away(path: Path) -> None:
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def refused(path: Path, why: str) -> None:
    before = open_fds()
    with pytest.raises(UnsafeFileError, match=why):
        with open_folder(path):
            pass
    assert open_fds() == before


def test_a_folder_of_ours_is_opened_by_any_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "absolute").symlink_to(tmp_path / "link")
    before = open_fds()
    for way in ("a/b", "link/b", "absolute/b", "a/../a/./b"):
        with open_folder(tmp_path / way) as fd:
            assert os.fstat(fd).st_ino == (tmp_path / "a" / "b").stat().st_ino
            assert not os.get_inheritable(fd)
    monkeypatch.chdir(tmp_path / "a")
    with open_folder(Path("b"), ours=True) as fd:
        assert os.fstat(fd).st_ino == (tmp_path / "a" / "b").stat().st_ino
    assert open_fds() == before


def test_folders_are_made_if_wanted(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        with open_folder(tmp_path / "a" / "b"):
            pass
    assert caught.value.filename == str(tmp_path / "a")
    with open_folder(tmp_path / "a" / "b", make=0o700, ours=True):
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert (tmp_path / "a" / "b").is_dir()


def test_a_folder_that_others_may_write_to_is_refused_unless_it_is_sticky(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "below").mkdir(mode=0o700)
    folder.chmod(0o777)
    refused(folder, "others may write")
    refused(folder / "below", "others may write")
    folder.chmod(0o1777)
    with open_folder(folder / "below"):
        pass


def test_a_folder_that_a_group_may_write_to_is_refused_unless_it_is_of_our_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o770)
    monkeypatch.setattr(files, "_is_own_group", lambda _gid: False)
    refused(tmp_path, "others may write")
    monkeypatch.setattr(files, "_is_own_group", lambda gid: gid == tmp_path.stat().st_gid)
    with open_folder(tmp_path):
        pass


def test_a_group_is_our_own_if_it_has_our_name_and_nobody_else() -> None:
    files._is_own_group.cache_clear()
    assert files._is_own_group(os.getegid()) in {True, False}
    assert not files._is_own_group(2**31 - 7)  # there is none of that number


@AS_ROOT
def test_a_folder_of_another_user_is_refused_and_so_is_all_below(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "ours").mkdir(parents=True)
    give_away(theirs)
    refused(theirs, f"belongs to another user .uid {STRANGER}.")
    refused(theirs / "ours", "belongs to another user")
    with pytest.raises(UnsafeFileError):
        with open_folder(theirs / "new", make=0o700):
            pass
    assert not (theirs / "new").exists()


@AS_ROOT
def test_a_link_of_another_user_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with open_folder(tmp_path / "link"):
        pass
    give_away(tmp_path / "link")
    refused(tmp_path / "link", "another user")


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="Too many levels"):
        with open_folder(tmp_path / "a"):
            pass


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        with open_folder(tmp_path / "file"):
            pass


def test_a_file_is_made_and_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    os.close(open_file(path, os.O_RDWR | os.O_CREAT))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("kept")
    os.close(open_file(path, os.O_RDWR | os.O_CREAT))
    assert path.read_text() == "kept"
    with pytest.raises(FileExistsError):
        open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)


def make_link(path: Path) -> None:
    path.symlink_to(path.with_name("victim"))


def make_hard_link(path: Path) -> None:
    os.link(path.with_name("victim"), path)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (make_link, "symbolic link"),
        (make_hard_link, "second name"),
        (os.mkfifo, "not a regular file"),
    ],
)
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CREAT])
def test_what_is_no_plain_file_is_refused_at_once(
    tmp_path: Path, make: object, why: str, flags: int
) -> None:
    (tmp_path / "victim").write_text("precious")
    assert callable(make)
    make(tmp_path / "file")
    before = open_fds()
    with pytest.raises(UnsafeFileError, match=f"{why}.*remove the file"):
        open_file(tmp_path / "file", flags)
    assert open_fds() == before
    assert (tmp_path / "victim").read_text() == "precious"


@AS_ROOT
def test_a_file_of_another_user_is_refused_and_told_among_others(tmp_path: Path) -> None:
    for name in ("theirs", "ours"):
        (tmp_path / name).touch()
    check_entries(tmp_path)
    give_away(tmp_path / "theirs")
    with pytest.raises(UnsafeFileError, match="another user"):
        open_file(tmp_path / "theirs", os.O_RDONLY)
    with pytest.raises(UnsafeFileError, match="another user made this file") as caught:
        check_entries(tmp_path)
    assert caught.value.filename == str(tmp_path / "theirs")


def test_a_file_takes_the_place_of_whatever_is_there(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    for name in ("file", "file.new"):
        make_link(tmp_path / name)
    write_file(tmp_path / "file", b"data", 0o644)
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_text() == "data"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert (tmp_path / "victim").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "victim"]


def test_what_cannot_be_put_there_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path / "folder", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_in_a_user_namespace_what_has_no_id_is_taken_for_roots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unmapped(text: str) -> frozenset[int]:
        files._unmapped_root.cache_clear()
        read = Path.read_text
        monkeypatch.setattr(
            Path,
            "read_text",
            lambda path: text if path.name == "uid_map" else read(path),
        )
        try:
            return files._unmapped_root()
        finally:
            monkeypatch.undo()
            files._unmapped_root.cache_clear()

    assert unmapped("0 0 4294967295\n") == frozenset()
    assert unmapped("1000 1000 1\n") == {65534}
    assert unmapped("0 1000 1\n") == {65534}
    assert unmapped("0 1000 1\n1 100000 65536\n") == frozenset()
    assert unmapped("nonsense\n") == frozenset()


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
