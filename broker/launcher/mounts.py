"""Mount points as /proc/self/mountinfo lists them, and comparison of folders by their files. Pure.

Two paths can lead to the same files, because a file system may be mounted twice and a folder may be
bound elsewhere. So paths are compared by place: the device, and the path inside the device's file
system.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

_ESCAPED: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A line of mountinfo: `root` of the file system on `device` appears at `point`."""

    device: str
    root: str
    point: str


def parse_mountinfo(text: str) -> tuple[Mount, ...]:
    """Return the mounts in the order in which they were made."""
    mounts = []
    for line in text.splitlines():
        fields = line.split(" ")
        if len(fields) > 5:
            mounts.append(
                Mount(device=fields[2], root=_unescape(fields[3]), point=_unescape(fields[4]))
            )
    return tuple(mounts)


def mounts_below(folder: str, mounts: Iterable[Mount]) -> list[str]:
    """Return the mount points inside a folder, outer ones first."""
    found = {mount.point for mount in mounts if mount.point != folder}
    return sorted((point for point in found if is_below(point, folder)), key=path_order)


def same_files(one: str, other: str, mounts: Sequence[Mount]) -> bool:
    """Return whether either of two resolved paths is or contains the other, through any mount."""
    device, path = _place(one, mounts)
    other_device, other_path = _place(other, mounts)
    if device != other_device:
        return False
    return is_below(path, other_path) or is_below(other_path, path)


def same_device(one: str, other: str, mounts: Sequence[Mount]) -> bool:
    """Return whether two resolved paths are in the same file system.

    If so, a file may have a hard link below each path.
    """
    return _place(one, mounts)[0] == _place(other, mounts)[0]


def is_below(path: str, folder: str) -> bool:
    """Return whether a path is the folder or inside the folder."""
    return PurePosixPath(path).is_relative_to(folder)


def path_order(path: str) -> tuple[str, ...]:
    """Return a sort key that puts a folder before its content."""
    return PurePosixPath(path).parts


def _place(path: str, mounts: Sequence[Mount]) -> tuple[str, str]:
    """Return the device of a path, and the path inside the device's file system."""
    best = Mount(device="", root="/", point="/")
    for mount in mounts:
        # A later mount at the same point hides the earlier one.
        if is_below(path, mount.point) and len(mount.point) >= len(best.point):
            best = mount
    inside = PurePosixPath(path).relative_to(best.point)
    return best.device, str(PurePosixPath(best.root) / inside)


def _unescape(text: str) -> str:
    return _ESCAPED.sub(lambda found: chr(int(found[1], 8)), text)
