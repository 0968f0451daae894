"""The sockets of a proxy: bound at the paths that the caller chose, and nobody else's file in danger."""

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
    """A listening socket, and how to know its file again."""

    sock: socket.socket
    path: str
    device: int
    inode: int


def bind_socket(path: str) -> ProxySocket:
    """Listen at a path, only for our own uid. Raises ConfigError.

    What a proxy before us left there is replaced: a socket, or the empty file by which a launcher reserves a
    name. Anything else stays.
    """
    absolute = os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links
    # The kernel's limit is for what it is given, so the shorter one is.
    if len(os.fsencode(path)) > MAX_PATH:
        raise ConfigError(f"{cut(path)}: a socket's path has at most {MAX_PATH} bytes")
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
        raise ConfigError(f"{cut(str(path))}: there is something else than a socket; remove it")
    path.unlink()
