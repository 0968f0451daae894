import errno
import os
from collections.abc import Callable
from pathlib import Path, PurePath

import pytest
import trio
import trio.lowlevel
import trio.testing

from broker.supervisor.sandboxes.lifecycle import Cgroup
from broker.supervisor.watches import cgroups
from broker.supervisor.watches.cgroups import (
    CgroupMount,
    Cgroups,
    find_mounts,
    identify,
    is_empty,
    parse_mounts,
)
from broker.wire.errors import INVALID_ARGS, CallRefusedError

MOUNTINFO = r"""
22 1 0:21 / / rw,relatime shared:1 - ext4 /dev/vda rw
31 22 0:27 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
40 31 0:36 / /sys/fs/cgroup/systemd rw,relatime shared:9 master:2 - cgroup cgroup rw,name=systemd
41 31 0:37 / /sys/fs/cgroup/with\040space rw - cgroup2 cgroup2 rw
42 31 0:38 / /mnt/lxc rw - fuse.lxcfs lxcfs rw
43 31 0:39 / /mnt/cgroup rw - tmpfs cgroup rw
broken
"""


def test_cgroup_filesystems_are_found_by_their_type() -> None:
    assert parse_mounts(MOUNTINFO) == [
        CgroupMount(id=40, point=PurePath("/sys/fs/cgroup/systemd"), unified=False),
        CgroupMount(id=41, point=PurePath("/sys/fs/cgroup/with space"), unified=True),
    ]


def test_the_machines_own_can_be_read() -> None:
    assert all(mount.point.is_absolute() for mount in find_mounts())


@pytest.mark.parametrize(
    "path", ["", "relative", "/sys/fs/cgroup/../../etc", "/a//b", "/a/", "/a/./b", "/a\0b"]
)
def test_a_path_is_plain_and_absolute(path: str) -> None:
    with pytest.raises(
        CallRefusedError, match=r"Cgroup: .* is not a plain absolute path"
    ) as caught:
        identify(path)
    assert caught.value.dbus_name == INVALID_ARGS


