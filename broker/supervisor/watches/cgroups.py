"""A watch over cgroups, for the end of the last process in each.

Theory of operation. `is_empty` is the only judge, and opens the cgroup anew each time. A path is walked only inside
a cgroup filesystem, so no caller can make the supervisor look anywhere else, or wait for another filesystem.

An inotify says when to ask. The kernel writes to `cgroup.events` when `populated` changes, but not more often than
every 10 ms, and never if the cgroup is removed before that:

    process 1 ends            populated becomes 0      ->  event on cgroup.events, is_empty: yes
    process 1 ends, rmdir     (too soon for a write)   ->  event on the parent folder, is_empty: yes

So the parent folder is watched for removals as well. A cgroup of a v1 hierarchy has no such file, and its release
agent is the system's to set. Such cgroups are looked at twice a second, and so are those that inotify has no room for.
"""

import ctypes
import errno
import logging
import os
import stat
import struct
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Final

import trio

from broker.supervisor.sandboxes.lifecycle import Cgroup
from broker.supervisor.watches.watched import Judge, OnEnd, Watched
from broker.wire.errors import INVALID_ARGS, CallRefusedError

LOGGER: Final = logging.getLogger(__name__)
LOOK_EVERY: Final = 0.5  # seconds, at cgroups without inotify
LOOKS_A_TURN: Final = 25  # some milliseconds
MAX_DEPTH: Final = 64  # of nested cgroups of v1
_EVENTS: Final = "cgroup.events"
_IN_MODIFY, _IN_DELETE, _IN_Q_OVERFLOW, _IN_IGNORED = 0x2, 0x200, 0x4000, 0x8000
_EVENT: Final = struct.Struct("iIII")
_BUFFER: Final = 64 * 1024
_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Errors of the kernel for a file whose cgroup has been removed.
_REMOVED: Final = {errno.ENOENT, errno.ENODEV}


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupMount:
    """A cgroup filesystem."""

    id: int
    point: PurePath
    unified: bool  # v2


class Cgroups(Watched[str, Cgroup]):
    """The watched cgroups. A thing is a cgroup, and the key is the path."""

    def __init__(self) -> None:
        super().__init__(
            look_every=LOOK_EVERY, interval="twice a second", looks_a_turn=LOOKS_A_TURN
        )
        self._watches_of: Final[dict[str, tuple[int, ...]]] = {}  # path -> inotify watches
        self._paths_of: Final[dict[int, set[str]]] = {}  # inotify watch -> paths
        self._inotify: _Inotify | None = None
        self._is_running = False
        self._wanted: Final = trio.Event()

    def watch(self, holder: str, thing: Cgroup, on_end: OnEnd) -> None:
        holders = self._watched.get(thing.path, {})
        if any(other.inode != thing.inode for other, _ in holders.values()):
            self._disarm(thing.path)  # the inotify watches are of an earlier cgroup of this path
        self._wanted.set()
        super().watch(holder, thing, on_end)

    async def run(self) -> None:
        """Call back holders until cancelled."""
        await self._wanted.wait()  # a user may have 128 inotify instances, in all programs together
        try:
            self._inotify = _Inotify()
        except OSError as exc:
            LOGGER.warning("inotify: %s: cgroups are looked at twice a second", exc.strerror)
        self._is_running = True
        try:
            await self._for_each(self._arm)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_looking)
                if self._inotify is not None:
                    nursery.start_soon(self._listen, self._inotify)
        finally:
            self._is_running = False
            self._watches_of.clear()
            self._paths_of.clear()
            if self._inotify is not None:
                self._inotify.close()
                self._inotify = None

    async def _listen(self, inotify: "_Inotify") -> None:
        while True:
            await trio.lowlevel.wait_readable(inotify.fd)
            self._take_events(inotify.read())

    def _take_events(self, events: list[tuple[int, int]]) -> None:
        paths: set[str] = set()
        for watch, mask in events:
            if mask & _IN_Q_OVERFLOW:
                paths.update(self._watched)
            elif not mask & _IN_IGNORED:
                paths.update(self._paths_of.get(watch, ()))
        for path in paths:
            self._look(path)

    # -- Watched ----------------------------------------------------------------------------------------

    def _key(self, thing: Cgroup) -> str:
        return thing.path

    def _has_ended(self, thing: Cgroup) -> bool | None:
        return is_empty(thing)

    def _kernel_method(self) -> str:
        return "inotify"

    def _look(self, key: str, has_ended: Judge[Cgroup] | None = None) -> bool:
        found = super()._look(key, has_ended)
        if found and key in self._watches_of:  # other holders wait for a later cgroup of this path
            self._disarm(key)
            self._arm(key)
        return found

    def _arm(self, key: str) -> None:
        if not self._is_running or key not in self._watched:
            return
        if key not in self._watches_of:
            watches = self._inotify.add(key, self._paths_of) if self._inotify is not None else ()
            if watches:
                self._watches_of[key] = watches
                for watch in watches:
                    self._paths_of.setdefault(watch, set()).add(key)
                self._by_hand.discard(key)
            else:
                self._look_later(key)
        self._look(key)

    def _disarm(self, key: str) -> None:
        self._by_hand.discard(key)
        for watch in self._watches_of.pop(key, ()):
            others = self._paths_of[watch]
            others.discard(key)
            if not others:
                del self._paths_of[watch]
                if self._inotify is not None:
                    self._inotify.remove(watch)

    def _look_by_hand(self, keys: Sequence[str]) -> None:
        is_empty_there = partial(is_empty, mounts=find_mounts())
        for path in keys:
            if path in self._watches_of:
                self._by_hand.discard(path)
            self._look(path, is_empty_there)


