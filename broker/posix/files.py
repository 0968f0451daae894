"""Safe access to folders and files in places where another user may write.

A folder is safe when only root and the current user can change what the folder's path leads to.
`open_folder` walks the path by hand and checks each component:

- The owner is root or the current user. Symbolic links are checked, too.
- No other user may write to the component, unless the component is a sticky folder. In a sticky
  folder only the owner of an entry can replace the entry, and the walk checks the entry as well.

After the check the path can be used as text (`bind`, SQLite), because only root and the current
user could redirect the path. A file in a safe folder is opened without following a link at the
file's name and without waiting for the other end of a FIFO. After the open the file is checked: a
regular file, owned by the current user or root, with a single link.

In a user namespace without the host's ids, root's files cannot be told from the files of an
unmapped user. There the files of both are accepted as root's.
"""

import contextlib
import errno
import functools
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_FOLLOWED_AT_MOST: Final = 40  # symbolic links in one path, as in the kernel
_LOOK: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_SURPRISE: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_ALL_IDS: Final = ["0", "0", str(2**32 - 1)]  # /proc/self/uid_map outside all user namespaces
# Errors of O_NOFOLLOW on a link, and of O_NONBLOCK on a FIFO without a reader.
_NO_FILE: Final = {errno.ELOOP: "a symbolic link", errno.ENXIO: "not a regular file"}


class UnsafeFileError(OSError):
    """A file or folder that another user made or could change."""

    def __init__(self, path: object, why: str) -> None:
        super().__init__(errno.EPERM, why, str(path))


@contextmanager
def open_folder(path: Path, *, make: int | None = None, ours: bool = False) -> Iterator[int]:
    """Open a safe folder, for use as `dir_fd`. Raises OSError, and UnsafeFileError if not safe.

    Missing folders are made with the mode `make`, if given. With `ours` the folder must belong to
    the current user, so a folder of root is refused, too.
    """
    fd = _walk(path, make)
    try:
        if ours and os.fstat(fd).st_uid != os.geteuid():
            raise UnsafeFileError(path, "not a folder of this user: name another folder")
        yield fd
    finally:
        os.close(fd)


