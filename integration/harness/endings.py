"""A host that listens for the ends of sandboxes, and apps that end in all ways."""

import os
from typing import Final

from integration.harness.processes import PYTHON
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    MANAGE,
    NAME,
    Sandbox,
    Warden,
)


class Ends:
    """Both signals of each end, which have to come in pairs."""

    def __init__(self, warden: Warden) -> None:
        self._warden = warden
        self._client = warden.connect_host()
        for interface, member in ((CONTAINERS, "InstanceRemoved"), (MANAGE, "SandboxEnded")):
            self._client.add_match(f"sender='{NAME}',interface='{interface}',member='{member}'")

    def wait(self, timeout: float = 10.0) -> tuple[str, str]:
        """Return path and reason of the next end."""
        (removed,) = self._client.wait_signal("InstanceRemoved", timeout).values
        path, reason = self._client.wait_signal("SandboxEnded", timeout).values
        assert path == removed
        return path, reason

    def wait_for(self, sandbox: Sandbox, reason: str) -> None:
        """Wait for the next end, and assert that it is this one, that its socket is gone, and nothing else has ended."""
        assert self.wait() == (sandbox.path, reason)
        assert not sandbox.socket.exists()
        assert self.told() == []

    def told(self) -> list[tuple[str, str]]:
        """Return all that ended up to now: what the supervisor says next comes behind it."""
        self._client.ask(NAME, CONTAINERS_PATH, "org.freedesktop.DBus.Peer", "Ping")
        signals = [m for m in self._client.drain(0) if m.header.member == "SandboxEnded"]
        return [(path, reason) for path, reason in (message.values for message in signals)]


# Each says a line when it is as its name says, and ends, or goes on, when it gets one.
_SCRIPTS: Final = {
    "plain": "print('ready', flush=True); input()",
    "forks": """
import os, sys
if os.fork():
    os._exit(0)
print('ready', os.getpid(), flush=True)
input()
""",
    "execs": """
import os, sys
for fd in sys.argv[1:]:
    os.set_inheritable(int(fd), True)
os.execv(sys.executable, [sys.executable, '-c', "print('ready', flush=True); input()"])
""",
    "double-forks": """
import os, sys
if os.fork():
    os.wait()
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
print('ready', os.getpid(), flush=True)
input()
""",
    "closes": """
import os, sys
for fd in sys.argv[1:]:
    os.close(int(fd))
print('ready', flush=True)
input()
""",
    "threads": """
import ctypes, threading
def go_on():
    print('ready', flush=True)
    input()
    import os
    os._exit(0)
threading.Thread(target=go_on).start()
ctypes.CDLL(None).pthread_exit(None)
""",
}


def app(kind: str, *fds: int) -> list[str]:
    """Return the command of an app that gets these descriptors."""
    return [PYTHON, "-c", _SCRIPTS[kind], *map(str, fds)]


def count_fds(*pids: int) -> int:
    """Return how many descriptors these processes have together."""
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)  # noqa: PTH208 - counted, not read
