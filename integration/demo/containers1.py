"""The guided tour of `make demo ENGINE=containers1`: a bus that labels connections itself, and what a service sees there.

The service knows nothing of us: it asks its bus who calls. Everything runs in a temporary folder, with the
dbus-daemon of `make containers1-daemon`. Exits 0 only if every step was seen.
"""

import contextlib
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from integration.demo.tour import StepFailedError, expect, headline, show
from integration.harness.buses import CONTAINERS1_DAEMON, Bus, open_containers1_daemon
from integration.harness.clients import run
from integration.harness.rawclient import BUS, BUS_PATH, CallError, RawClient
from integration.harness.supervised import CONTAINERS, Sandbox, Warden, open_warden
from integration.harness.values import Variant

KIND: Final = "org.example.Demo"
APP: Final = "org.example.Notes"


def main() -> int:
    """Play all steps. Returns the exit code."""
    if not CONTAINERS1_DAEMON.exists():
        print("buswarden: no dbus-daemon with Containers1: run make containers1-daemon first")
        return 1
    started = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bw-demo-")))
            bus = stack.enter_context(open_containers1_daemon(folder))
            headline("a dbus-daemon that has Containers1, and the broker")
            show(f"dbus-daemon is process {bus.pid}")
            warden = stack.enter_context(open_warden(bus, folder / "run", orderly=False))
            show("the broker found by itself what the bus can do:")
            show_lines(warden.cli("status").out, ("engine", "BUS", "session"))
            play(bus, warden, folder)
    except (StepFailedError, CallError, OSError, EOFError, AssertionError) as exc:
        print(f"\nFAILED: {exc}", flush=True)
        return 1
    print(f"\nEvery step was seen, in {time.monotonic() - started:.1f} s.", flush=True)
    return 0


def play(bus: Bus, warden: Warden, folder: Path) -> None:
    """Play the steps on what was started."""
    headline("another program has an instance on the bus already")
    other: tuple[Any, ...] = (KIND, "org.example.Other", {}, {})
    made = warden.host.ask(BUS, BUS_PATH, CONTAINERS, "AddServer", "ssa{sv}a{sv}", other)
    show(f"the bus calls it {made[0]}")

    headline("one sandbox: the broker's instance, and the bus's own")
    keep: dict[str, Any] = {
        "KeepAfterCreator": Variant("b", True),
        "Component": Variant("s", "editor"),
    }
    sandbox = warden.add_server(APP, type=KIND, **keep)
    show_lines(warden.cli("show", sandbox.id).out, ("id", "path", "app", "engine"))
    instance = str(warden.show(sandbox)["instances"]["session"])
    app = warden.connect(sandbox)

    headline("a service asks the bus itself who is behind the app's connection")
    there = ask_bus(bus, "GetConnectionCredentials", app.unique_name, interface=BUS)
    expect(instance in there, "the credentials do not say which instance")
    there = ask_bus(bus, "GetConnectionInstance", app.unique_name)
    expect(APP in there and KIND in there and "editor" in there, "that is not the app")

    headline("and behind one that is in no sandbox")
    with RawClient.connect(bus.address) as host:
        there = ask_bus(bus, "GetConnectionInstance", host.unique_name)
        expect("NotContainer" in there, "that one is in no sandbox")

    headline("the bus has no rules; the gate has")
    try:
        app.ask("org.buswarden.Broker1", "/", "org.example.Any", "Thing")
    except CallError as exc:
        show(f"a call without a rule: {exc.name}")
    else:
        raise StepFailedError("a call without a rule got through")

    headline("the supervisor is killed, and another takes over: the bus never notices")
    warden.kill()
    with open_warden(bus, folder / "run") as again:
        expect(again.show(sandbox)["instances"]["session"] == instance, "another instance")
        show(f"{sandbox.id} is {instance} there, as before")
        end(again, sandbox, instance)


def end(warden: Warden, sandbox: Sandbox, instance: str) -> None:
    headline("stopped on our side, it is gone on the bus's")
    warden.stop_instance(sandbox)
    try:
        warden.host.ask(BUS, BUS_PATH, CONTAINERS, "GetInstanceInfo", "o", (instance,))
    except CallError as exc:
        show(f"{exc.name}: {exc.text}")
    else:
        raise StepFailedError("the bus still has it")


def ask_bus(bus: Bus, member: str, name: str, *, interface: str = CONTAINERS) -> str:
    """Have gdbus ask the bus; return what it prints."""
    method = f"{interface}.{member}"
    show(f"$ gdbus call ... --dest {BUS} --method {method} '{name}'")
    argv = ["gdbus", "call", "--address", bus.address, "--dest", BUS, "--object-path", BUS_PATH]
    done = run(*argv, "--method", method, "--", repr(name), timeout=10)
    text = (done.out or done.err).strip()
    show(f"  -> {text}")
    return text


def show_lines(text: str, beginnings: tuple[str, ...]) -> None:
    for line in text.splitlines():
        if line.startswith(beginnings):
            show(line.rstrip())


if __name__ == "__main__":
    # Whoever ends the tour ends what it started.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
