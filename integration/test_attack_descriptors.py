"""At the limit of its descriptors the broker refuses, at once, and goes on with what it has."""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from integration.harness.buses import Bus
from integration.harness.rawclient import CallError, RawClient
from integration.harness.scripts import echo
from integration.harness.service import ECHO, running_service
from integration.harness.supervised import Sandbox, Warden, open_warden
from integration.harness.values import Variant

LIMITS = "org.freedesktop.DBus.Error.LimitsExceeded"
KEEP = Variant("b", True)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - counted, not read


def restrict(pid: int, room: int) -> None:
    """Leave a process so many more descriptors than it has."""
    limit = descriptors(pid) + room
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, limit))


@pytest.fixture
def warden(bus: Bus, folder: Path) -> Iterator[Warden]:
    with running_service(bus.address), open_warden(bus, folder / "run") as running:
        yield running


def add_until_refused(warden: Warden) -> list[Sandbox]:
    """Add sandboxes until one is refused, for the right reason and by the gate that is there."""
    sandboxes: list[Sandbox] = []
    with pytest.raises(CallError) as caught:
        while len(sandboxes) < 400:
            sandboxes.append(warden.add_server(rules=[f"send:{ECHO}"], KeepAfterCreator=KEEP))
    assert caught.value.name == LIMITS
    # A refusal that waited would have waited for a connection to another gate.
    assert "connection to the gate was lost" not in warden.log
    return sandboxes


@pytest.mark.parametrize("which", ["supervisor", "gate"])
def test_attack_c9_at_the_limit_a_sandbox_is_refused_and_the_rest_goes_on(
    warden: Warden, which: str
) -> None:
    first = warden.add_server(rules=[f"send:{ECHO}"])
    app = warden.connect(first)
    pid = warden.process.pid if which == "supervisor" else warden.gate_pid
    restrict(pid, 60)
    sandboxes = add_until_refused(warden)
    assert sandboxes
    before = descriptors(warden.process.pid), descriptors(warden.gate_pid)
    for _ in range(20):
        with pytest.raises(CallError) as caught:
            warden.add_server()
        assert caught.value.name == LIMITS
    assert (descriptors(warden.process.pid), descriptors(warden.gate_pid)) == before
    echo(app)
    assert warden.who(app.unique_name) == first.path
    assert "connection to the gate was lost" not in warden.log
    assert "supervisor-gone" not in warden.log
    assert "Traceback" not in warden.log
    for sandbox in sandboxes:
        warden.stop_instance(sandbox)
    echo(warden.connect(warden.add_server(rules=[f"send:{ECHO}"])))


def test_attack_c9_descriptors_in_calls_do_not_take_the_last_ones(warden: Warden) -> None:
    restrict(warden.process.pid, 40)
    ends = socket.socketpair()
    with ExitStack() as stack, RawClient.connect(warden.bus.address) as person:
        for end in ends:
            stack.callback(end.close)
        fd = ends[0].fileno()
        serials = [
            person.start_call(
                "org.buswarden.Broker1",
                "/org/buswarden/Broker1",
                "org.buswarden.Broker1",
                "List",
                fds=[fd] * 8,
            )
            for _ in range(50)
        ]
        for serial in serials:
            reply = person.wait_reply(serial, timeout=30)
            assert reply.error in (None, LIMITS)
    assert warden.list_sandboxes() == []
    assert "went away" not in warden.log


def test_attack_c9_an_apps_connection_too_many_is_closed_and_others_go_on(warden: Warden) -> None:
    sandboxes = [warden.add_server(rules=[f"send:{ECHO}"], KeepAfterCreator=KEEP) for _ in range(4)]
    app = warden.connect(sandboxes[0])
    restrict(warden.gate_pid, 60)
    opened = 0
    for sandbox in sandboxes:
        for _ in range(15):
            try:
                warden.connect(sandbox)
            except (EOFError, ConnectionError, TimeoutError, CallError):
                break
            opened += 1
    assert 0 < opened < 40
    echo(app)
    assert warden.list_sandboxes()
    assert "supervisor-gone" not in warden.log
