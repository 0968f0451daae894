"""The programs that take part: bus, service, xdg-dbus-proxy, gate, supervisor.

Each is a context manager that starts one, waits until it can be used, and ends it. They share a
scratch folder; all of their sockets are in it.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker.control_protocol import framing, messages as control
from integration.bench.client import BenchError
from integration.harness.processes import is_running
from policy.rules import Access, AccessList, Identity, Rule

ROOT: Final = Path(__file__).resolve().parents[2]
START_TIMEOUT: Final = 20  # seconds
STOP_TIMEOUT: Final = 10  # seconds
Process = subprocess.Popen[bytes]
BUS: Final = "session"
SERVICE: Final = "org.buswarden.Bench"
# What xdg-dbus-proxy's --talk lets through.
TALK: Final = Rule(access=frozenset({Access.SEND, Access.RECEIVE}), name=SERVICE)


@contextlib.contextmanager
def open_process(
    argv: Sequence[str],
    *,
    fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    errors: int | None = None,
) -> Iterator[Process]:
    """Run a program for as long as the block lasts."""
    if shutil.which(argv[0]) is None:
        raise BenchError(f"{argv[0]} is not installed")
    with subprocess.Popen(
        argv,
        cwd=ROOT,
        pass_fds=fds,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What every row needs: a bus with the service on it, and a folder for the sockets."""

    folder: Path
    bus: Path  # its socket

    @property
    def address(self) -> str:
        return f"unix:path={self.bus}"


@contextlib.contextmanager
def open_scene(folder: Path) -> Iterator[Scene]:
    """Run a private dbus-daemon and the service."""
    scene = Scene(folder=folder, bus=folder / "bus")
    daemon = ["dbus-daemon", "--session", "--nofork", "--nopidfile", "--print-address=1"]
    daemon.append(f"--address={scene.address}")
    # Its one message is that it may not raise its descriptor limit.
    with open_process(daemon, errors=subprocess.DEVNULL) as bus_process:
        wait_line(bus_process, "unix:")
        with open_service(scene):
            yield scene


@contextlib.contextmanager
def open_service(scene: Scene) -> Iterator[None]:
    """Run the service that all call."""
    argv = [sys.executable, "-m", "integration.bench.echo", str(scene.bus), SERVICE]
    with open_process(argv) as process:
        wait_line(process, "ready")
        yield


@contextlib.contextmanager
def open_proxy(scene: Scene, path: Path, names: Iterable[str] = ()) -> Iterator[int]:
    """Run an xdg-dbus-proxy that listens at the path, with these names and the service's; yields its pid."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        argv = ["xdg-dbus-proxy", f"--fd={theirs.fileno()}", scene.address, str(path)]
        argv += ["--filter", *(f"--talk={name}" for name in (*names, SERVICE))]
        with open_process(argv, fds=[theirs.fileno()]) as process:
            theirs.close()
            ours.settimeout(START_TIMEOUT)
            if not ours.recv(1):
                raise BenchError("xdg-dbus-proxy ended at its start")
            yield process.pid


class Gate:
    """The other end of a gate's control socket, one request at a time."""

    def __init__(self, connection: socket.socket, pid: int, folder: Path) -> None:
        self.pid = pid
        self._connection = connection
        self._folder = folder
        self._reader = framing.FrameReader()
        self._serial = 0

    def add(self, identifier: str, rules: tuple[Rule, ...]) -> Path:
        """Begin a sandbox with those rules; return the path of its socket."""
        path = self._folder / f"sandbox-{identifier}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen()
            spec = control.SandboxSpec(
                id=identifier,
                identity=Identity(type=SERVICE, app=identifier),
                uid=os.getuid(),
                listeners=(control.Listener(bus=BUS, fd=0),),
                access=AccessList(rules=rules),
            )
            self.ask(control.AddSandbox(spec), [listener.fileno()])
        return path

    @property
    def connection(self) -> socket.socket:
        """The socket, for who pushes requests of their own and takes all of the answers."""
        return self._connection

    def count_throttled(self) -> int:
        """Return how often the budget of messages made a sandbox wait."""
        use = self.ask(control.TakeUsage())
        assert isinstance(use, control.Usage)
        return use.throttled

    def ask(self, request: control.Request, fds: Sequence[int] = ()) -> object:
        """Return the answer of the gate, which has done it. Raises BenchError."""
        self._serial += 1
        envelope = control.Envelope(serial=self._serial, body=request, fds=len(fds))
        frame = framing.make_frame(envelope)
        sent = socket.send_fds(self._connection, [frame], list(fds))
        # Sending nothing fails, too, once a gate that was told to end has done so.
        if sent < len(frame):
            self._connection.sendall(frame[sent:])
        while True:
            data = self._connection.recv(65536)
            if not data:
                raise BenchError("the gate closed its control connection")
            for answer, _ in self._reader.feed(data):
                if isinstance(answer.body, control.Refused):
                    raise BenchError(f"the gate refuses: {answer.body.text}")
                if answer.serial == self._serial:
                    return answer.body