def open_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """Open a regular file in a safe folder. Raises OSError, and UnsafeFileError if not safe."""
    assert not flags & os.O_TRUNC, "a file is not emptied before the check"
    with open_folder(path.parent) as folder:
        try:
            fd = os.open(path.name, flags | _NO_SURPRISE, mode, dir_fd=folder)
        except OSError as exc:
            if exc.errno in _NO_FILE:
                raise UnsafeFileError(path, f"{_NO_FILE[exc.errno]}: remove the file") from None
            raise
    try:
        _check_file(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file, whole or not at all. Raises OSError.

    An existing file is replaced and never written to, because the file may be a link or may have
    other readers.
    """
    new = path.with_name(f"{path.name}.new")
    with open_folder(path.parent) as folder:
        with contextlib.suppress(FileNotFoundError):  # left by a writer that was killed
            os.unlink(new.name, dir_fd=folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_SURPRISE
        fd = os.open(new.name, flags, 0o600, dir_fd=folder)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                os.fchmod(fd, mode)
            os.rename(new.name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(new.name, dir_fd=folder)
            raise


def check_entries(path: Path) -> None:
    """Check that root or the current user owns every entry of a safe folder.

    Raises UnsafeFileError. The check is for entries that libraries open, because libraries follow
    links, and for a folder that other users could write to before the folder was closed to them.
    """
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.stat(follow_symlinks=False).st_uid not in _trusted():
                raise UnsafeFileError(entry.path, "another user made this file: remove the file")


def read_small(path: str | bytes | Path, limit: int, *, folder: int | None = None) -> bytes:
    """Return the content of a regular file of at most `limit` bytes. Raises OSError.

    A relative path starts at the folder with descriptor `folder`. A FIFO at the path does not make
    the reader wait. Links are followed, so a path that another user can change may lead to any file
    that the current user can read. The function is for paths where that is harmless, and for paths
    in a checked folder.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(None, "not a file")
        data = b""
        while more := os.read(fd, limit + 1 - len(data)):
            data += more
    finally:
        os.close(fd)
    if len(data) > limit:
        raise OSError(None, f"more than {limit} bytes")
    return data


# -- walking ---------------------------------------------------------------------------------------


def _walk(path: Path, make: int | None) -> int:
    """Return a descriptor of the folder at the end of a path of safe components."""
    ahead = list(reversed(path.absolute().parts[1:]))
    links = 0
    fd = os.open("/", _LOOK)
    try:
        _check_folder(fd)
        while ahead:
            part = ahead.pop()
            below = _open_part(fd, part, make)
            try:
                if not stat.S_ISLNK(os.fstat(below).st_mode):
                    _check_folder(below)
                    fd, below = below, fd
                    continue
                _check_owner(below)
                links += 1
                if links > _FOLLOWED_AT_MOST:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
                target = os.readlink("", dir_fd=below)
            finally:
                os.close(below)
            ahead += reversed(Path(target).parts)
            if ahead[-1] == "/":
                ahead.pop()
                top = os.open("/", _LOOK)
                os.close(fd)
                fd = top
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_part(folder: int, name: str, make: int | None) -> int:
    try:
        try:
            return os.open(name, _LOOK, dir_fd=folder)
        except FileNotFoundError:
            if make is None:
                raise
            with contextlib.suppress(FileExistsError):  # made meanwhile, and checked like any other
                os.mkdir(name, make, dir_fd=folder)
            return os.open(name, _LOOK, dir_fd=folder)
    except OSError as exc:
        path = str(Path(_path_of(folder)) / name)
        raise OSError(exc.errno, exc.strerror, path) from None


def _path_of(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


# -- checks ----------------------------------------------------------------------------------------


def _check_folder(fd: int) -> None:
    info = os.fstat(fd)
    if not stat.S_ISDIR(info.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), _path_of(fd))
    _check_owner(fd)
    if info.st_mode & stat.S_ISVTX or not info.st_mode & _OTHERS_WRITE:
        return
    if info.st_mode & stat.S_IWOTH or not _is_own_group(info.st_gid):
        raise UnsafeFileError(_path_of(fd), "others may write to this folder: chmod go-w, or +t")


def _check_owner(fd: int) -> None:
    if (owner := os.fstat(fd).st_uid) not in _trusted():
        raise UnsafeFileError(_path_of(fd), f"belongs to another user (uid {owner})")


def _check_file(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise UnsafeFileError(path, "not a regular file: remove the file")
    if info.st_uid not in _trusted():
        raise UnsafeFileError(path, f"belongs to another user (uid {info.st_uid}): remove the file")
    if info.st_nlink > 1:
        raise UnsafeFileError(path, "has a second name (hard link): remove the file")


def _trusted() -> frozenset[int]:
    """Return the users whose files are trusted as much as the current user's."""
    return frozenset({0, os.geteuid()}) | _unmapped_root()


@functools.cache
def _unmapped_root() -> frozenset[int]:
    """Return the id that stands for root in a user namespace without root's id."""
    # Without `/proc` the id is unknown.
    with contextlib.suppress(OSError, ValueError):
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
        mapped = any(int(first) <= overflow < int(first) + int(n) for first, _, n in ranges)
        if ranges != [_ALL_IDS] and not mapped:
            return frozenset({overflow})
    return frozenset()


@functools.cache
def _is_own_group(gid: int) -> bool:
    """Return whether the current user alone is in a group, as is usual with a `umask` of 002."""
    import grp  # noqa: PLC0415 - rarely needed, and may ask the network
    import pwd  # noqa: PLC0415

    try:
        user = pwd.getpwuid(os.geteuid())
        group = grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and not group.gr_mem
