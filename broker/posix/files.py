"""Folders and files where another user may have been before.

A folder is safe when nobody but root and our own user can change what its path leads to. `open_folder`
walks the path by hand and checks each component:

- its owner is root or our user, symbolic links included;
- nobody else may write to it, unless it is sticky: in a sticky folder only the owner of an entry can
  replace it, and the entry is checked as well.

After the check a path through that folder can be used as it stands (`bind`, SQLite), because only root and
our own user could redirect it. A file in it is opened without following a link at its name and without
waiting for the other end of a FIFO, and is checked after the open: regular, of our user or root, one link.

In a user namespace without the host's ids, root's files look like those of any user who is not mapped: there
both are taken for root's.
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
_NO_FILE: Final = {errno.ELOOP: "it is a symbolic link", errno.ENXIO: "it is not a regular file"}


class UnsafeFileError(OSError):
    """A file or folder that another user made or could change."""

    def __init__(self, path: object, why: str) -> None:
        super().__init__(errno.EPERM, why, str(path))


@contextmanager
def open_folder(path: Path, *, make: int | None = None, ours: bool = False) -> Iterator[int]:
    """Open a safe folder, for use as `dir_fd`. Raises OSError, and UnsafeFileError if it is not safe.

    `make` is the mode of folders to make where there are none. `ours`: root's own do not do.
    """
    fd = _walk(path, make)
    try:
        if ours and os.fstat(fd).st_uid != os.geteuid():
            raise UnsafeFileError(path, "it is not a folder of this user: name another one")
        yield fd
    finally:
        os.close(fd)


def open_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """Open a regular file in a safe folder. Raises OSError, and UnsafeFileError if it is another's."""
    assert not flags & os.O_TRUNC, "a file is not emptied before it is checked"
    with open_folder(path.parent) as folder:
        try:
            fd = os.open(path.name, flags | _NO_SURPRISE, mode, dir_fd=folder)
        except OSError as exc:
            if exc.errno in _NO_FILE:
                raise UnsafeFileError(path, f"{_NO_FILE[exc.errno]}: remove it") from None
            raise
    try:
        _check_file(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put a file in the place of what is there, whole or not at all. Raises OSError.

    What is there is replaced, not written to: it may be a link, or have other readers.
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
    """Check that all in a safe folder is ours or root's. Raises UnsafeFileError.

    For what is opened there by libraries, which follow links, and for a folder that others could write
    to before it was closed to them.
    """
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.stat(follow_symlinks=False).st_uid not in _trusted():
                raise UnsafeFileError(entry.path, "another user made it: remove it")


def read_small(path: str | bytes | Path, limit: int, *, folder: int | None = None) -> bytes:
    """Return what is in a file, or in one of the folder with that descriptor. Raises OSError.

    It must be a regular file, and not larger than `limit`. A FIFO at its path does not make us wait. Links
    are followed: for files that their writer need not hide from us, or whose folder is checked.
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


# -- walking -------------------------------------------------------------------------------------------


def _walk(path: Path, make: int | None) -> int:
    """Return a descriptor of the folder at the end of a path, all of which is safe."""
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
            with contextlib.suppress(FileExistsError):  # made meanwhile, and checked as any other
                os.mkdir(name, make, dir_fd=folder)
            return os.open(name, _LOOK, dir_fd=folder)
    except OSError as exc:
        path = str(Path(_path_of(folder)) / name)
        raise OSError(exc.errno, exc.strerror, path) from None


def _path_of(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


# -- checks --------------------------------------------------------------------------------------------


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
        raise UnsafeFileError(_path_of(fd), f"it belongs to another user (uid {owner})")


def _check_file(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise UnsafeFileError(path, "it is not a regular file: remove it")
    if info.st_uid not in _trusted():
        raise UnsafeFileError(path, f"it belongs to another user (uid {info.st_uid}): remove it")
    if info.st_nlink > 1:
        raise UnsafeFileError(path, "it has a second name (hard link): remove it")


def _trusted() -> frozenset[int]:
    """Return the users whose files are as good as ours."""
    return frozenset({0, os.geteuid()}) | _unmapped_root()


@functools.cache
def _unmapped_root() -> frozenset[int]:
    """Return the id that stands for root's in a user namespace where it has none."""
    # `/proc` may be missing, and then nothing is known.
    with contextlib.suppress(OSError, ValueError):
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
        mapped = any(int(first) <= overflow < int(first) + int(n) for first, _, n in ranges)
        if ranges != [_ALL_IDS] and not mapped:
            return frozenset({overflow})
    return frozenset()


@functools.cache
def _is_own_group(gid: int) -> bool:
    """Say whether a group is that of our user alone, as where `umask` is 002."""
    import grp  # noqa: PLC0415 - rarely wanted, and it may ask the network
    import pwd  # noqa: PLC0415

    try:
        user = pwd.getpwuid(os.geteuid())
        group = grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and not group.gr_mem
