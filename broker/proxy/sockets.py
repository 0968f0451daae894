"""Sockets of a proxy, bound at paths that the caller chose, without harm to other files."""

import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker.posix.files import UnsafeFileError, open_folder
from broker.posix.sockets import bind_with_umask
from broker.wire.address import MAX_PATH
from broker.wire.errors import ConfigError
from policy.importers.report import cut

BACKLOG: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySocket:
    """A listening socket, and the device and inode of the file."""

    sock: socket.socket
    path: str
    device: int
    inode: int


def bind_socket(path: str) -> ProxySocket:
    """Listen at a path for the own uid alone. Raises ConfigError.

    The leftover of an earlier proxy is replaced, which is a socket, a link, or the empty file by
    which a launcher reserves a name. Any other file stays.
    """
    absolute = os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links
    # The kernel limits the length of the path in the call. `path` is used there, because `absolute`
    # may be longer.
    if len(os.fsencode(path)) > MAX_PATH:
        raise ConfigError(f"{cut(path)}: the path of a socket has at most {MAX_PATH} bytes")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with open_folder(Path(absolute).parent):
            _make_room(Path(absolute))
            bind_with_umask(sock, path, 0o177)
            found = Path(absolute).lstat()
            sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        where = f"{exc.filename}: " if isinstance(exc, UnsafeFileError) else ""
        raise ConfigError(f"{cut(path)}: cannot listen there: {where}{exc.strerror}") from exc
    except ConfigError:
        sock.close()
        raise
    return ProxySocket(sock=sock, path=absolute, device=found.st_dev, inode=found.st_ino)


def _make_room(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    is_reserved = stat.S_ISREG(found.st_mode) and not found.st_size
    if not (stat.S_ISSOCK(found.st_mode) or stat.S_ISLNK(found.st_mode) or is_reserved):
        raise ConfigError(f"{cut(str(path))}: the file there is not a socket; remove the file")
    path.unlink()
