"""Cookies come out of the user's own folder only, and only out of its files."""

import os
from pathlib import Path

import pytest

from broker.proxy.keyring import MAX_KEYRING, fetch_cookie, find_cookie, find_folder, read_cookie
from broker.wire.sasl_steps import CookieError

CONTEXT = "org_freedesktop_general"
RING = b"1 1700000000 aa11\n22 1700000001 bb22\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / ".dbus-keyrings"
    made.mkdir(mode=0o700)
    (made / CONTEXT).write_bytes(RING)
    return made


@pytest.mark.parametrize(
    ("data", "cookie_id", "cookie"),
    [
        (RING, "1", "aa11"),
        (RING, "22", "bb22"),
        (RING, "2", None),
        (RING, "", None),
        (b"", "1", None),
        (b"1 5 aA1", "1", "aA1"),
        (b"1 5 aa\n1 6 bb\n", "1", "aa"),
        (b"1 5\n1 5 aa bb\n1  aa\n 1 5 aa\n", "1", None),
        (b"1 5 \n", "1", None),
        (b"1 5 xyz\n", "1", None),
        (b"garbage\xff\0\n1 5 aa\n", "1", "aa"),
    ],
)
def test_a_cookie_is_found_by_its_id(data: bytes, cookie_id: str, cookie: str | None) -> None:
    assert find_cookie(data, cookie_id) == cookie


def test_a_cookie_is_read(folder: Path) -> None:
    assert read_cookie(folder, os.getuid(), CONTEXT, "22") == "bb22"
    with pytest.raises(CookieError, match="has no cookie 3"):
        read_cookie(folder, os.getuid(), CONTEXT, "3")


def test_ones_own_are_in_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_folder() == folder
    assert fetch_cookie(CONTEXT, "1") == "aa11"


@pytest.mark.parametrize(
    "context", ["", "../x", ".", "a/b", "a\\b", "a b", "a\tb", "a\nb", "a\0b", "ä"]
)
def test_a_context_is_a_plain_name(folder: Path, context: str) -> None:
    with pytest.raises(CookieError, match="bad cookie context"):
        read_cookie(folder, os.getuid(), context, "1")


@pytest.mark.parametrize("mode", [0o710, 0o704, 0o750, 0o777])
def test_a_folder_that_others_can_enter_is_not_believed(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    with pytest.raises(CookieError, match="not private to the user"):
        read_cookie(folder, os.getuid(), CONTEXT, "1")


def test_a_folder_of_somebody_else_is_not_believed(folder: Path) -> None:
    with pytest.raises(CookieError, match="not private to the user"):
        read_cookie(folder, os.getuid() + 1, CONTEXT, "1")


def test_what_is_not_there_or_no_file(folder: Path) -> None:
    with pytest.raises(CookieError, match="No such file"):
        read_cookie(folder / "none", os.getuid(), CONTEXT, "1")
    with pytest.raises(CookieError, match="No such file"):
        read_cookie(folder, os.getuid(), "other", "1")
    os.mkfifo(folder / "pipe")  # and nobody writes to it
    with pytest.raises(CookieError, match="not a file"):
        read_cookie(folder, os.getuid(), "pipe", "1")
    (folder / "large").write_bytes(b"x" * (MAX_KEYRING + 1))
    with pytest.raises(CookieError, match="more than"):
        read_cookie(folder, os.getuid(), "large", "1")
