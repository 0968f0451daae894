"""Cgroups whose last process somebody waits for.

Theory of operation. `is_empty` is the only judge, and opens the cgroup anew each time: a path is walked only inside a
cgroup filesystem, so no caller can make us look anywhere else or wait for a filesystem of its own. When to
ask it says one inotify: `cgroup.events` is written to when its `populated` changes (not more often than
each 10 ms, and never if the cgroup is removed before that: so its parent is watched for removals as well). A
cgroup of a v1 hierarchy has no such file, and its release agent is not ours to set: those are looked at
twice a second, and so is what inotify has no room for.
"""

import ctypes
import errno
import logging
import os
import stat
import struct
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

import trio

from broker.supervisor.sandboxes.lifecycle import Cgroup
from broker.wire.errors import INVALID_ARGS, CallRefusedError

LOGGER: Final = logging.getLogger(__name__)
LOOK_EVERY: Final = 0.5  # seconds, at cgroups that nothing tells of
LOOKS_A_TURN: Final = 25  # some milliseconds
MAX_DEPTH: Final = 64  # of cgroups in a cgroup of v1
_EVENTS: Final = "cgroup.events"
_IN_MODIFY, _IN_DELETE, _IN_Q_OVERFLOW, _IN_IGNORED = 0x2, 0x200, 0x4000, 0x8000
_EVENT: Final = struct.Struct("iIII")
_BUFFER: Final = 64 * 1024
_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# What the kernel says of a file whose cgroup has been removed.
_REMOVED: Final = {errno.ENOENT, errno.ENODEV}
Told = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupMount:
    """A cgroup filesystem."""

    id: int
    point: PurePath
    unified: bool  # v2


class Cgroups:
    """The cgroups that are watched, each for any number of holders."""

    def __init__(self) -> None:
        self._watched: Final[dict[str, dict[str, tuple[Cgroup, Told]]]] = {}
        self._told_by: Final[dict[str, tuple[int, ...]]] = {}  # path -> its inotify watches
        self._tells_of: Final[dict[int, set[str]]] = {}  # inotify watch -> paths
        self._by_hand: Final[set[str]] = set()  # paths
        self._inotify: _Inotify | None = None
        self._is_running = False
        self._wanted: Final = trio.Event()
        self._not_all = trio.Event()

    def __len__(self) -> int:
        return len(self._watched)

    @property
    def way(self) -> str:
        """How it is done now, in words."""
        hand = f", {len(self._by_hand)} looked at twice a second" if self._by_hand else ""
        return f"inotify{hand}"

    def watch(self, holder: str, cgroup: Cgroup, told: Told) -> None:
        """Call `told` once when it has no process: at once, if that is so already."""
        holders = self._watched.setdefault(cgroup.path, {})
        if any(other.inode != cgroup.inode for other, _ in holders.values()):
            self._disarm(cgroup.path)  # it would tell of the one that had this path before
        holders[holder] = (cgroup, told)
        self._wanted.set()
        self._arm(cgroup.path)

    def forget(self, holder: str, cgroup: Cgroup) -> None:
        """Undo `watch`. Fine if it has become empty, or was never watched."""
        holders = self._watched.get(cgroup.path, {})
        if holders.pop(holder, None) is not None and not holders:
            del self._watched[cgroup.path]
            self._disarm(cgroup.path)

    async def run(self) -> None:
        """Tell of ends until cancelled."""
        await self._wanted.wait()  # a user may have 128 of the kernel's, all programs together
        try:
            self._inotify = _Inotify()
        except OSError as exc:
            LOGGER.warning("inotify: %s: cgroups are looked at twice a second", exc.strerror)
        self._is_running = True
        try:
            for number, path in enumerate(list(self._watched), 1):
                self._arm(path)
                if not number % LOOKS_A_TURN:
                    await trio.lowlevel.checkpoint()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._look_by_hand)
                if self._inotify is not None:
                    nursery.start_soon(self._listen, self._inotify)
        finally:
            self._is_running = False
            self._told_by.clear()
            self._tells_of.clear()
            if self._inotify is not None:
                self._inotify.close()
                self._inotify = None

    async def _listen(self, inotify: "_Inotify") -> None:
        while True:
            await trio.lowlevel.wait_readable(inotify.fd)
            self._take(inotify.read())

    def _take(self, events: list[tuple[int, int]]) -> None:
        paths: set[str] = set()
        for watch, mask in events:
            if mask & _IN_Q_OVERFLOW:
                paths.update(self._watched)
            elif not mask & _IN_IGNORED:
                paths.update(self._tells_of.get(watch, ()))
        for path in paths:
            self._look(path)

    def _look(self, path: str, mounts: list[CgroupMount] | None = None) -> None:
        is_told = False
        for holder, (cgroup, told) in list(self._watched.get(path, {}).items()):
            empty = is_empty(cgroup, mounts)
            if empty is None:
                self._look_again(path)
            elif empty:
                self.forget(holder, cgroup)
                told()
                is_told = True
        if is_told and path in self._told_by:  # others wait for one that has this path now
            self._disarm(path)
            self._arm(path)

    def _look_again(self, path: str) -> None:
        self._by_hand.add(path)
        self._not_all.set()

    def _arm(self, path: str) -> None:
        """See to it that we are told of its last process, and look whether that was before."""
        if not self._is_running or path not in self._watched:
            return
        if path not in self._told_by:
            watches = self._inotify.add(path, self._tells_of) if self._inotify is not None else ()
            if watches:
                self._told_by[path] = watches
                for watch in watches:
                    self._tells_of.setdefault(watch, set()).add(path)
                self._by_hand.discard(path)
            else:
                self._look_again(path)
        self._look(path)

    def _disarm(self, path: str) -> None:
        self._by_hand.discard(path)
        for watch in self._told_by.pop(path, ()):
            others = self._tells_of[watch]
            others.discard(path)
            if not others:
                del self._tells_of[watch]
                if self._inotify is not None:
                    self._inotify.remove(watch)

    async def _look_by_hand(self) -> None:
        while True:
            await self._not_all.wait()
            await trio.sleep(LOOK_EVERY)
            mounts = find_mounts()
            for number, path in enumerate(list(self._by_hand), 1):
                if path in self._told_by:
                    self._by_hand.discard(path)
                self._look(path, mounts)
                if not number % LOOKS_A_TURN:
                    await trio.lowlevel.checkpoint()
            if not self._by_hand:
                self._not_all = trio.Event()


