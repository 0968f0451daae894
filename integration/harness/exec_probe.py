"""The attacker inside `exec`: a script for any Python, and what a test makes of its report.

It connects to every socket that it finds in any folder that it sees, and to those that it is told of, then tries
what the attacks of docs/threats.md tried. It prints one JSON object.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

from integration.harness.clients import Outcome

PYTHON: Final = "/usr/bin/python3"
_SOURCE: Final = r"""
import ctypes, json, os, socket, stat, struct, subprocess, sys
ORDER = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
report = {}

def reach(name):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        try:
            folder, _, base = name.rpartition("/")
            if len(os.fsencode(name)) > 100 and folder:
                os.chdir(folder)
                name = base
            sock.connect("\0" + name[1:] if name.startswith("@") else name)
        except OSError:
            return False
    return True

def walk(folder, found):
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.path in ("/usr", "/proc", "/sys", "/dev"):
            continue
        try:
            mode = entry.stat(follow_symlinks=False).st_mode
        except OSError:
            continue
        if stat.S_ISSOCK(mode):
            found.append(entry.path)
        elif stat.S_ISDIR(mode):
            walk(entry.path, found)

def sockets():
    found = []
    for top in ORDER["walk"]:
        walk(top, found)
    # By the descriptors that it was given, and the roots of processes that it sees.
    for link in [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]:
        if os.path.isdir(link):
            walk(link + "/", found)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for place in ORDER["reach"]:
            found.append(f"/proc/{pid}/root{place}")
    with open("/proc/net/unix", "rb") as file:
        names = [line.split(None, 7)[7] for line in file.read().splitlines()[1:] if line.count(b"@")]
    found += [os.fsdecode(name) for name in names if name.startswith(b"@")]
    return found + ORDER["reach"]

def errno_of(call, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(call, *arguments)
    return 0 if result >= 0 else ctypes.get_errno()

def cgroups():
    # X2: in a nested user and cgroup namespace cgroup2 can be mounted, writable.
    script = "mount -t cgroup2 none /tmp && ls -d /tmp/cgroup.procs /tmp/cgroup.kill; find /tmp -name cgroup.kill | head -3"
    nested = subprocess.run(["unshare", "-U", "-r", "-m", "-C", "sh", "-c", script], capture_output=True, text=True)
    return {"nested": nested.returncode == 0, "seen": nested.stdout.split(),
            "own": open("/proc/self/cgroup").read().split()}

def init():
    # X3: pid 1 and its descriptors.
    tried = {
        "pidfd_open": errno_of(434, 1, 0),
        "ptrace_attach": errno_of(101, 16, 1, 0, 0),
        "ptrace_seize": errno_of(101, 0x4206, 1, 0, 0),
        "ptrace_high_bits": errno_of(101, 16, ctypes.c_long((7 << 32) | 1), 0, 0),
        "process_vm_readv": errno_of(310, 1, 0, 0, 0, 0, 0),
        "pidfd_getfd": errno_of(438, os.pidfd_open(os.getpid()), 0, 0),
        "open_by_handle_at": errno_of(304, 0, 0, 0),
    }
    for name in ("fd", "mem", "root", "environ", "maps", "task/1/fd"):
        try:
            os.open(f"/proc/1/{name}", os.O_RDONLY)
            tried[name] = 0
        except OSError as exc:
            tried[name] = exc.errno
    return tried

def keys():
    # X5: a key of the session that started us, and any at all.
    return {"get": errno_of(250, 0, -3, 0), "search": errno_of(250, 10, -3, b"user", b"bw-secret", 0),
            "read": errno_of(250, 11, ORDER["key"], 0, 0), "add": errno_of(248, b"user", b"x", b"y", 1, -3)}

def settings():
    found = []
    for folder, _, files in os.walk("/proc/sys"):
        found += [f"{folder}/{name}" for name in files if os.access(f"{folder}/{name}", os.W_OK)]
    return [name for name in found if not os.statvfs(name).f_flag & os.ST_RDONLY]

report["reached"] = sorted({name for name in sockets() if reach(name)})
report["fds"] = sorted(int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}"))
report["pids"] = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
report["uid"] = os.getuid()
for part in (cgroups, init, keys, settings):
    if part.__name__ in ORDER["parts"]:
        report[part.__name__] = part()
print(json.dumps(report))
"""


def probe(
    *parts: str, reach: Sequence[str] = (), walk: Sequence[str] = ("/",), key: int = 0
) -> list[str]:
    """Return the command that attacks.

    `parts`: what is tried besides sockets. `reach`: addresses, an abstract one with `@`. `walk`: where to look
    for sockets. `key`: the number of a key of the host.
    """
    order = {"parts": list(parts), "reach": list(reach), "walk": list(walk), "key": key}
    return [PYTHON, "-I", "-c", _SOURCE, json.dumps(order)]


def report_of(outcome: Outcome) -> dict[str, Any]:
    """Return what it reported, and fail if it did not run."""
    assert outcome.ok, (outcome.code, outcome.err)
    return dict(json.loads(outcome.out.splitlines()[-1]))