@contextlib.contextmanager
def open_gate_process(path: Path) -> Iterator[Process]:
    """Run a gate that listens for its supervisor at the path."""
    ours, theirs = os.pipe()
    argv = [sys.executable, "-m", "broker.gate", "--control", str(path)]
    argv += ["--ready-fd", str(theirs)]
    quiet = os.environ | {"BUSWARDEN_LOG": "WARNING"}  # no line for each that ends in order
    with (
        os.fdopen(ours, "rb", buffering=0) as ready,
        open_process(argv, fds=[theirs], env=quiet) as process,
    ):
        os.close(theirs)
        if not ready.read(1):
            raise BenchError("the gate ended at its start")
        yield process


@contextlib.contextmanager
def open_gate(scene: Scene) -> Iterator[Gate]:
    """Run a gate without a supervisor."""
    folder = Path(tempfile.mkdtemp(prefix="gate-", dir=scene.folder))
    path = folder / "gate.sock"
    with open_gate_process(path) as process:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(START_TIMEOUT)
            connection.connect(str(path))
            gate = Gate(connection, process.pid, folder)
            gate.ask(control.SetBuses((control.BusSpec(name=BUS, address=scene.address),)))
            yield gate
            gate.ask(control.Shutdown())
            process.wait(STOP_TIMEOUT)


@contextlib.contextmanager
def open_supervisor(scene: Scene) -> Iterator[int]:
    """Run a supervisor with its gate; yields its pid."""
    runtime = scene.folder / "runtime"
    runtime.mkdir(mode=0o700, exist_ok=True)
    environment = os.environ | {
        "XDG_RUNTIME_DIR": str(runtime),
        "DBUS_SESSION_BUS_ADDRESS": scene.address,
    }
    argv = [sys.executable, "-m", "broker.cli", "run", "--bus", f"{BUS}={scene.address}"]
    # It has a line for each sandbox that ends.
    with (scene.folder / "supervisor.log").open("ab") as log:
        with open_process(argv, env=environment, errors=log.fileno()) as process:
            try:
                wait_line(process, "ready")
            except BenchError as exc:
                raise BenchError(f"{exc}: {Path(log.name).read_text()[-500:]}") from exc
            started = family(process.pid)
            yield process.pid
    _end_left_behind(started)


def family(pid: int) -> list[int]:
    """Return the process and all that descend from it."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name of the program, in brackets, may have anything in it.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    members = [pid]
    for member in members:
        members += [child for child, parent in parents.items() if parent == member]
    return members


def wait_line(process: Process, start: str) -> None:
    """Return when the process prints a line that begins so. Raises BenchError if it ends first."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start.encode()):
            return
    raise BenchError(f"{process.args!r} ended at its start")


def _end_left_behind(pids: Sequence[int]) -> None:
    # An orderly end takes the gate along. One that did not would disturb the next row.
    for pid in filter(is_running, pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            raise BenchError(f"process {pid} of the supervisor outlived it")