class _Inotify:
    """One inotify. The standard library has none."""

    def __init__(self) -> None:
        self._libc: Final = ctypes.CDLL(None, use_errno=True)
        self.fd: Final = int(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def close(self) -> None:
        os.close(self.fd)

    def add(self, path: str, used: Container[int]) -> tuple[int, ...]:
        """Watch a cgroup; return nothing if it cannot be watched, be it that it is gone.

        `used`: the watches that there are, of which it may get one.
        """
        try:
            with _opened(path) as (fd, mount):
                if not mount.unified:
                    return ()
                # By way of the descriptor: the path may be another's by now.
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
            LOGGER.warning("cgroup %s: %s: looked at twice a second", path, exc)
            return ()

    def remove(self, watch: int) -> None:
        self._libc.inotify_rm_watch(self.fd, watch)

    def read(self) -> list[tuple[int, int]]:
        """Return (watch, mask) of what happened."""
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
    """Return which cgroup that is now, if there is a process in it. Raises CallRefusedError."""
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
        # One that fills up later would end its sandbox before, or after a restart of ours.
        raise CallRefusedError(INVALID_ARGS, f"{name}: there is no process in {path[:200]!r}")
    return cgroup


def is_empty(cgroup: Cgroup, mounts: list[CgroupMount] | None = None) -> bool | None:
    """Say whether neither it nor a cgroup in it has a process, or it is no more; None: it cannot be seen now."""
    try:
        with _opened(cgroup.path, mounts) as (fd, mount):
            return os.fstat(fd).st_ino != cgroup.inode or not _is_populated(fd, mount)
    except OSError as exc:
        return True if exc.errno in _REMOVED else None
    except CallRefusedError:
        return None  # its filesystem is not mounted at the moment


@contextmanager
def _opened(
    path: str, mounts: list[CgroupMount] | None = None
) -> Iterator[tuple[int, CgroupMount]]:
    """Open its folder. Raises OSError, and CallRefusedError if it is in no cgroup filesystem."""
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
    raise OSError(errno.ENOTSUP, "no word of processes in cgroup.events")


def _has_process(fd: int, depth: int) -> bool:
    """Say whether a cgroup of v1, or one in it, has a process."""
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
    """Return the cgroup filesystems that are mounted where we see them."""
    return parse_mounts(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))


def parse_mounts(text: str) -> list[CgroupMount]:
    """Return the cgroup filesystems of a mountinfo."""
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
