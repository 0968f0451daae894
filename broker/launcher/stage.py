"""The program between `buswarden exec` and bubblewrap: `python -I -S stage.py FD`.

FD is a descriptor of the order, in JSON. The program runs these steps:

- Join a new session keyring, and move into the command's cgroup.
- Enter a new mount namespace, and mount each folder of the host there as a read-only overlay.
  bubblewrap 0.8 cannot mount overlays. A socket in an overlay is not the file that a program of the
  host listens on, so connect(2) reaches no listener, whatever the name of the socket and whenever
  the socket was bound.
- With the host's network, cut off the host's abstract sockets by Landlock.
- Become bubblewrap.

The program uses the standard library alone and runs without this project's packages. Errors go to
descriptor 2, one line each.
"""

import ctypes
import errno
import json
import os
import signal
import stat
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

# The treatments of a source. With SHOWN and BELOW a folder becomes an overlay, and a file is bound.
SHOWN: Final = "shown"
# a mount inside a shown folder; an empty folder stands in for a mount that cannot be shown
BELOW: Final = "below"
LIVE: Final = "live"  # a folder itself, writable
SOCKET: Final = "socket"
EMPTY_FOLDER, EMPTY_FILE = -1, -2
# Descriptors as bubblewrap and the shell inside get them. dash takes a single digit only.
STDERR: Final = 3
STATUS: Final = 4
FILTER: Final = 5
_NEW_NAMESPACE, _NEW_USER = 0x20000, 0x10000000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_PARENT_DEATH: Final = 1  # PR_SET_PDEATHSIG
_JOIN_SESSION_KEYRING: Final = 1
# Since Linux 5.13 these numbers are the same on every architecture.
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446
_LANDLOCK_VERSION: Final = 1
_SCOPE_ABSTRACT_SOCKETS: Final = 1
_FIRST_WITH_SCOPES: Final = 6
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def can_scope_abstract_sockets() -> bool:
    """Return whether the kernel can deny access to others' abstract sockets (Linux 6.12)."""
    version = _LIBC.syscall(
        _LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(_LANDLOCK_VERSION)
    )
    return int(version) >= _FIRST_WITH_SCOPES


def main(fd: int) -> None:
    """Read the order and become bubblewrap."""
    with os.fdopen(fd, "rb") as file:
        order = json.load(file)
    what = "starting"
    try:
        what = "PR_SET_PDEATHSIG"
        _check(_LIBC.prctl(_PARENT_DEATH, signal.SIGKILL, 0, 0, 0))
        if os.getppid() != order["parent"]:
            sys.exit(1)
        what = "a session keyring of its own"
        _leave_keyring(order["keyctl"])
        what = f"moving into the cgroup {order['cgroup']}"
        _enter_cgroup(order["cgroup"])
        what = "a mount namespace of its own"
        _enter_namespace()
    except OSError as exc:
        _fail(what, exc)
    argv = _mount_all(order)
    try:
        what = "Landlock"
        if order["scope"]:
            _scope_abstract_sockets()
        what = order["bubblewrap"]
        _place_descriptors(order)
        os.execv(order["bubblewrap"], [what, *argv])  # noqa: S606 - it is to become it
    except OSError as exc:
        _fail(what, exc)


def _fail(what: str, exc: OSError) -> None:
    os.write(2, os.fsencode(f"{what}: {os.strerror(exc.errno) if exc.errno else exc}\n"))
    sys.exit(1)


# -- leaving the host ------------------------------------------------------------------------------


def _leave_keyring(keyctl: int) -> None:
    try:
        _check(_LIBC.syscall(keyctl, _JOIN_SESSION_KEYRING, None))
    except OSError as exc:
        if exc.errno != errno.ENOSYS:  # not for a kernel without keyrings
            raise


def _enter_cgroup(path: str) -> None:
    if path:
        with open(f"{path}/cgroup.procs", "w", encoding="ascii") as file:  # noqa: PTH123 - the fewest imports
            file.write("0")


def _enter_namespace() -> None:
    uid, gid = os.getuid(), os.getgid()
    try:
        _check(_LIBC.unshare(_NEW_NAMESPACE))
    except PermissionError:
        _check(_LIBC.unshare(_NEW_NAMESPACE | _NEW_USER))
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
    # Mounts that the host adds later stay outside.
    _mount("none", "/", "", _RECURSIVE | _PRIVATE)


