"""Attacks C2, C3, C5 and C7: whatever a sandbox, its creator or a peer does, the others are served and upgrades happen."""

import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from broker.wire.header import MAX_FIELDS, MessageType
from integration.harness.buses import Bus
from integration.harness.messages import make_header, make_message
from integration.harness.processes import PYTHON, running
from integration.harness.service import PATH, running_service
from integration.harness.stage import settle
from integration.harness.supervised import Sandbox, Warden, open_warden, wait_for
from integration.test_upgrade import TALK, echo, memory_of, upgrade
from tests.helpers.messages import misplaced

MINE = "org.example.Mine"
INTERFACE = "org.example.Iface"
LONG = "/" + "a" * (2 * MAX_FIELDS)
LIMITS_EXCEEDED = "org.freedesktop.DBus.Error.LimitsExceeded"
REPLACING = 0x1 | 0x2 | 0x4  # ALLOW_REPLACEMENT, REPLACE_EXISTING, DO_NOT_QUEUE
# Clears O_NONBLOCK of a socket that it was given, and takes connections away, without end.
THIEF = """
import os, socket, sys, threading
fd = int(sys.argv[1])
sock = socket.socket(fileno=os.dup(fd))
def clear():
    while True:
        os.set_blocking(fd, True)
for _ in range(2):
    threading.Thread(target=clear, daemon=True).start()
print("ready", flush=True)
while True:
    sock.accept()[0].close()
"""


@pytest.fixture
def warden(bus: Bus, folder: Path) -> Iterator[Warden]:
    with running_service(bus.address), open_warden(bus, folder / "run") as running_warden:
        yield running_warden


# -- upgrades ----------------------------------------------------------------------------------


def change_owners(warden: Warden, times: int, sandbox: Sandbox | None = None) -> None:
    """Let `times` connections own the name, one after the other."""
    clients = []
    for _ in range(times):
        clients.append(warden.connect(sandbox) if sandbox is not None else warden.connect_host())
        assert clients[-1].request_name(MINE, REPLACING) == 1
        if len(clients) > 1:  # not before, or nobody would own it in between
            clients.pop(0).close()


def test_attack_c2_a_sandbox_has_no_veto(warden: Warden) -> None:
    other = warden.connect(warden.add_server(rules=TALK))
    sandbox = warden.add_server(rules=[f"own:{MINE}", f"send:{MINE}", "receive:"])
    owner = warden.connect(sandbox)
    caller = warden.connect(sandbox)
    assert owner.request_name(MINE, REPLACING) == 1
    serial = caller.start_call(MINE, PATH, INTERFACE, "Wait")
    asked = owner.wait_call("Wait")
    change_owners(warden, 70, sandbox)
    for _ in range(2):
        upgrade(warden)
        echo(other)
    # Whom it was sent to may still answer it.
    owner.reply(asked)
    assert caller.wait_reply(serial).error is None


def test_attack_c3_waiting_calls_make_no_gate_large(warden: Warden) -> None:
    other = warden.connect(warden.add_server(rules=TALK))
    sandbox = warden.add_server(rules=[f"send:{MINE}", "see:"])
    owner = warden.connect_host()
    assert owner.request_name(MINE, REPLACING) == 1
    upgrade(warden)
    before = memory_of(warden.gate_pid)
    count = 2000
    for client in [warden.connect(sandbox) for _ in range(5)]:
        header = make_header(
            MessageType.METHOD_CALL, 1, path=PATH, interface=INTERFACE, member="W", destination=MINE
        )
        message = bytearray(make_message(header))
        for number in range(count):
            message[8:12] = (1000 + number).to_bytes(4, "little")
            client.send_raw(bytes(message))
        for _ in range(count):
            owner.wait_call("W")
    change_owners(warden, 60)
    assert warden.show(sandbox)["use"]["pending_calls"] >= 5 * count
    upgrade(warden)
    echo(other)
    assert memory_of(warden.gate_pid) < before + 16_000_000


# -- accept ------------------------------------------------------------------------------------


