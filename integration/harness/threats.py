"""What every test of docs/threats.md has in common: one that attacks, others who must not notice, and the bill afterwards.

A test takes `scene` (conftest.py), attacks by `scene.attack()` or `scene.raw()`, and checks what it must see. The
fixture does the rest while the attackers are still connected: another sandbox, another connection of the same sandbox
and a host go on working. When they are gone, the gate's descriptors, tables and memory are back where they were.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from integration.harness.buses import Bus, open_bus
from integration.harness.rawclient import RawClient, connect_socket
from integration.harness.scripts import auth, echo, hello_message, open_fds, read_until
from integration.harness.service import ECHO, running_service
from integration.harness.supervised import Warden, open_warden, wait_for

MIB: Final = 1024 * 1024
ERROR: Final = "org.freedesktop.DBus.Error."
# Small, so that a test can reach them; large enough for everything else that tests do.
SMALL_LIMITS: Final[Mapping[str, int]] = {
    "bytes_held": 4 * MIB,
    "bytes_queued": 4 * MIB,
    "pending_calls": 32,
    "match_rules": 16,
    "names": 8,
}
# A second of an allocator's habits; a leak of what one attack sent is more.
MEMORY_SLACK: Final = 24 * MIB
RULES: Final = (f"send:{ECHO}", "own:org.example.V*")


class Scene:
    """One attack: the sandbox that it comes from, and those who must not notice."""

    def __init__(self, warden: Warden, rules: Sequence[str] = RULES) -> None:
        self.warden: Final = warden
        self.villain: Final = warden.add_server("org.example.Villain", rules=rules)
        self.sibling: Final = warden.connect(self.villain)
        self.other: Final = warden.connect(
            warden.add_server("org.example.Other", rules=[f"send:{ECHO}"])
        )
        self.host: Final = warden.connect_host()
        self._sockets: Final[list[socket.socket]] = []

    @property
    def kind(self) -> str:
        """Which bus it is: "dbus-daemon" or "dbus-broker"."""
        return self.warden.bus.kind

    def attack(self, *, hello: bool = True) -> RawClient:
        """Return a new connection of the attacker."""
        return self.warden.connect(self.villain, hello=hello)

    def raw(self, data: bytes = b"", fds: Sequence[int] = ()) -> socket.socket:
        """Return a bare connection of the attacker that has sent these bytes."""
        sock = connect_socket(self.villain.address)
        self._sockets.append(sock)
        sock.settimeout(5)
        if fds:
            socket.send_fds(sock, [data], list(fds))
        elif data:
            sock.sendall(data)
        return sock

    def greeted(self, negotiate: bytes = b"NEGOTIATE_UNIX_FD\r\n") -> socket.socket:
        """Return a bare connection that has said Hello, and has been answered."""
        sock = self.raw(auth() + negotiate + b"BEGIN\r\n" + hello_message())
        read_until(sock, b"NameAcquired")
        return sock

    def others_work(self) -> None:
        """Assert that nobody else notices anything."""
        for client in (self.other, self.host):
            echo(client)

    def sibling_works(self) -> None:
        """Assert that the attacker's own sandbox serves another of its connections."""
        echo(self.sibling)

    def connections(self) -> int:
        """Return how many connections of the attacker's sandbox there are, but for the sibling."""
        return len(self.warden.show(self.villain)["connections"]) - 1

    def use(self) -> dict[str, int]:
        """Return what the attacker's sandbox uses of its budgets."""
        return dict(self.warden.show(self.villain).get("use", {}))

    def leave(self) -> None:
        """End what the attacker has open."""
        while self._sockets:
            self._sockets.pop().close()

    def assert_alive(self, client: RawClient) -> None:
        """Assert that the gate still serves this connection."""
        client.queue.clear()
        echo(client)

    def assert_closed(self, client: RawClient, timeout: float = 3.0) -> None:
        """Assert that the gate ended this connection, and contained it."""
        assert client.is_closed(timeout), "the connection was not ended"
        assert "Traceback" not in self.warden.log


def is_closed(sock: socket.socket, timeout: float = 3.0) -> bool:
    """Return whether the other end closes within the time, whatever else it sends."""
    sock.settimeout(timeout)
    with contextlib.suppress(ConnectionError):
        try:
            while sock.recv(65536):
                pass
        except TimeoutError:
            return False
    return True


def memory(pid: int) -> int:
    """Return how many bytes of memory a process has to itself."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell")


@contextmanager
def open_scene(warden: Warden, rules: Sequence[str] = RULES) -> Iterator[Scene]:
    """Set the scene; at the end, see that nobody noticed, and that nothing is left."""
    before_fds, before_memory = open_fds(warden), memory(warden.gate_pid)
    scene = Scene(warden, rules)
    try:
        yield scene
        scene.others_work()
        scene.sibling_works()
        assert warden.who(scene.sibling.unique_name) == scene.villain.path
    finally:
        scene.leave()
    warden.close_apps(but=(scene.sibling, scene.other, scene.host))
    try:
        wait_for(lambda: _is_quiet(scene))
    except AssertionError:
        print(scene.connections(), scene.use())
        raise
    warden.tidy()
    wait_for(lambda: open_fds(warden) == before_fds)
    assert memory(warden.gate_pid) - before_memory < MEMORY_SLACK, "memory was not given back"


def _is_quiet(scene: Scene) -> bool:
    """Say whether only the sibling is left of the attacker, and what it holds."""
    busy = {"bytes_held", "bytes_queued", "pending_calls", "fds"}
    used: dict[str, Any] = scene.use()
    return scene.connections() == 0 and not any(used.get(key) for key in busy)


def write_limits(folder: Path, limits: Mapping[str, int]) -> Path:
    """Return a configuration file that sets these limits."""
    path = folder / "config.toml"
    path.write_text("[limits]\n" + "".join(f"{name} = {limits[name]}\n" for name in limits))
    return path


@contextmanager
def open_threatened(
    kind: str, folder: Path, limits: Mapping[str, int] = SMALL_LIMITS
) -> Iterator[Warden]:
    """Run a bus of that kind, the service on it, and a supervisor with these limits."""
    config = write_limits(folder, limits)
    with (
        open_bus(kind, folder) as bus,
        running_service(bus.address),
        open_warden(bus, folder / "run", "--config", str(config)) as warden,
    ):
        yield warden


@contextmanager
def open_limited(bus: Bus, folder: Path, **limits: int) -> Iterator[Warden]:
    """Run the service and a supervisor with these limits on a bus that runs already."""
    config = write_limits(folder, {**SMALL_LIMITS, **limits})
    with (
        running_service(bus.address),
        open_warden(bus, folder / "run", "--config", str(config)) as warden,
    ):
        yield warden


def processor_time(pid: int) -> float:
    """Return how many seconds of processor time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def assert_rests(pid: int, seconds: float = 0.3) -> None:
    """Assert that a process does nothing: a descriptor that is ready for ever would show."""
    before = processor_time(pid)
    time.sleep(seconds)
    assert processor_time(pid) - before <= seconds / 5, "it spins"
