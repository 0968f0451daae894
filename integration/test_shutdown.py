"""SIGTERM: what was asked is answered, what was promised is stored, and the end comes within 5 seconds."""

import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from integration.harness.buses import Bus
from integration.harness.processes import wait_gone, wait_until
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    MANAGE,
    NAME,
    SEND,
    TYPE,
    open_warden,
)
from integration.harness.values import Variant

KEEP = Variant("b", True)
MANY = 1000  # more than a socket's buffer has room to tell of
LIMIT = 7.0  # seconds: it is to take less than 5, on a machine that does nothing else


def test_what_is_pending_is_answered_before_the_end(bus: Bus, folder: Path) -> None:
    with open_warden(bus, folder / "run", orderly=False) as warden:
        sandbox = warden.add_server(KeepAfterCreator=KEEP)
        # The gate does not answer, so neither does the supervisor.
        os.kill(warden.gate_pid, signal.SIGSTOP)
        rules = [(SEND, "org.example.Late", "/", "")]
        call = (NAME, CONTAINERS_PATH, CONTAINERS, "SetContainerAccess", "sa(usos)")
        serial = warden.host.start_call(*call, (sandbox.id, rules))
        # By its answer the call before it is being carried out.
        warden.host.ask(NAME, CONTAINERS_PATH, "org.freedesktop.DBus.Peer", "Ping")
        warden.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)  # it is ending by now, and waits
        assert warden.process.returncode is None
        os.kill(warden.gate_pid, signal.SIGCONT)
        assert warden.host.wait_reply(serial).error is None
        assert warden.process.wait() == 0
        assert wait_gone(warden.gate_pid)


def test_a_gate_that_hangs_does_not_keep_it(bus: Bus, folder: Path) -> None:
    with open_warden(bus, folder / "run", orderly=False) as warden:
        sandbox = warden.add_server(KeepAfterCreator=KEEP)
        os.kill(warden.gate_pid, signal.SIGSTOP)
        call = (NAME, CONTAINERS_PATH, CONTAINERS, "SetContainerAccess", "sa(usos)")
        serial = warden.host.start_call(*call, (sandbox.id, []))
        begun = time.monotonic()
        warden.process.send_signal(signal.SIGTERM)
        warden.process.wait()
        assert time.monotonic() - begun < LIMIT
        assert warden.host.wait_reply(serial).error is not None  # if only from the bus
        assert wait_until(lambda: "does not end" in warden.log)


def test_every_end_is_told_and_stored(bus: Bus, folder: Path) -> None:
    with open_warden(bus, folder / "run", orderly=False) as warden:
        call = (NAME, CONTAINERS_PATH, CONTAINERS, "AddServer", "ssa{sv}a{sv}")
        arguments: tuple[Any, ...] = (TYPE, "org.example.App", {}, {"KeepAfterCreator": KEEP})
        paths = set()
        for _ in range(MANY // 50):
            for serial in [warden.host.start_call(*call, arguments) for _ in range(50)]:
                paths.add(warden.host.wait_reply(serial).values[0])
        assert len(paths) == MANY
        warden.host.add_match(f"interface='{MANAGE}',member='SandboxEnded'")
        begun = time.monotonic()
        warden.process.send_signal(signal.SIGTERM)
        assert warden.process.wait() == 0
        assert time.monotonic() - begun < LIMIT
        warden.host.ask("org.freedesktop.DBus", "/", "org.freedesktop.DBus.Peer", "Ping")
        ended = [m.values for m in warden.host.drain() if m.header.member == "SandboxEnded"]
        assert len(ended) == MANY
        assert {tuple(values) for values in ended} == {(path, "stopped") for path in paths}
        with closing(sqlite3.connect(warden.folder / "state.db")) as db:
            assert db.execute("SELECT count(*) FROM sandbox").fetchone() == (0,)