class _Inotify:
    """An inotify instance, because the standard library has none."""

    def __init__(self) -> None:
        self._libc: Final = ctypes.CDLL(None, use_errno=True)
        self.fd: Final = int(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def close(self) -> None:
        os.close(self.fd)

    def add(self, path: str, used: Container[int]) -> tuple[int, ...]:
        """Watch a cgroup; return the watches, none if that is impossible.

        The kernel may return a watch of `used`, the existing watches, which an error must not remove.
        """
        try:
            with _opened(path) as (fd, mount):
                if not mount.unified:
                    return ()
                # Through the descriptor, because the path may belong to another cgroup by now.
                here = f"/proc/self/fd/{fd}"
                events = self._add(f"{here}/{_EVENTS}", _IN_MODIFY)
                try:
                    return (events, self._add(f"{here}/..", _IN_DELETE))
                except OSError:
                    if events not in used:
                        self.remove(events)
                    raise
        except FileNotFoundError:
            return ()
        except (OSError, CallRefusedError) as exc:
            LOGGER.warning("cgroup %s is looked at twice a second: %s", path, exc)
            return ()

    def remove(self, watch: int) -> None:
        self._libc.inotify_rm_watch(self.fd, watch)

    def read(self) -> list[tuple[int, int]]:
        """Return the events as (watch, mask)."""
        try:
            data = os.read(self.fd, _BUFFER)
        except BlockingIOError:
            return []
        events, at = [], 0
        while at < len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, at)
            events.append((watch, mask))
            at += _EVENT.size + length
        return events

    def _add(self, path: str, mask: int) -> int:
        watch = int(self._libc.inotify_add_watch(self.fd, os.fsencode(path), mask))
        if watch < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return watch


# -- single cgroups ------------------------------------------------------------------------------------------


def identify(path: str, name: str = "Cgroup") -> Cgroup:
    """Return the cgroup that has a path now, if there is a process in the cgroup. Raises CallRefusedError."""
    try:
        with _opened(path) as (fd, mount):
            cgroup = Cgroup(path, os.fstat(fd).st_ino)
            populated = _is_populated(fd, mount)
    except OSError as exc:
        raise CallRefusedError(
            INVALID_ARGS, f"{name}: {path[:200]!r}: {exc.strerror or exc}"
        ) from None
    except CallRefusedError as exc:
        raise CallRefusedError(exc.dbus_name, f"{name}: {exc}") from None
    if not populated:
        # An empty cgroup would end the sandbox at once, even if a process came later.
        raise CallRefusedError(INVALID_ARGS, f"{name}: there is no process in {path[:200]!r}")
    return cgroup


