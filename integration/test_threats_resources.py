"""Threats E: clients that take too much, do not read, flood, or leave at the wrong moment."""

import contextlib
import os
import resource
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.wire.header import MessageType
from integration.harness.buses import Bus
from integration.harness.forge import GOOD, Field, forge, text
from integration.harness.messages import make_header, make_message
from integration.harness.rawclient import BUS, BUS_PATH, RawClient
from integration.harness.scripts import (
    auth,
    echo,
    echo_message,
    hello_message,
    open_fds,
    read_until,
)
from integration.harness.service import ECHO, PATH
from integration.harness.supervised import wait_for
from integration.harness.threats import (
    ERROR,
    MIB,
    SMALL_LIMITS,
    Scene,
    assert_rests,
    is_closed,
    memory,
    open_limited,
    open_scene,
)

BROADCAST = make_message(
    make_header(MessageType.SIGNAL, 9, path="/a", interface="a.b", member="News", signature="s"),
    ("x" * 60_000,),
)

# For the gate to have had its turn, however busy the machine: what the bus keeps meanwhile is not its doing.
PAUSE = 0.02  # seconds


def send_until_closed(sender: RawClient, receiver: RawClient, most: int, fds: int = 0) -> int:
    """Send the receiver signals until the gate has had enough of it; return how many it took."""
    with Path(os.devnull).open("rb") as file:
        data = make_news(receiver, fds)
        for number in range(most):
            sender.send_raw(data, [file.fileno()] * fds)
            if number % 8 == 0:
                time.sleep(PAUSE)
                if receiver.unique_name not in sender.list_names():
                    return number
    raise AssertionError("it was never cut off")


def make_news(receiver: RawClient, fds: int = 0) -> bytes:
    """Return a signal of 100 KB to the receiver."""
    header = make_header(
        MessageType.SIGNAL,
        0x70000000,  # dbus-daemon answers it once the receiver is gone
        path="/a",
        interface="a.b",
        member="News",
        destination=receiver.unique_name,
        signature="s",
        unix_fds=fds,
    )
    return make_message(header, ("x" * 100_000,))


def test_e1_who_does_not_read_is_cut_off(scene: Scene) -> None:
    deaf = scene.attack()
    # More than the budget, for some of it is on its way in the bus.
    assert send_until_closed(scene.host, deaf, 400) * 100_000 < 32 * MIB
    assert "does not read" in scene.warden.log
    scene.assert_closed(deaf)


def test_e1_all_connections_have_one_budget_of_unread_bytes(scene: Scene) -> None:
    deaf = [scene.attack() for _ in range(8)]
    for client in deaf:  # each of them is far below it
        for _ in range(12):
            scene.host.send_raw(make_news(client))
    wait_for(lambda: scene.connections() < len(deaf))
    scene.host.list_names()  # all that was sent is at the gate, or in a socket
    # What one of them has as its only message, or was read as one, does not count.
    assert scene.use()["bytes_queued"] <= SMALL_LIMITS["bytes_queued"] + MIB // 2
    left = scene.connections()
    assert 2 <= left < len(deaf)  # who has to go is who is most behind, one at a time


def test_e1_descriptors_for_who_does_not_read_have_a_budget(bus: Bus, folder: Path) -> None:
    with open_limited(bus, folder, fds=24) as warden, open_scene(warden) as scene:
        deaf = scene.attack()
        assert send_until_closed(scene.host, deaf, 400, fds=1) < 200
        assert "fds=24" in warden.log
        scene.assert_closed(deaf)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process stand still for as long as the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_e2_client_is_not_read_while_the_bus_does_not_take_it(scene: Scene) -> None:
    scene.warden.change_access(scene.villain, rules=["send:"])
    client = scene.attack()
    pid = scene.warden.gate_pid
    before, sent = memory(pid), 0
    client.sock.settimeout(0.3)
    with stopped(scene.warden.bus.pid):
        with pytest.raises(TimeoutError):
            while sent < 64 * MIB:
                sent += client.sock.send(BROADCAST)
        assert sent < 4 * MIB
        assert memory(pid) - before < 4 * MIB
        assert_rests(pid)
    client.sock.settimeout(10)
    client.sock.sendall(BROADCAST[sent % len(BROADCAST) :])
    scene.assert_alive(client)