def test_other_filesystems_are_never_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CallRefusedError, match="is in no cgroup filesystem"):
        identify(str(tmp_path))
    # Not even where a cgroup filesystem was before something was mounted over it.
    here = CgroupMount(id=1, point=PurePath(tmp_path), unified=True)
    monkeypatch.setattr(cgroups, "find_mounts", lambda: [here])
    with pytest.raises(CallRefusedError, match="is in no cgroup filesystem"):
        identify(str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(CallRefusedError, match=r"Not a directory|symbolic links"):
        identify(str(tmp_path / "link"))
    with pytest.raises(CallRefusedError, match="No such file"):
        identify(str(tmp_path / "missing"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that passes for a v2 hierarchy."""
    fd = os.open(tmp_path, os.O_RDONLY)
    mount = CgroupMount(id=cgroups._mount_of(fd), point=PurePath(tmp_path), unified=True)
    os.close(fd)
    monkeypatch.setattr(cgroups, "find_mounts", lambda: [mount])
    return tmp_path


def make(folder: Path, name: str, populated: int = 1) -> Cgroup:
    (folder / name).mkdir()
    (folder / name / "cgroup.events").write_text(f"populated {populated}\nfrozen 0\n")
    path = folder / name
    return Cgroup(str(path), path.stat().st_ino)


def remove(cgroup: Cgroup) -> None:
    (Path(cgroup.path) / "cgroup.events").unlink()
    Path(cgroup.path).rmdir()


def test_a_cgroup_is_its_path_and_inode(folder: Path) -> None:
    cgroup = make(folder, "a")
    assert identify(cgroup.path) == cgroup
    assert is_empty(cgroup) is False
    assert is_empty(Cgroup(cgroup.path, cgroup.inode + 1)) is True
    assert is_empty(Cgroup(f"{cgroup.path}b", 1)) is True
    assert is_empty(Cgroup("/nowhere/at/all", 1)) is None
    make(folder, "empty", populated=0)
    with pytest.raises(CallRefusedError, match="there is no process in"):
        identify(str(folder / "empty"))


def test_cgroups_of_v1_are_walked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = CgroupMount(id=cgroups.find_mounts()[0].id, point=PurePath(folder), unified=False)
    monkeypatch.setattr(cgroups, "find_mounts", lambda: [mount])
    below = folder / "a" / "b"
    below.mkdir(parents=True)
    for path in (below, below.parent):
        (path / "cgroup.procs").write_text("")
    with pytest.raises(CallRefusedError, match="there is no process in"):
        identify(str(below.parent))
    (below / "cgroup.procs").write_text("17\n")
    cgroup = identify(str(below.parent))
    assert is_empty(cgroup) is False


async def test_what_becomes_empty_is_told_once(folder: Path) -> None:
    told: list[str] = []
    watched = Cgroups()
    first, second, third = (make(folder, name) for name in "abc")
    watched.watch("c0", first, lambda: told.append("c0"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watched.run)
        await trio.testing.wait_all_tasks_blocked()
        watched.watch("c1", first, lambda: told.append("c1"))
        watched.watch("c2", second, lambda: told.append("c2"))
        watched.watch("c3", third, lambda: told.append("c3"))
        watched.forget("c3", third)
        assert told == []
        (Path(first.path) / "cgroup.events").write_text("populated 0\n")
        await _until(lambda: told == ["c0", "c1"])
        remove(second)  # seen by way of its parent
        await _until(lambda: told == ["c0", "c1", "c2"])
        assert len(watched) == 0
        assert not any((watched._watches_of, watched._paths_of, watched._by_hand))
        nursery.cancel_scope.cancel()


async def test_a_path_that_is_used_again_at_once_is_watched_anew(folder: Path) -> None:
    told: list[str] = []
    watched = Cgroups()
    first = make(folder, "a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watched.run)
        watched.watch("c0", first, lambda: told.append("c0"))
        await trio.testing.wait_all_tasks_blocked()
        # No turn of the loop from here to where both are watched. The old one stays, so that its inode does.
        (folder / "a").rename(folder / "old")
        second = make(folder, "a")
        watched.watch("c1", second, lambda: told.append("c1"))
        assert told == ["c0"]
        await trio.testing.wait_all_tasks_blocked()
        (Path(second.path) / "cgroup.events").write_text("populated 0\n")
        await _until(lambda: told == ["c0", "c1"])
        assert not any((watched._watches_of, watched._paths_of, watched._by_hand))
        nursery.cancel_scope.cancel()


async def test_who_waits_for_the_next_one_of_a_path_is_told_of_that(folder: Path) -> None:
    told: list[str] = []
    watched = Cgroups()
    first = make(folder, "a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watched.run)
        watched.watch("c0", first, lambda: told.append("c0"))
        await trio.testing.wait_all_tasks_blocked()
        (folder / "a").rename(folder / "old")
        second = make(folder, "a")
        # As if that was seen before anybody looked at the first one.
        watched._watched[second.path]["c1"] = (second, lambda: told.append("c1"))
        watched._look(second.path)
        assert told == ["c0"]
        await trio.testing.wait_all_tasks_blocked()
        (Path(second.path) / "cgroup.events").write_text("populated 0\n")
        await _until(lambda: told == ["c0", "c1"])
        nursery.cancel_scope.cancel()


def test_half_a_watch_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inotify = cgroups._Inotify()
    cgroup = make(folder, "a")
    add = inotify._add
    removed: list[int] = []

    def add_file(path: str, mask: int) -> int:
        if path.endswith(".."):
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(path, mask)

    monkeypatch.setattr(inotify, "_add", add_file)
    monkeypatch.setattr(inotify, "remove", removed.append)
    assert inotify.add(cgroup.path, {}) == ()
    assert len(removed) == 1
    assert inotify.add(cgroup.path, removed) == ()  # it is somebody else's as well
    assert len(removed) == 1
    inotify.close()


async def test_without_inotify_cgroups_are_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    def refuse() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(cgroups, "_Inotify", refuse)
    told: list[str] = []
    watched = Cgroups()
    cgroup = make(folder, "a")
    watched.watch("c0", cgroup, lambda: told.append("c0"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watched.run)
        await trio.sleep(2)
        assert told == []
        assert watched.method == "inotify, 1 looked at twice a second"
        remove(cgroup)
        await trio.sleep(2)
        assert told == ["c0"]
        nursery.cancel_scope.cancel()


async def test_what_is_empty_already_is_told_at_once(folder: Path) -> None:
    told: list[str] = []
    watched = Cgroups()
    watched.watch("c0", make(folder, "a", populated=0), lambda: told.append("c0"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watched.run)
        await _until(lambda: told == ["c0"])
        watched.watch("c1", Cgroup(str(folder / "gone"), 5), lambda: told.append("c1"))
        assert told == ["c0", "c1"]
        nursery.cancel_scope.cancel()


async def test_what_cannot_be_seen_is_looked_at_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    told: list[str] = []
    watched = Cgroups()
    cgroup = make(folder, "a")
    mounts = cgroups.find_mounts()
    monkeypatch.setattr(cgroups, "find_mounts", list)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watched.run)
        await trio.lowlevel.checkpoint()
        watched.watch("c0", cgroup, lambda: told.append("c0"))
        await trio.sleep(1)
        assert watched.method == "inotify, 1 looked at twice a second"
        await trio.sleep(2)
        assert told == []
        monkeypatch.setattr(cgroups, "find_mounts", lambda: mounts)
        (Path(cgroup.path) / "cgroup.events").write_text("populated 0\n")
        await trio.sleep(2)
        assert told == ["c0"]
        nursery.cancel_scope.cancel()


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await trio.sleep(0.001)
    raise AssertionError("it did not come to pass")
