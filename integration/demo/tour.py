"""The guided tour of `make demo`: one sandboxed app, one connection, rules that change under it.

Everything runs on a bus of its own in a temporary folder: a small service, the broker, and an app that
`buswarden exec` started. The app is told over a pipe when to call. Exits 0 only if every step
was seen, and ends what it started, by process id.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from integration.harness.buses import open_dbus_daemon
from integration.harness.clients import Outcome, run
from integration.harness.processes import (
    PROJECT,
    PYTHON,
    Process,
    is_running,
    make_env,
    running,
    wait_gone,
    wait_until,
)
from integration.harness.rawclient import CallError, RawClient
from integration.harness.service import ECHO, PATH, running_service

TIMEOUT: Final = 10.0  # seconds, for each step
SERVICE_RULE: Final = f"send:{ECHO}"
CONTAINERS: Final = "org.freedesktop.DBus.Containers1"
REMOVED: Final = f"type='signal',interface='{CONTAINERS}',member='InstanceRemoved'"


class StepFailedError(Exception):
    """A step did not show what it should."""


@dataclass(slots=True, kw_only=True)
class App:
    """The sandboxed app, at the other end of its pipes."""

    process: Process
    stdin: int
    unique_name: str = ""

    def call(self, text: str) -> str:
        """Have it call the service on its one connection; return what it says came back."""
        os.write(self.stdin, f"{text}\n".encode())
        return self.process.read_line(TIMEOUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What the steps play on."""

    address: str
    env: dict[str, str]
    host: RawClient  # hears InstanceRemoved, as any program could
    app: App

    def buswarden(self, *argv: str) -> Outcome:
        show(f"$ buswarden {' '.join(argv)}")
        done = run(PYTHON, "-m", "broker.cli", *argv, env=self.env, timeout=TIMEOUT)
        if not done.ok:
            raise StepFailedError(done.err.strip() or f"exit code {done.code}")
        return done

    def read(self, *argv: str) -> Any:
        done = run(PYTHON, "-m", "broker.cli", *argv, "--json", env=self.env, timeout=TIMEOUT)
        expect(done.ok, done.err.strip())
        return json.loads(done.out)


def main() -> int:
    """Play all steps. Returns the exit code."""
    if sys.argv[1:] == ["--app"]:
        return be_the_app()
    started = time.monotonic()
    try:
        with open_stage() as stage:
            play(stage)
    except (StepFailedError, CallError, OSError, EOFError, subprocess.SubprocessError) as exc:
        print(f"\nFAILED: {exc}", flush=True)
        return 1
    print(f"\nEvery step was seen, in {time.monotonic() - started:.1f} s.", flush=True)
    return 0


def be_the_app() -> int:
    """Inside the sandbox: one connection, one call a line."""
    with RawClient.connect(os.environ["DBUS_SESSION_BUS_ADDRESS"]) as client:
        print(client.unique_name, flush=True)
        for line in sys.stdin:
            try:
                (answer,) = client.ask(ECHO, PATH, ECHO, "Echo", "s", (line.strip(),))
            except CallError as exc:
                print(f"error {exc}", flush=True)
            else:
                print(f"answer {answer}", flush=True)
    return 0