def _scope_abstract_sockets() -> None:
    attributes = struct.pack("=QQQ", 0, 0, _SCOPE_ABSTRACT_SOCKETS)
    fd = _LIBC.syscall(
        _LANDLOCK_CREATE,
        ctypes.c_char_p(attributes),
        ctypes.c_size_t(len(attributes)),
        ctypes.c_uint32(0),
    )
    _check(fd)
    _check(_LIBC.syscall(_LANDLOCK_RESTRICT, fd, ctypes.c_uint32(0)))


# -- mounts ----------------------------------------------------------------------------------------


def _mount_all(order: Mapping[str, Any]) -> list[str]:
    """Mount each part below the staging folder, and return the arguments for bubblewrap."""
    staging = order["staging"]
    argv = list(order["before"])
    # All sources are opened first, because the mount on the staging folder hides its content.
    opened = [_open(*part) for part in order["parts"]]
    try:
        _mount("tmpfs", staging, "tmpfs", _NO_SUID | _NO_DEVICES, "mode=0755")
        os.mkdir(f"{staging}/empty")  # noqa: PTH102
    except OSError as exc:
        _fail(staging, exc)
    for number, ((source, at, kind), fd) in enumerate(zip(order["parts"], opened, strict=True)):
        place = f"{staging}/{number}"
        try:
            _mount_part(fd, place, kind, f"{staging}/empty")
        except OSError as exc:
            _fail(f"showing {source}", exc)
        argv += ("--bind" if kind == LIVE else "--ro-bind", place, at)
    return [*argv, *order["after"]]


def _open(source: str, _at: str, kind: str) -> int:
    """Return a descriptor of the source, or a stand-in: EMPTY_FOLDER or EMPTY_FILE."""
    try:
        # The path was resolved before. So a link here was put in place since, to lead to another
        # file.
        fd = os.open(source, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as exc:
        if kind != BELOW:
            _fail(source, exc)
        return EMPTY_FOLDER
    if _fits(os.fstat(fd).st_mode, kind):
        return fd
    os.close(fd)
    if kind != BELOW:
        _fail(source, OSError(errno.EINVAL, "another kind of file"))
    return EMPTY_FILE


def _fits(mode: int, kind: str) -> bool:
    if kind == SOCKET:
        return stat.S_ISSOCK(mode)
    return stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and kind != LIVE)


def _mount_part(fd: int, place: str, kind: str, empty: str) -> None:
    path = f"/proc/self/fd/{fd}"
    if fd == EMPTY_FILE or (fd >= 0 and not stat.S_ISDIR(os.fstat(fd).st_mode)):
        os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        if fd >= 0:
            _mount(path, place, "", _BIND)
        return
    os.mkdir(place)  # noqa: PTH102
    if fd == EMPTY_FOLDER:
        return
    if kind == LIVE:
        _mount(path, place, "", _BIND)
        return
    flags = _READ_ONLY | _NO_SUID | _NO_DEVICES
    try:
        # An overlay needs at least two layers, so the second layer is an empty folder.
        _mount("overlay", place, "overlay", flags, f"lowerdir={path}:{empty}")
    except OSError:
        if kind != BELOW:
            raise


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    words = [os.fsencode(word) for word in (source, target, kind)]
    _check(_LIBC.mount(*words, ctypes.c_ulong(flags), os.fsencode(data) or None))


# -- descriptors -----------------------------------------------------------------------------------


def _place_descriptors(order: Mapping[str, Any]) -> None:
    """Put the descriptors 0 to 2, STDERR, STATUS and FILTER in place, and close all others."""
    program = bytes.fromhex(order["filter"])
    filter_fd = os.memfd_create("filter")
    os.write(filter_fd, program)
    os.lseek(filter_fd, 0, os.SEEK_SET)
    fds = (order["stderr"], order["status"], filter_fd)
    high = [_dup_above(fd, FILTER) for fd in fds]
    for fd, number in zip(high, (STDERR, STATUS, FILTER), strict=True):
        os.dup2(fd, number, inheritable=True)
    os.closerange(FILTER + 1, os.sysconf("SC_OPEN_MAX"))


def _dup_above(fd: int, number: int) -> int:
    import fcntl  # noqa: PLC0415 - a module of its own on disk, needed last

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, number + 1)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:  # noqa: PTH123
        file.write(text)


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _arguments(argv: Sequence[str]) -> int:
    return int(argv[1])


if __name__ == "__main__":
    main(_arguments(sys.argv))
