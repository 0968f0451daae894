"""The cookies by which a bus on TCP knows its user: ~/.dbus-keyrings, one file a context.

Who can read a cookie is the user. So the folder has to be the user's own, and closed to everybody else: in
another one somebody may have put cookies of theirs.
"""

import os
import re
import stat
from pathlib import Path
from typing import Final

from broker.posix.files import read_small
from broker.wire.sasl_steps import CookieError

# A bus keeps a handful of cookies, of some 70 bytes each.
MAX_KEYRING: Final = 256 * 1024
_LINE: Final = re.compile(rb"(?P<id>[0-9]+) -?[0-9]+ (?P<cookie>[0-9A-Fa-f]+)")
_NOT_FOR_US: Final = frozenset("/\\. \n\r\t\0")


def find_folder() -> Path:
    """Return where the cookies of our own user are. Raises CookieError."""
    try:
        return Path.home() / ".dbus-keyrings"
    except RuntimeError as exc:
        raise CookieError("no home folder, and so no cookies") from exc


def fetch_cookie(context: str, cookie_id: str) -> str:
    """Return a cookie of our own user. Raises CookieError."""
    return read_cookie(find_folder(), os.geteuid(), context, cookie_id)


def read_cookie(folder: Path, uid: int, context: str, cookie_id: str) -> str:
    """Return a cookie out of that user's folder. Raises CookieError."""
    if not context or not context.isascii() or _NOT_FOR_US & set(context):
        raise CookieError(f"{context[:80]!r} cannot be a file of cookies")
    path = folder / context
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if found.st_uid != uid or stat.S_IMODE(found.st_mode) & 0o077:
                raise CookieError(f"{folder} is not the user's alone: chmod 700 it")
            data = read_small(context, MAX_KEYRING, folder=fd)
        finally:
            os.close(fd)
    except OSError as exc:
        raise CookieError(f"{path}: {exc.strerror}") from exc
    cookie = find_cookie(data, cookie_id)
    if cookie is None:
        raise CookieError(f"{path} has no cookie {cookie_id}")
    return cookie


def find_cookie(data: bytes, cookie_id: str) -> str | None:
    """Return the cookie of that id; `data` are lines of id, time and cookie."""
    for line in data.splitlines():
        # What has another form is damaged: the others are good all the same.
        found = _LINE.fullmatch(line)
        if found and found["id"] == cookie_id.encode():
            return found["cookie"].decode()
    return None