def is_empty(cgroup: Cgroup, mounts: list[CgroupMount] | None = None) -> bool | None:
    """Return whether a cgroup has no process, inner ones included; None if unknown."""
    try:
        with _opened(cgroup.path, mounts) as (fd, mount):
            return os.fstat(fd).st_ino != cgroup.inode or not _is_populated(fd, mount)
    except OSError as exc:
        return True if exc.errno in _REMOVED else None
    except CallRefusedError:
        return None  # the cgroup filesystem is not mounted at the moment


@contextmanager
def _opened(
    path: str, mounts: list[CgroupMount] | None = None
) -> Iterator[tuple[int, CgroupMount]]:
    """Open a cgroup's folder. Raises OSError, and CallRefusedError for a path in no cgroup filesystem."""
    wanted = PurePath(path)
    if not wanted.is_absolute() or str(wanted) != path or ".." in wanted.parts or "\0" in path:
        raise CallRefusedError(INVALID_ARGS, f"{path[:200]!r} is not a plain absolute path")
    found = find_mounts() if mounts is None else mounts
    inside = [mount for mount in found if wanted.is_relative_to(mount.point)]
    if not inside:
        raise CallRefusedError(INVALID_ARGS, f"{path[:200]!r} is in no cgroup filesystem")
    mount = max(inside, key=lambda one: (len(one.point.parts), one.id))
    fd = os.open(mount.point, _OPEN)
    try:
        for part in wanted.relative_to(mount.point).parts:
            below = os.open(part, _OPEN, dir_fd=fd)
            os.close(fd)
            fd = below
        if _mount_of(fd) != mount.id:
            raise CallRefusedError(INVALID_ARGS, f"{path[:200]!r} is in no cgroup filesystem")
        yield fd, mount
    finally:
        os.close(fd)


def _is_populated(fd: int, mount: CgroupMount) -> bool:
    if not mount.unified:
        return _has_process(fd, MAX_DEPTH)
    for line in _read(fd, _EVENTS).splitlines():
        key, _, value = line.partition(b" ")
        if key == b"populated":
            return value != b"0"
    raise OSError(errno.ENOTSUP, "cgroup.events has no line 'populated'")


def _has_process(fd: int, depth: int) -> bool:
    """Return whether a cgroup of v1, or a cgroup inside, has a process."""
    if _read(fd, "cgroup.procs", 1):
        return True
    for name in os.listdir(fd):
        if not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            continue
        below = os.open(name, _OPEN, dir_fd=fd)
        try:
            if depth <= 0 or _has_process(below, depth - 1):
                return True
        finally:
            os.close(below)
    return False


def _read(folder: int, name: str, size: int = 4096) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(fd, size)
    finally:
        os.close(fd)


def find_mounts() -> list[CgroupMount]:
    """Return the cgroup filesystems mounted in this process's namespace."""
    return parse_mounts(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))


def parse_mounts(text: str) -> list[CgroupMount]:
    """Return the cgroup filesystems in the text of a mountinfo file."""
    mounts = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.partition(" ")[0]
        if kind in _KINDS and len(fields) > 4:
            point = PurePath(_unescape(fields[4]))
            mounts.append(CgroupMount(id=int(fields[0]), point=point, unified=_KINDS[kind]))
    return mounts


_KINDS: Final[Mapping[str, bool]] = {"cgroup2": True, "cgroup": False}


def _unescape(text: str) -> str:
    for octal, plain in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(octal, plain)
    return text


def _mount_of(fd: int) -> int:
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines():
        if line.startswith("mnt_id:"):
            return int(line.split()[1])
    return -1
