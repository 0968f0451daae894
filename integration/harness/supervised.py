"""buswarden itself under test: a supervisor with its gate on a real bus, driven over D-Bus and by its CLI."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from integration.harness.buses import Bus
from integration.harness.clients import Outcome, run
from integration.harness.processes import (
    PYTHON,
    Process,
    is_running,
    running,
    wait_gone,
    wait_until,
)
from integration.harness.rawclient import CallError, RawClient
from integration.harness.values import Variant

NAME: Final = "org.buswarden.Broker1"
CONTAINERS_PATH: Final = "/org/freedesktop/DBus"
CONTAINERS: Final = "org.freedesktop.DBus.Containers1"
MANAGE_PATH: Final = "/org/buswarden/Broker1"
MANAGE: Final = "org.buswarden.Broker1"
TYPE: Final = "org.example.Sandbox"  # the container type, unless a test says another

# Flags of a(usos). The path is never empty, for it is an `o`: any path is `/` with PATH_SUBTREE.
SEE, SEND, RECEIVE, OWN = 0x1, 0x2, 0x4, 0x8
NAME_SUBTREE, PATH_SUBTREE, INTERFACE_IS_MEMBER, DENY = 0x10, 0x20, 0x40, 0x80
PEER_HOST, PEER_SAME_APP, PEER_APP = 0x100, 0x200, 0x400

Usos = tuple[int, str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """What one AddServer call gave."""

    path: str
    socket: Path
    address: str

    @property
    def id(self) -> str:
        return self.path.rpartition("/")[2]

    def connect(self, *, hello: bool = True) -> RawClient:
        """Return a new connection of an app in this sandbox."""
        return RawClient.connect(self.address, hello=hello)


@dataclass(slots=True, kw_only=True)
class Warden:
    """A supervisor that runs, and a host connection to its bus (the creator of its sandboxes)."""

    bus: Bus
    runtime: Path  # $XDG_RUNTIME_DIR of the supervisor
    process: Process
    host: RawClient
    env: Mapping[str, str] = field(default_factory=dict)  # of the supervisor and its commands
    gate_pid: int = 0
    _clients: list[RawClient] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.runtime / "buswarden"

    @property
    def log(self) -> str:
        """What the supervisor and its gate said on standard error."""
        return self.process.log

    def add_server(
        self,
        app: str = "org.example.App",
        *,
        type: str = TYPE,  # noqa: A002 (the specification's word)
        metadata: Mapping[str, Variant] | None = None,
        rules: Sequence[str] = (),
        deny: Sequence[str] = (),
        allow: Sequence[Usos] = (),
        fds: Mapping[str, int] | None = None,
        creator: RawClient | None = None,
        **named: Variant,
    ) -> Sandbox:
        """Call AddServer. Raises CallError.

        `rules` and `deny` are the command line's text, `allow` is a(usos), `fds` are named arguments of
        type h, and `named` are the others. `creator` is who calls, if not `host`.
        """
        arguments: dict[str, Variant] = dict(named)
        if rules or deny:
            pairs = [(False, text) for text in rules] + [(True, text) for text in deny]
            arguments["Rules"] = Variant("a(bs)", pairs)
        if allow:
            arguments["Allow"] = Variant("a(usos)", list(allow))
        for index, name in enumerate(fds or {}):
            arguments[name] = Variant("h", index)
        values = (type, app, dict(metadata or {}), arguments)
        return self._add(creator or self.host, values, list((fds or {}).values()))

    def _add(self, creator: RawClient, values: Sequence[Any], fds: Sequence[int]) -> Sandbox:
        reply = creator.call(
            NAME, CONTAINERS_PATH, CONTAINERS, "AddServer", "ssa{sv}a{sv}", values, fds=fds
        )
        if reply.error is not None:
            raise CallError(reply.error, str(reply.values[0]) if reply.values else "")
        path, socket_path, address = reply.values
        assert socket_path.endswith(b"\0"), socket_path
        return Sandbox(path=path, socket=Path(socket_path[:-1].decode()), address=address)

    def connect(self, sandbox: Sandbox, *, hello: bool = True) -> RawClient:
        """Return a new connection of an app in the sandbox, closed at the end of the test."""
        client = sandbox.connect(hello=hello)
        self._clients.append(client)
        return client

    def connect_host(self) -> RawClient:
        """Return a new connection that is in no sandbox, closed at the end of the test."""
        client = RawClient.connect(self.bus.address)
        self._clients.append(client)
        return client

    def containers(self, member: str, signature: str = "", *values: Any) -> tuple[Any, ...]:
        """Call a method of Containers1. Raises CallError."""
        return self.host.ask(NAME, CONTAINERS_PATH, CONTAINERS, member, signature, values)

    def manage(self, member: str, signature: str = "", *values: Any) -> tuple[Any, ...]:
        """Call a method of our management interface. Raises CallError."""
        return self.host.ask(NAME, MANAGE_PATH, MANAGE, member, signature, values)

    def change_access(
        self,
        sandbox: Sandbox,
        *,
        rules: Sequence[str] = (),
        deny: Sequence[str] = (),
        replace: bool = False,
    ) -> list[tuple[bool, str]]:
        """Add rules in the command line's text, or replace all; return the rules there are then."""
        pairs = [(False, text) for text in rules] + [(True, text) for text in deny]
        (access,) = self.manage("ChangeAccess", "sa(bs)b", sandbox.id, pairs, replace)
        return list(access)

    def set_access(self, sandbox: Sandbox, *allow: Usos) -> None:
        """Call SetContainerAccess: these are then all the rules."""
        self.containers("SetContainerAccess", "sa(usos)", sandbox.id, list(allow))

    def stop_instance(self, sandbox: Sandbox) -> None:
        self.containers("StopInstance", "o", sandbox.path)

    def stop_listening(self, sandbox: Sandbox) -> None:
        self.containers("StopListening", "o", sandbox.path)

    def show(self, sandbox: Sandbox) -> dict[str, Any]:
        (what,) = self.manage("Show", "s", sandbox.id)
        return dict(what)

    def list_sandboxes(self) -> list[dict[str, Any]]:
        (sandboxes,) = self.manage("List")
        return [dict(one) for one in sandboxes]

    def who(self, name: str) -> str:
        """Return the instance path of the connection. Raises CallError."""
        path, _credentials, _type, _app, _metadata = self.containers(
            "GetConnectionInstance", "s", name
        )
        return str(path)

    def cli(self, *args: str, timeout: float = 20.0) -> Outcome:
        """Run the command line in the supervisor's environment."""
        return run(PYTHON, "-m", "broker.cli", *args, env=dict(self.env), timeout=timeout)

    def kill(self) -> None:
        """Kill the supervisor, as by `kill -9`: the gate lives on."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close_clients(self) -> None:
        for client in (*self._clients, self.host):
            client.close()

    def close_apps(self, *, but: Sequence[RawClient] = ()) -> None:
        """Close every connection that `connect` and `connect_host` gave, but for these."""
        keep = set(but)
        for client in self._clients:
            if client not in keep:
                client.close()
        self._clients = [client for client in self._clients if client in keep]

    def tidy(self) -> None:
        """Make it as it was at the start, for another test; assert that nothing fell meanwhile."""
        while self._clients:
            self._clients.pop().close()
        for sandbox in self.list_sandboxes():
            # It may be ending by itself, now that its clients are gone.
            with contextlib.suppress(CallError):
                self.containers("StopInstance", "o", sandbox["path"])
        (status,) = self.manage("Status")
        assert (status["sandboxes"], status["connections"]) == (0, 0)
        assert status["gate_pid"] == self.gate_pid, "there is another gate"
        assert "Traceback" not in self.log
        self.host.drain(0)


@contextmanager
def open_warden(
    bus: Bus,
    runtime: Path,
    *args: str,
    add_bus: bool = True,
    orderly: bool = True,
    env: Mapping[str, str] | None = None,
) -> Iterator[Warden]:
    """Run a supervisor, and see to it that it ends, its gate with it, and leaves no socket.

    `args` are for `buswarden run`. With `orderly` False it may have died in the meantime: for tests that
    `kill` it and open a second one on the same folder, within the block of the first. The gate
    never outlives the block.
    """
    runtime.mkdir(mode=0o700, exist_ok=True)
    log = runtime.parent / "warden.log"
    argv = [PYTHON, "-m", "broker.cli", "run"]
    argv += ["--bus", f"session={bus.address}"] if add_bus else []
    gates: list[int] = []
    with ExitStack() as stack:
        stack.callback(_kill, gates, runtime)
        process = stack.enter_context(running([*argv, *args], env=_env(runtime, env), log=log))
        process.wait_line("ready")
        warden = Warden(
            bus=bus,
            runtime=runtime,
            process=process,
            host=RawClient.connect(bus.address),
            env=_env(runtime, env),
        )
        stack.callback(_print_log, warden)
        stack.callback(warden.close_clients)
        (status,) = warden.manage("Status")
        warden.gate_pid = status["gate_pid"]
        assert warden.gate_pid > 1
        gates.append(warden.gate_pid)
        yield warden
        if orderly:
            stop_and_check(warden)


def stop_and_check(warden: Warden) -> None:
    """End the supervisor in order, and assert that nothing of it is left."""
    warden.process.send_signal(signal.SIGTERM)
    try:
        code = warden.process.wait()
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the supervisor did not end:\n{warden.log}") from None
    assert code == 0, f"the supervisor exited with {code}:\n{warden.log}"
    assert wait_gone(warden.gate_pid), "the gate is still there"
    left = [path for path in warden.runtime.rglob("*") if path.is_socket()]
    assert not left, f"sockets are left: {left}"


def wait_for(condition: Callable[[], object], timeout: float = 5.0) -> None:
    """Wait until the condition holds, for what happens elsewhere without a message to wait for."""
    assert wait_until(lambda: bool(condition()), timeout), "it did not come to pass"


def _env(runtime: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    own = {"XDG_RUNTIME_DIR": str(runtime), "HOME": str(runtime), "COLUMNS": "200"}
    return {**own, **(more or {})}


def _kill(gates: Sequence[int], runtime: Path) -> None:
    # A gate is in a session of its own and survives its supervisor: a test that failed must not leave it.
    for pid in {*gates, *_marked_gates(runtime)}:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def _marked_gates(runtime: Path) -> list[int]:
    """Return those that took the place of a first one: by their mark, if it is still about them."""
    try:
        marked = (runtime / "buswarden" / "gate.pid").read_text().split()
        pids = [int(pid) for pid in marked if pid.isdigit()]
        return [p for p in pids if str(runtime) in Path(f"/proc/{p}/cmdline").read_text()]
    except (OSError, ValueError):
        return []


def _print_log(warden: Warden) -> None:
    # pytest shows it where a test fails.
    if warden.log and "PYTEST_CURRENT_TEST" in os.environ:
        print(f"--- the supervisor and the gate said:\n{warden.log}")
