"""SIGTERM: what was asked is answered, what was promised is stored, and the end comes within 5 seconds."""

import os
import signal
import time
from pathlib import Path

from integration.buses import Bus
from integration.processes import wait_gone, wait_until
from integration.supervised import CONTAINERS, CONTAINERS_PATH, NAME, SEND, open_warden
from integration.values import Variant

KEEP = Variant("b", True)
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