@contextmanager
def open_stage() -> Iterator[Stage]:
    """Start the bus, the service, the broker and the app."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bw-demo-")))
        runtime = folder / "run"
        runtime.mkdir(mode=0o700)
        bus = stack.enter_context(open_dbus_daemon(folder))
        headline("a bus of its own, a service on it, and the broker")
        show(f"dbus-daemon is process {bus.pid}, on {bus.address.partition(',')[0]}")
        service = stack.enter_context(running_service(bus.address))
        show(f"the service {ECHO} is process {service.pid}")
        env = {"XDG_RUNTIME_DIR": str(runtime), "HOME": str(folder), "COLUMNS": "120"}
        log = folder / "broker.log"
        gates: list[int] = []
        stack.callback(end_gates, gates)  # after the broker's end
        argv = [PYTHON, "-m", "broker.cli", "run", "--bus", f"session={bus.address}"]
        broker = stack.enter_context(running(argv, env=env, log=log))
        try:
            broker.wait_line("ready")
        except (EOFError, TimeoutError):
            raise StepFailedError(f"the broker did not start: {broker.log}") from None
        status = json.loads(run(PYTHON, "-m", "broker.cli", "status", "--json", env=env).out)
        gates.append(int(status["gate_pid"]))
        show(f"the broker is process {broker.pid}, its gate process {status['gate_pid']}")
        host = stack.enter_context(RawClient.connect(bus.address))
        host.add_match(REMOVED)
        app = stack.enter_context(running_app(env, folder))
        yield Stage(address=bus.address, env=env, host=host, app=app)


@contextmanager
def running_app(env: dict[str, str], folder: Path) -> Iterator[App]:
    """Run the app under bubblewrap; it has its connection when this yields."""
    # A checkout and its Python would not be there in the sandbox.
    shares = [w for d in {PROJECT, Path(sys.prefix), Path(sys.base_prefix)} for w in ("--share", d)]
    identity = ["--type", "org.example.Demo", "--app", "org.example.Notes"]
    argv = [PYTHON, "-m", "broker.cli", "exec", *identity, *shares]
    log = folder / "app.log"
    read_end, write_end = os.pipe()
    with log.open("wb") as stderr:
        popen = subprocess.Popen(
            [*argv, "--", PYTHON, "-m", "integration.demo.tour", "--app"],
            env=make_env(env),
            cwd=PROJECT,
            stdin=read_end,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    os.close(read_end)
    process = Process(popen, log)
    app = App(process=process, stdin=write_end)
    try:
        app.unique_name = process.read_line()
        yield app
    finally:
        os.close(write_end)
        process.stop()


def play(stage: Stage) -> None:
    """Show one thing after the other."""
    headline("an app in a sandbox, with one connection that it keeps")
    (sandbox,) = stage.read("list")
    connections = [unique for _bus, unique in sandbox["connections"]]
    expect(connections == [stage.app.unique_name], f"its connections are {connections}")
    show(f"{sandbox['app']} is sandbox {sandbox['id']}, and {stage.app.unique_name} on the bus")

    headline("it may do nothing yet: its call is denied")
    call_denied(stage, "hello")
    show_why(stage, sandbox["id"])

    headline("a rule is added: the same connection may call")
    stage.buswarden("access", sandbox["id"], "--allow", SERVICE_RULE)
    answer = call(stage, "hello again")
    expect(answer == "answer hello again", "the call was not allowed")

    headline(f"who is {stage.app.unique_name}? A portal asks over D-Bus")
    ask_who(stage, sandbox["path"])

    headline("the rule is removed: denied again")
    stage.buswarden("access", sandbox["id"], "--replace")
    call_denied(stage, "hello once more")

    headline("the app is killed: its sandbox is gone")
    kill_app(stage)
    see_it_gone(stage, sandbox)


def call(stage: Stage, text: str) -> str:
    show(f'the app calls {ECHO}.Echo("{text}")')
    answer = stage.app.call(text)
    show(f"  -> {answer}")
    return answer


def call_denied(stage: Stage, text: str) -> None:
    answer = call(stage, text)
    # A name that it may not see does not exist for it.
    refusals = ("ServiceUnknown", "AccessDenied", "NameHasNoOwner")
    refused = answer.startswith("error ") and any(word in answer for word in refusals)
    expect(refused, "the call was not denied")


def show_why(stage: Stage, sandbox: str) -> None:
    denials: list[dict[str, Any]] = []

    def reported() -> bool:
        denials[:] = stage.read("show", sandbox)["denials"]
        return any(denial["member"] == "Echo" for denial in denials)

    expect(wait_until(reported, TIMEOUT), "the broker reported no denial")
    denial = next(d for d in reversed(denials) if d["member"] == "Echo")
    what = f"{denial['direction']} {denial['kind']} {denial['interface']}.{denial['member']}"
    show(f"why: {what} to {denial['peer']}: {denial['reason']}")


def ask_who(stage: Stage, path: str) -> None:
    name = stage.app.unique_name
    argv = ["gdbus", "call", "--address", stage.address, "--dest", "org.buswarden.Broker1"]
    argv += ["--object-path", "/org/freedesktop/DBus"]
    method = f"{CONTAINERS}.GetConnectionInstance"
    show(f"$ gdbus call ... --method {method} '{name}'")
    done = run(*argv, "--method", method, "--", repr(name), timeout=TIMEOUT)
    expect(done.ok, done.err.strip())
    show(f"  -> {done.out.strip()}")
    expect(path in done.out and "org.example.Notes" in done.out, "that is not the app")


def kill_app(stage: Stage) -> None:
    pid = innermost_child(stage.app.process.pid)
    show(f"kill -9 {pid} (the app itself, below bubblewrap)")
    os.kill(pid, signal.SIGKILL)
    code = stage.app.process.wait(TIMEOUT)
    show(f"buswarden exec ends with exit code {code}")
    expect(code == 128 + signal.SIGKILL, "that is not what a killed command gives")


def see_it_gone(stage: Stage, sandbox: dict[str, Any]) -> None:
    message = stage.host.wait_signal("InstanceRemoved", TIMEOUT)
    show(f"the bus hears InstanceRemoved({message.values[0]})")
    expect(message.values == (sandbox["path"],), "that is another sandbox")
    left = stage.read("list")
    show(f"the broker lists {len(left)} sandboxes")
    expect(not left, "it is still listed")
    sockets = [path for path in sandbox["sockets"].values() if Path(path).exists()]
    expect(not sockets, f"sockets are left: {sockets}")


def innermost_child(pid: int) -> int:
    """Follow first children down: buswarden exec, bubblewrap, its first process, the app."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    return pid


def end_gates(pids: list[int]) -> None:
    """See to it that the gate, which outlives a broker that fails, does not outlive the demo."""
    for pid in pids:
        if is_running(pid) and not wait_gone(pid, TIMEOUT):
            os.kill(pid, signal.SIGKILL)


def headline(text: str) -> None:
    print(f"\n* {text}", flush=True)


def show(text: str) -> None:
    print(f"    {text}", flush=True)


def expect(condition: bool, problem: str) -> None:
    if not condition:
        raise StepFailedError(problem)


if __name__ == "__main__":
    sys.exit(main())
