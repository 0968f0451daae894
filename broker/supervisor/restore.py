"""Giving a new gate what an old one served: sandboxes made again from their records and from the sockets that are held."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from broker.engines.held import PIPE, Held
from broker.gate.control import SandboxSpec
from broker.supervisor.config import Limits
from broker.supervisor.registry import Record
from broker.supervisor.sockets import Bound
from broker.supervisor.spec import make_spec
from policy.rules import AccessList


def is_held(record: Record, held: Held) -> bool:
    """Say whether all of a sandbox that listens is held: its sockets, and its pipe if it has one."""
    wanted = {*record.sockets, PIPE} if record.close_notify else {*record.sockets}
    return record.listening and wanted <= set(held.of(record.id))


def make_again(
    record: Record, access: AccessList, held: Held, limits: Limits, folder: Path
) -> tuple[SandboxSpec, Sequence[int]]:
    """Return the sandbox as the gate is to have it, and its descriptors, which stay held."""
    fds = held.of(record.id)
    bound = {bus: _find(record, bus, fds[bus], folder) for bus in record.sockets}
    return make_spec(record, access, bound, fds.get(PIPE), limits)


def _find(record: Record, bus: str, fd: int, folder: Path) -> Bound:
    """Return a socket of ours or of the caller's, as it was when it was made."""
    path = record.sockets[bus]
    guid = record.addresses[bus].rpartition("guid=")[2]
    device, inode = _identify(path, folder)
    return Bound(fd=fd, path=path, guid=guid, device=device, inode=inode)


def _identify(path: str, folder: Path) -> tuple[int, int]:
    """Return which file it is if we made it: those are in our folder, where nobody else makes any."""
    if path.startswith("\0") or Path(path).parent != folder:
        return 0, 0
    try:
        info = os.lstat(path)
    except OSError:
        return 0, 0
    return (info.st_dev, info.st_ino) if stat.S_ISSOCK(info.st_mode) else (0, 0)
