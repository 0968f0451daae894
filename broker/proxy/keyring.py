"""The cookies in ~/.dbus-keyrings, which authenticate a user to a bus on TCP.

Each context has a file there. A client that can read a cookie passes for the user. So the folder
must belong to the user, and no other user may have access. In an open folder, another user could
place forged cookies.
"""

import os
import re
import stat
from pathlib import Path
from typing import Final

from broker.posix.files import read_small
from broker.wire.sasl_steps import CookieError

# A bus keeps a handful of cookies, each of about 70 bytes.
MAX_KEYRING: Final = 256 * 1024
_LINE: Final = re.compile(rb"(?P<id>[0-9]+) -?[0-9]+ (?P<cookie>[0-9A-Fa-f]+)")
_FORBIDDEN: Final = frozenset("/\\. \n\r\t\0")  # in a context, which is the name of a file


def find_folder() -> Path:
    """Return the cookie folder of the own user. Raises CookieError."""
    try:
        return Path.home() / ".dbus-keyrings"
    except RuntimeError as exc:
        raise CookieError("no home folder, and so no cookies") from exc


def fetch_cookie(context: str, cookie_id: str) -> str:
    """Return a cookie of the own user. Raises CookieError."""
    return read_cookie(find_folder(), os.geteuid(), context, cookie_id)


def read_cookie(folder: Path, uid: int, context: str, cookie_id: str) -> str:
    """Return a cookie from `folder`, which must belong to `uid`. Raises CookieError."""
    if not context or not context.isascii() or _FORBIDDEN & set(context):
        raise CookieError(f"bad cookie context {context[:80]!r}")
    path = folder / context
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if found.st_uid != uid or stat.S_IMODE(found.st_mode) & 0o077:
                raise CookieError(f"{folder} is not private to the user: run chmod 700 {folder}")
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
    """Return the cookie with that id from lines of id, time and cookie."""
    for line in data.splitlines():
        # A line in another form is damaged, and the other lines are still good.
        found = _LINE.fullmatch(line)
        if found and found["id"] == cookie_id.encode():
            return found["cookie"].decode()
    return None
