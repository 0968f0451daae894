"""A separate cgroup for a command, below the caller's cgroup, if the caller may make one."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker.launcher.mounts import parse_mountinfo

_PREFIX: Final = "buswarden-exec-"
_EMPTY_WITHIN: Final = (
    1.0  # seconds between the kill of the last process and the removal of the empty cgroup
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnCgroup:
    """The path of the cgroup, or the reason why there is none."""

    path: str = ""
    why_not: str = ""


@contextlib.contextmanager
def own_cgroup() -> Iterator[OwnCgroup]:
    """Make a cgroup for the time of the block, and kill its processes at the end."""
    try:
        folder = _make()
    except OSError as exc:
        yield OwnCgroup(why_not=f"{exc.filename or 'no cgroup2'}: {exc.strerror or exc}")
        return
    try:
        yield OwnCgroup(path=str(folder))
    finally:
        _remove(folder)


def _make() -> Path:
    own = _find_own()
    # A caller without write access here may not move a process out of this cgroup either.
    with (own / "cgroup.procs").open("ab"):
        pass
    for left in own.glob(f"{_PREFIX}*"):
        if not Path("/proc", left.name.removeprefix(_PREFIX)).exists():
            with contextlib.suppress(OSError):
                left.rmdir()
    folder = own / f"{_PREFIX}{os.getpid()}"
    folder.mkdir(mode=0o755, exist_ok=True)
    return folder


def _find_own() -> Path:
    """Return the folder of this process's cgroup in the unified hierarchy. Raises OSError."""
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape")
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    ours = next((line[3:] for line in lines.splitlines() if line.startswith("0::/")), None)
    unified = [line for line in text.splitlines() if " - cgroup2 " in line]
    for mount in parse_mountinfo("\n".join(unified)):
        if ours is not None and Path(ours).is_relative_to(mount.root):
            return Path(mount.point) / Path(ours).relative_to(mount.root)
    raise OSError("there is no unified hierarchy")


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / "cgroup.kill").write_text("1", encoding="ascii")
    until = time.monotonic() + _EMPTY_WITHIN
    while time.monotonic() < until:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.005)
        else:
            return
