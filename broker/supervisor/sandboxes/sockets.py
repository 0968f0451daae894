"""Listening sockets of sandboxes: bound here, or passed by callers.

The descriptor of a Bound is closed at the end of the block. The socket file is unlinked there only if the block
failed, because otherwise the gate unlinks the file.
"""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker.posix.channels import (
    READABLE_KIND,
    WRITABLE_KIND,
    duplicate_socket,
    ends_with_its_writers,
    takes_a_byte,
)
from broker.posix.sockets import bind_with_umask
from broker.wire.address import make_unix_address
from broker.wire.errors import INVALID_ARGS, CallRefusedError

# Connections that wait for the gate. The gate limits accepted connections.
BACKLOG: Final = 128
_TRIES: Final = 16
_NO_SOCKET: Final = "Socket is not a unix stream socket that can listen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A listening socket."""

    fd: int
    path: str  # as in sun_path: an abstract name begins with NUL
    guid: str
    device: int = 0  # of a file that the supervisor made; 0 for a caller's socket
    inode: int = 0

    @property
    def is_ours(self) -> bool:
        """Return whether the supervisor made the file, which must be unlinked."""
        return self.inode != 0

    @property
    def address(self) -> str:
        """The D-Bus address to connect to."""
        return make_unix_address(self.path, self.guid)


@contextmanager
def bound_socket(folder: Path, uid: int) -> Iterator[Bound]:
    """Listen on a new socket file, to which only a certain user may connect."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        path = _bind(sock, folder)
        try:
            if uid != os.geteuid():
                os.chown(path, uid, -1, follow_symlinks=False)
            sock.listen(BACKLOG)
            info = path.lstat()
            yield Bound(
                fd=sock.fileno(),
                path=str(path),
                guid=os.urandom(16).hex(),
                device=info.st_dev,
                inode=info.st_ino,
            )
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            raise


@contextmanager
def given_socket(fd: int) -> Iterator[Bound]:
    """Listen on a socket that the caller passed, and duplicate the descriptor. Raises CallRefusedError."""
    with _opened(fd) as sock:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise CallRefusedError(INVALID_ARGS, _NO_SOCKET)
        try:
            name = sock.getsockname()
            path = name if isinstance(name, str) else name.decode()
        except UnicodeDecodeError:
            raise CallRefusedError(
                INVALID_ARGS, "Socket is bound to a name that is not text"
            ) from None
        if not path.removeprefix("\0").isprintable() or not path.removeprefix("\0"):
            raise CallRefusedError(INVALID_ARGS, "Socket is not bound to a printable name")
        try:
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                sock.listen(BACKLOG)
        except OSError as exc:
            raise CallRefusedError(INVALID_ARGS, f"Socket cannot listen: {exc.strerror}") from exc
        yield Bound(fd=sock.fileno(), path=path, guid=os.urandom(16).hex())


def check_readable(fd: int, name: str) -> None:
    """Check that a descriptor becomes readable when all writers are gone. Raises CallRefusedError."""
    if not ends_with_its_writers(fd):
        raise CallRefusedError(INVALID_ARGS, f"{name} is not {READABLE_KIND}")


def check_writable(fd: int, name: str) -> None:
    """Check that a byte can be written to a descriptor. Raises CallRefusedError."""
    if not takes_a_byte(fd):
        raise CallRefusedError(INVALID_ARGS, f"{name} is not {WRITABLE_KIND}")


def notify(fd: int) -> None:
    """Write a byte, and never wait for a reader."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            with socket.socket(fileno=os.dup(fd)) as sock:
                sock.send(b"\0", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            return
        # Opened again, because O_NONBLOCK on this descriptor would change the caller's as well.
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(own, b"\0")
        finally:
            os.close(own)


def sweep(folder: Path, keep: set[str]) -> list[str]:
    """Unlink the sockets in the folder except those in `keep`, and return the paths."""
    swept = []
    for path in folder.glob("dbus-*"):
        if str(path) not in keep:
            with contextlib.suppress(OSError):
                path.unlink()
                swept.append(str(path))
    return swept


def _bind(sock: socket.socket, folder: Path) -> Path:
    for _ in range(_TRIES):
        path = folder / f"dbus-{os.urandom(6).hex()}"
        try:
            bind_with_umask(sock, os.fspath(path), 0o077)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
        else:
            return path
    raise FileExistsError(f"no unused file name in {folder} after {_TRIES} tries")


def _opened(fd: int) -> socket.socket:
    """Return a duplicate of a descriptor as a socket object. Raises CallRefusedError."""
    try:
        return duplicate_socket(fd)
    except OSError as exc:
        if exc.errno in {errno.EBADF, errno.ENOTSOCK}:  # also a socket file opened with O_PATH
            raise CallRefusedError(INVALID_ARGS, _NO_SOCKET) from exc
        raise