def test_attack_c5_nobody_makes_the_gate_wait(warden: Warden, tmp_path: Path) -> None:
    other = warden.connect(warden.add_server(rules=TALK))
    path = str(tmp_path / "given")
    with socket.socket(socket.AF_UNIX) as given:
        given.bind(path)
        given.listen(64)
        warden.add_server(fds={"Socket": given.fileno()}, rules=TALK)
        argv = [PYTHON, "-c", THIEF, str(given.fileno())]
        longest = 0.0
        with running(argv, pass_fds=[given.fileno()]) as thief:
            assert thief.read_line() == "ready"
            end = time.monotonic() + 8
            while time.monotonic() < end:
                for _ in range(20):
                    with socket.socket(socket.AF_UNIX) as app:
                        app.setblocking(False)
                        try:
                            app.connect(path)
                        except OSError:
                            time.sleep(0.001)
                begun = time.monotonic()
                echo(other)
                longest = max(longest, time.monotonic() - begun)
    # The gate may lose that socket, and nothing else. It would stand still until somebody connects.
    assert longest < 2
    echo(other)


# -- legal input -------------------------------------------------------------------------------


def is_denied(warden: Warden, sandbox: Sandbox, times: int) -> bool:
    return bool(warden.show(sandbox)["denied"] == times)


def test_attack_c7_a_long_broadcast_is_dropped(warden: Warden) -> None:
    sandboxes = [warden.add_server(rules=["receive:"]) for _ in range(2)]
    apps = [warden.connect(sandbox) for sandbox in sandboxes for _ in range(2)]
    for app in apps:
        app.add_match(f"interface='{INTERFACE}'")
    host = warden.connect_host()
    host.emit(LONG, INTERFACE, "Bad")
    host.emit("/a", INTERFACE, "Good")
    for app in apps:
        signal = app.receive()
        while signal.header.member == "NameAcquired":
            signal = app.receive()
        assert signal.header.member == "Good"
    for sandbox in sandboxes:
        wait_for(partial(is_denied, warden, sandbox, 2))
    assert "peer-violation" not in warden.log


def test_attack_c7_a_long_call_is_refused_to_its_caller(warden: Warden) -> None:
    app = warden.connect(warden.add_server(rules=["receive:"]))
    host = warden.connect_host()
    reply = host.call(app.unique_name, LONG, INTERFACE, "Do")
    assert reply.error == LIMITS_EXCEEDED
    serial = host.start_call(app.unique_name, "/a", INTERFACE, "Do")
    app.reply(app.wait_call("Do"))
    assert host.wait_reply(serial).error is None
    assert "peer-violation" not in warden.log


def test_attack_c7_a_long_reply_of_the_host_is_replaced(warden: Warden) -> None:
    host = warden.connect_host()
    assert host.request_name(MINE) == 1
    app = warden.connect(warden.add_server(rules=[f"send:{MINE}"]))
    serial = app.start_call(MINE, "/a", INTERFACE, "Do")
    asked = host.wait_call("Do")
    header = make_header(
        MessageType.METHOD_RETURN,
        host.next_serial(),
        destination=app.unique_name,
        reply_serial=asked.header.serial,
    )
    host.send_raw(misplaced(make_message(header), LONG))
    assert app.wait_reply(serial).error == LIMITS_EXCEEDED
    settle(app)


def test_attack_c7_a_sandboxed_service_ends_nobody_else(warden: Warden) -> None:
    service = warden.connect(warden.add_server("org.example.S", rules=[f"own:{MINE}", "receive:"]))
    assert service.request_name(MINE) == 1
    app = warden.connect(warden.add_server("org.example.A", rules=[f"send:{MINE}"]))
    for room in (300, 120):
        serial = app.start_call(MINE, "/a", INTERFACE, "Do")
        asked = service.wait_call("Do")
        header = make_header(
            MessageType.METHOD_RETURN,
            service.next_serial(),
            destination=asked.header.sender,
            reply_serial=asked.header.serial,
        )
        service.send_raw(misplaced(make_message(header), "/" + "b" * (MAX_FIELDS - room)))
        reply = app.wait_reply(serial)
        assert (reply.error, reply.header.path) == (None, None)
    settle(app)
    assert "peer-violation" not in warden.log