def median(client: RawClient, count: int = 100) -> float:
    """Return how long a round trip takes, in seconds."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        echo(client)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


REFUSED: list[Field] = [(1, "o", "/"), (3, "s", "M"), (6, "s", "org.example.Hidden")]


def refused_calls(scene: Scene) -> Callable[[], None]:
    client = scene.attack()
    client.sock.settimeout(0.1)
    data = forge(REFUSED, flags=1) * 500
    return lambda: client.sock.sendall(data)


def connections(scene: Scene) -> Callable[[], None]:
    return lambda: scene.raw(auth() + b"BEGIN\r\n" + hello_message()).close()


def half_messages(scene: Scene) -> Callable[[], None]:
    client = scene.attack()
    client.sock.settimeout(0.1)
    data = forge([*GOOD, (8, "g", "s")], body=text(b"x" * (8 * MIB)))  # over the budget
    return lambda: client.sock.sendall(data)


@pytest.mark.parametrize("attack", [refused_calls, connections, half_messages])
def test_e3_flood_of_one_sandbox_leaves_others_their_share(
    scene: Scene, attack: Callable[[Scene], Callable[[], None]]
) -> None:
    idle = {client: median(client) for client in (scene.other, scene.host)}
    over, step = threading.Event(), attack(scene)

    def run() -> None:
        while not over.is_set():
            try:
                step()
            except OSError:
                time.sleep(0.001)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        time.sleep(0.2)
        # This process floods and measures: a bound on what the gate adds, not a measurement.
        for client in (scene.other, scene.host):
            assert median(client) < 20 * idle[client] + 0.02
    finally:
        over.set()
        thread.join()


def test_e4_one_sandbox_cannot_use_up_what_the_user_has_on_the_bus(scene: Scene) -> None:
    clients = [scene.attack() for _ in range(15)]
    for number in range(SMALL_LIMITS["match_rules"]):
        clients[number % 15].add_match(f"type='signal',interface='a.b{number}'")
    for number in range(SMALL_LIMITS["names"]):
        assert clients[number % 15].request_name(f"org.example.V{number}") == 1
    for client in clients:
        reply = client.call(BUS, BUS_PATH, BUS, "AddMatch", "s", ("type='signal'",))
        assert reply.error == f"{ERROR}LimitsExceeded"
        reply = client.call(BUS, BUS_PATH, BUS, "RequestName", "su", ("org.example.Vx", 4))
        assert reply.error == f"{ERROR}LimitsExceeded"
    for key in ("match_rules", "names"):
        assert scene.use()[key] == SMALL_LIMITS[key]
    assert is_closed(scene.raw(), 1)  # no more connections either
    scene.other.add_match("type='signal',interface='a.b'")
    scene.host.add_match("type='signal',interface='a.b'")
    assert scene.host.request_name("org.example.Mine") == 1


def test_e5_log_lines_have_a_budget(bus: Bus, folder: Path) -> None:
    with open_limited(bus, folder, log_lines_per_second=3) as warden, open_scene(warden) as scene:
        start = time.monotonic()
        for _ in range(60):
            assert is_closed(scene.raw(b"not a NUL"))
        seconds = time.monotonic() - start
        lines = [line for line in warden.log.splitlines() if "peer-violation" in line]
        assert 3 <= len(lines) <= 3 * (seconds + 2)
        assert scene.use()["suppressed"] >= 60 - len(lines)
        time.sleep(1.05)
        assert is_closed(scene.raw(b"not a NUL"))
        assert "suppressed" in warden.log


def test_e5_no_line_of_the_log_is_of_an_apps_making(scene: Scene) -> None:
    evil = b"\x1b[2J\nERROR gate all is lost\r\x07\xe2\x80\xae"
    for data in (evil, b"\0AUTH " + evil + b"\r\n" + b"AUTH X\r\n" * 6, b"\0" + evil * 1000):
        assert is_closed(scene.raw(data))
    for code in (1, 2, 3, 6):
        client = scene.attack()
        fields = [field for field in GOOD if field[0] != code]
        client.send_raw(forge([*fields, (code, "o" if code == 1 else "s", text(evil))]))
        scene.assert_closed(client)
    text_of_log = scene.warden.log
    assert all(line.isprintable() for line in text_of_log.splitlines())
    assert not [line for line in text_of_log.splitlines() if line.startswith("ERROR gate all")]


def test_e6_no_memory_for_one_client(scene: Scene) -> None:
    pid = scene.warden.gate_pid
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    client = scene.attack()
    data = echo_message(5, "x" * (SMALL_LIMITS["bytes_held"] - 4096))
    resource.prlimit(pid, resource.RLIMIT_AS, (size + 2 * MIB, before[1]))
    try:
        with contextlib.suppress(OSError):  # it may be cut off
            client.send_raw(data)
        assert client.is_closed(1) or client.queue
        scene.others_work()
        scene.sibling_works()
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, before)
    assert scene.warden.manage("Status")[0]["gate_pid"] == pid


def test_e7_who_came_and_went_is_forgotten(scene: Scene) -> None:
    client = scene.attack()
    names = []
    for _ in range(60):
        with RawClient.connect(scene.warden.bus.address) as caller:
            caller.start_call(client.unique_name, "/a", "a.b", "Hello", flags=1)
            client.wait_call("Hello")
            names.append(caller.unique_name)
            assert client.driver("NameHasOwner", "s", caller.unique_name) == (True,)
    wait_for(lambda: not set(names) & set(scene.host.list_names()))
    for name in names[::10]:
        assert client.driver("NameHasOwner", "s", name) == (False,)
    for _ in range(60):
        with contextlib.suppress(OSError):  # there may be too many for a moment
            scene.raw(auth() + b"BEGIN\r\n" + hello_message()).close()
    wait_for(lambda: scene.use()["max_connections_per_container"] == 2)


def test_e8_each_way_to_fail_gives_its_descriptors_back(scene: Scene) -> None:
    reading, writing = os.pipe()
    whole = auth() + b"NEGOTIATE_UNIX_FD\r\nBEGIN\r\n" + hello_message()
    before = open_fds(scene.warden)

    def back() -> bool:
        return open_fds(scene.warden) == before

    for data in (b"", b"x", b"\0BEGIN\r\n", whole, whole + b"x" * 100, whole + echo_message(2)):
        for fds in ([], [writing]):
            sock = scene.raw()
            try:
                if data:
                    sock.send(data) if not fds else os.write(sock.fileno(), data)
            finally:
                sock.close()
            wait_for(back)
    for message in (forge(serial=0), forge([*GOOD, (9, "u", 1)]), forge([*GOOD, (9, "u", 9)])):
        client = scene.attack()
        client.send_raw(message, [writing])
        client.close()
        wait_for(back)
    os.close(writing)
    wait_for(lambda: os.read(reading, 1) == b"")
    os.close(reading)


def test_e9_signals_and_stops_harm_nothing(scene: Scene) -> None:
    client = scene.attack()
    for number in (signal.SIGWINCH, signal.SIGCHLD, signal.SIGCONT, signal.SIGPIPE):
        os.kill(scene.warden.gate_pid, number)
        echo(client)
    serial = client.start_call(ECHO, PATH, ECHO, "Echo", "s", ("later",))
    with stopped(scene.warden.gate_pid):
        client.start_call(ECHO, PATH, ECHO, "Ping", flags=1)
    assert client.wait_reply(serial).values == ("later",)


def test_e9_short_writes_send_a_descriptor_once(scene: Scene) -> None:
    client = scene.attack()
    reading, writing = os.pipe()
    header = make_header(
        MessageType.METHOD_CALL,
        55,
        path="/a",
        interface="a.b",
        member="Big",
        destination=client.unique_name,
        signature="s",
        unix_fds=1,
    )
    scene.host.send_raw(make_message(header, ("x" * (2 * MIB),)), [writing])
    os.close(writing)
    time.sleep(0.1)  # it does not fit, and waits in the gate in pieces
    call = client.wait_call("Big")
    assert len(call.fds) == 1
    os.close(call.fds[0])
    assert os.read(reading, 1) == b""  # nobody else has one
    os.close(reading)
    echo(client)


def test_e9_client_that_resets_with_answers_on_their_way(scene: Scene) -> None:
    for _ in range(5):
        client = scene.attack()
        for _ in range(20):
            client.start_call(ECHO, PATH, ECHO, "Echo", "s", ("x" * 20_000,))
        client.close()  # with unread answers: the gate gets EPIPE and ECONNRESET
    assert read_until(scene.greeted(), b"") == b""
