"""`buswarden proxy` and the real xdg-dbus-proxy, run in the same way: for tests that hold the one to the other.

The real one is Debian's, 0.1.4 with the fixes of later versions. It takes no pipelined handshake, so clients
here wait for each answer.
"""

import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from integration.harness.buses import Bus, open_bus
from integration.harness.processes import PYTHON, Process, make_env, running
from integration.harness.rawclient import BUS, BUS_PATH, RawClient
from integration.harness.service import ECHO, PATH, running_service

OURS: Final = "buswarden"
THEIRS: Final = "xdg-dbus-proxy"
PROGRAMS: Final = {OURS: (PYTHON, "-m", "broker.cli", "proxy"), THEIRS: (THEIRS,)}

OTHER: Final = "org.example.Other"  # of the same owner as ECHO
SECOND: Final = "org.example.Second"  # of another owner
STARTED: Final = "org.example.Started"  # of nobody until the bus starts the service


class PatientClient(RawClient):
    """A client of either proxy, which waits for the answer to each line of the handshake."""

    def round_trip(self) -> None:
        # xdg-dbus-proxy refuses Ping of the bus, and lets GetId pass whatever the options are.
        self.driver("GetId")

    def _authenticate(self, uid: int) -> None:
        self.sock.settimeout(10)
        self._say(b"\0AUTH EXTERNAL " + str(uid).encode().hex().encode(), b"OK ")
        self._say(b"NEGOTIATE_UNIX_FD", b"AGREE_UNIX_FD")
        self.sock.sendall(b"BEGIN\r\n")

    def _say(self, line: bytes, answer: bytes) -> None:
        self.sock.sendall(line + b"\r\n")
        said = b""
        while not said.endswith(b"\r\n"):
            data = self.sock.recv(4096)
            if not data:
                raise EOFError("closed during authentication")
            said += data
        if not said.startswith(answer):
            raise PermissionError(said.decode())


@dataclass(slots=True, kw_only=True)
class Proxy:
    """A proxy that runs."""

    kind: str
    path: Path
    process: Process
    fd: int  # our end of --fd; -1: closed
    clients: list[RawClient] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"unix:path={self.path}"

    @property
    def fds(self) -> int:
        """How many descriptors it has."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def connect(self, path: Path | None = None, *, hello: bool = True) -> PatientClient:
        """Return a new client, which is closed with the proxy."""
        client = PatientClient.connect(f"unix:path={path or self.path}", hello=hello)
        self.clients.append(client)
        return client

    def close_fd(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def end(self) -> int:
        """Close our end of --fd, and return the exit code."""
        self.close_fd()
        return self.process.wait()


@contextmanager
def open_proxy(
    kind: str,
    path: Path,
    arguments: Sequence[str],
    *,
    wrapper: Sequence[str] = (),
    env: dict[str, str] | None = None,
    log: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[Proxy]:
    """Run a proxy with --fd and these arguments, from when it is ready to the end of the block."""
    ours, its = socket.socketpair()
    argv = [*wrapper, *PROGRAMS[kind], f"--fd={its.fileno()}", *arguments]
    with running(argv, pass_fds=[its.fileno(), *pass_fds], env=env, log=log) as process:
        its.close()
        with ours:
            ours.settimeout(20)
            if ours.recv(1) != b"x":
                raise EOFError(f"{argv} did not start: {process.log}")
            fd = os.dup(ours.fileno())
        proxy = Proxy(kind=kind, path=path, process=process, fd=fd)
        try:
            yield proxy
        finally:
            for client in proxy.clients:
                client.close()
            proxy.close_fd()


@dataclass(slots=True, kw_only=True)
class World:
    """A bus with services on it, and somebody on the host."""

    bus: Bus
    folder: Path
    host: RawClient
    _number: int = 0

    def next_path(self) -> Path:
        self._number += 1
        return self.folder / f"proxy{self._number}"


@contextmanager
def open_world(kind: str, folder: Path) -> Iterator[World]:
    """Run a bus of that kind with the service twice: under ECHO and OTHER, and under SECOND."""
    command = [PYTHON, "-m", "integration.harness.service", "--name", STARTED]
    with (
        open_bus(kind, folder, {STARTED: command}) as bus,
        running_service(bus.address, ECHO, OTHER),
        running_service(bus.address, SECOND),
        RawClient.connect(bus.address) as host,
    ):
        yield World(bus=bus, folder=folder, host=host)


@dataclass(slots=True, kw_only=True)
class Scene:
    """One of the programs in front of a world."""

    kind: str
    world: World

    @contextmanager
    def proxy(self, *options: str) -> Iterator[Proxy]:
        """Run the proxy with one group of these options; afterwards it must have ended well."""
        path = self.world.next_path()
        arguments = [self.world.bus.address, str(path), *options]
        with open_proxy(self.kind, path, arguments) as proxy:
            yield proxy
            assert proxy.end() == 0
            assert not path.exists()

    @contextmanager
    def client(self, *options: str) -> Iterator[PatientClient]:
        """Run the proxy with --filter and these options, with one client."""
        with self.proxy("--filter", *options) as proxy:
            yield proxy.connect()


def error_of(client: RawClient, member: str, signature: str = "", *values: object) -> str:
    """Return the error's name of a call to the bus, or "" if there was none."""
    return client.call(BUS, BUS_PATH, BUS, member, signature, values).error or ""


def echo_error(client: RawClient, name: str, **named: object) -> str:
    """Return the error's name of a call of Echo, or "" if it was answered."""
    interface = str(named.get("interface", ECHO))
    path = str(named.get("path", PATH))
    member = str(named.get("member", "Echo"))
    flags = named.get("flags", 0)
    assert isinstance(flags, int)
    reply = client.call(name, path, interface, member, "s", ("hello",), flags=flags)
    if reply.error is None:
        assert reply.values == ("hello",)
    return reply.error or ""


def refused(*arguments: str, env: Mapping[str, str] | None = None) -> str:
    """Run ours where it cannot start; return what it says."""
    done = subprocess.run(
        [*PROGRAMS[OURS], *arguments],
        env=make_env(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return line
