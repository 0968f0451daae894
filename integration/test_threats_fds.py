"""Threats B, second part: descriptors, flags, odd lengths, and very many messages."""

import os
import resource
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.wire.header import MessageType
from integration.harness.buses import Bus
from integration.harness.forge import CALL, GOOD, SIGNAL, Field, forge, without
from integration.harness.messages import Message
from integration.harness.rawclient import RawClient
from integration.harness.scripts import echo, open_fds
from integration.harness.service import ECHO, PATH
from integration.harness.supervised import wait_for
from integration.harness.threats import ERROR, Scene, open_limited, open_scene

NAME = "org.example.Victim"


@pytest.fixture
def name(scene: Scene) -> str:
    """A name of the host that the attacker may call."""
    assert scene.host.request_name(NAME) == 1
    scene.warden.change_access(scene.villain, rules=[f"send:{NAME}"])
    return NAME


def with_fds(count: int, *, to: str = ECHO, serial: int = 77, body: bytes = b"") -> bytes:
    """Return a call that says it has so many descriptors."""
    fields: list[Field] = [*without(6), (6, "s", to), (9, "u", count)]
    if body:
        fields.append((8, "g", "h" * (len(body) // 4)))
    return forge(fields, serial=serial, body=body)


@contextmanager
def pipe_ends(count: int) -> Iterator[list[int]]:
    """Give the writing ends of a pipe; afterwards nobody may have any of them."""
    reading, writing = os.pipe()
    ends = [writing, *(os.dup(writing) for _ in range(count - 1))]
    yield ends
    for end in ends:
        os.close(end)
    os.set_blocking(reading, False)

    def all_closed() -> bool:
        try:
            return os.read(reading, 1) == b""
        except BlockingIOError:
            return False

    wait_for(all_closed)
    os.close(reading)


def assert_ended(scene: Scene, data: bytes, count: int) -> None:
    """Assert that these bytes with so many descriptors end the connection, and that none is kept."""
    client = scene.attack()
    with pipe_ends(max(count, 1)) as ends:
        client.send_raw(data, ends[:count])
        scene.assert_closed(client)


def test_b23_handle_that_names_no_descriptor(scene: Scene) -> None:
    # Buses pass it, and so do we: bodies are the receiver's to check. It harms nobody on the way.
    client = scene.attack()
    client.send_raw(forge([*GOOD, (8, "g", "h")], body=struct.pack("<I", 5)))
    assert client.wait_reply(77).error is None


@pytest.mark.parametrize(
    ("declared", "sent"), [(1, 0), (2, 1), (0xFFFFFFFF, 1), (0xFFFFFFFF, 0), (1, 2), (3, 200)]
)
def test_b24_other_number_of_descriptors_than_it_says(
    scene: Scene, declared: int, sent: int
) -> None:
    assert_ended(scene, with_fds(declared), sent)


@pytest.mark.parametrize("count", [1, 16, 250])
def test_b25_descriptors_that_no_message_names(scene: Scene, count: int) -> None:
    assert_ended(scene, forge(), count)


@pytest.mark.parametrize("count", [17, 100, 253])
def test_b26_more_than_sixteen_are_refused(scene: Scene, count: int) -> None:
    client = scene.attack()
    with pipe_ends(count) as ends:
        client.send_raw(with_fds(count), ends)
        assert client.wait_reply(77).error == f"{ERROR}LimitsExceeded"
    echo(client)


def test_b26_b29_fds_in_flight_have_a_budget(bus: Bus, folder: Path) -> None:
    with open_limited(bus, folder, fds=20) as warden, open_scene(warden) as scene:
        patient, greedy = scene.attack(), scene.attack()
        before = open_fds(warden)
        with pipe_ends(16) as ends:
            patient.send_raw(with_fds(16)[:40], ends)
            wait_for(lambda: scene.use()["fds"] == 16)
            greedy.send_raw(with_fds(16)[:40], ends)
            scene.assert_closed(greedy)
            assert open_fds(warden) <= before + 16
            assert "fds=20" in warden.log
            patient.close()
        wait_for(lambda: scene.use()["fds"] == 0)


def test_b27_descriptors_that_the_gate_has_no_room_for(scene: Scene) -> None:
    pid = scene.warden.gate_pid
    client = scene.attack()
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(each) for each in os.listdir(f"/proc/{pid}/fd")}  # noqa: PTH208
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (max(used) + 1, before[1]))
    try:
        with pipe_ends(16) as ends:
            client.send_raw(with_fds(16), ends)
            scene.assert_closed(client)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def take_call(scene: Scene) -> Message:
    call = scene.host.wait_call("Ping")
    scene.host.reply(call)
    return call


def write_all(fds: Sequence[int]) -> None:
    for number, fd in enumerate(fds):
        os.write(fd, bytes([number]))
        os.close(fd)


def test_b28_descriptors_in_two_parts_of_one_message(scene: Scene, name: str) -> None:
    client = scene.attack()
    data = with_fds(2, to=name, body=bytes(4) + b"\1\0\0\0")
    pipes = [os.pipe(), os.pipe()]
    client.send_raw(data[:30], [pipes[0][1]])
    time.sleep(0.02)
    client.send_raw(data[30:], [pipes[1][1]])
    write_all(take_call(scene).fds)
    assert [os.read(reading, 5) for reading, _ in pipes] == [b"\0", b"\1"]
    for fd in (fd for pair in pipes for fd in pair):
        os.close(fd)


def test_b28_two_messages_with_descriptors_at_once(scene: Scene, name: str) -> None:
    client = scene.attack()
    pipes = [os.pipe(), os.pipe()]
    data = b"".join(with_fds(1, to=name, serial=n, body=bytes(4)) for n in (77, 78))
    client.send_raw(data, [writing for _, writing in pipes])
    for number, (reading, _) in enumerate(pipes):
        (fd,) = take_call(scene).fds
        os.write(fd, bytes([number]))
        os.close(fd)
        assert os.read(reading, 5) == bytes([number])
    for fd in (fd for pair in pipes for fd in pair):
        os.close(fd)


def test_b29_sockets_that_carry_themselves(scene: Scene) -> None:
    client = scene.attack()
    for serial in range(100, 130):
        one, other = socket.socketpair()
        socket.send_fds(one, [b"x"], [one.fileno(), other.fileno()])
        client.send_raw(with_fds(2, serial=serial), [one.fileno(), other.fileno()])
        one.close()
        other.close()
        assert client.wait_reply(serial).error is None
    echo(client)


def test_b30_unknown_flags_are_taken_away(scene: Scene, name: str) -> None:
    client = scene.attack()
    client.send_raw(forge([*without(6), (6, "s", name)], flags=0xFE))
    assert take_call(scene).header.flags & ~7 == 0
    assert client.wait_reply(77).error is None


def test_b31_sixteen_bytes_are_no_message(scene: Scene) -> None:
    for kind in (1, 2, 3, 4):
        client = scene.attack()
        client.send_raw(forge((), kind=kind))
        scene.assert_closed(client)
    client = scene.attack()
    client.send_raw(forge((), kind=9))  # a type that nobody knows needs no field
    echo(client)


def test_b31_fields_of_any_length(scene: Scene) -> None:
    client = scene.attack()
    for more in range(1, 9):
        client.send_raw(forge([*GOOD, (99, "s", "x" * more)], serial=100 + more))
        assert client.wait_reply(100 + more).error is None


def round_trips(client: RawClient, count: int) -> float:
    """Return the median of so many, in seconds."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        echo(client)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def flood(client: RawClient, data: bytes, until: threading.Event) -> None:
    """Send it over and over."""
    client.sock.settimeout(0.2)
    while not until.is_set():
        try:
            client.sock.send(data)
        except TimeoutError:
            continue


@pytest.mark.parametrize("kind", [CALL, SIGNAL])
def test_b32_very_many_tiny_messages_are_read_more_slowly(scene: Scene, kind: int) -> None:
    # Calls that are refused, and broadcasts that nobody hears.
    fields: list[Field] = [(1, "o", "/"), (2, "s", "a.b"), (3, "s", "M")]
    scene.warden.change_access(scene.villain, rules=["send:@/:a.b.M"])
    if kind == CALL:
        fields.append((6, "s", "org.example.Hidden"))
        scene.warden.change_access(scene.villain, deny=["send:org.example.Hidden"])
    client, done = scene.attack(), threading.Event()
    mute = forge(fields, kind=kind, flags=1) * 500
    thread = threading.Thread(target=flood, args=(client, mute, done))
    thread.start()
    try:
        if kind == CALL:  # else the bus may be what slows it down
            wait_for(lambda: scene.use()["throttled"], 10)
        time.sleep(0.3)
        for other in (scene.other, scene.host):
            assert round_trips(other, 50) < 0.1
        scene.sibling_works()
    finally:
        done.set()
        thread.join()
    wait_for(lambda: scene.use()["messages_per_second"] < 100, 10)
    scene.assert_alive(client)


def test_b32_messages_a_second_have_a_budget(bus: Bus, folder: Path) -> None:
    with (
        open_limited(bus, folder, messages_per_second=2000) as warden,
        open_scene(warden) as scene,
    ):
        client = scene.attack()
        echo(client)
        start = time.monotonic()
        calls = 3500
        for _ in range(calls):
            client.start_call(ECHO, PATH, ECHO, "Ping", flags=1)
        echo(client)  # in its turn
        assert 0.3 < time.monotonic() - start < 8
        assert scene.use()["throttled"] > 0
        scene.others_work()


def test_b32_nothing_is_lost_of_who_sends_much_and_leaves(scene: Scene, name: str) -> None:
    # Each one is judged anew, so that the connection has to wait for its turn many times.
    client = scene.attack()
    data = b"".join(
        forge([(1, "o", f"/n{n}"), (3, "s", "Last"), (6, "s", name)], flags=1) for n in range(300)
    )
    client.send_raw(data)
    client.close()
    paths = [scene.host.wait_call("Last").header.path for _ in range(300)]
    assert paths == [f"/n{n}" for n in range(300)]


def test_b32_first_call_of_who_leaves_at_once_arrives(scene: Scene) -> None:
    # Its destination's owner has to be asked for first.
    for number in range(5):
        name = f"org.example.Late{number}"
        scene.host.request_name(name)
        scene.warden.change_access(scene.villain, rules=["send:org.example.L*"])
        client = scene.attack()
        client.send_raw(forge([(1, "o", "/a"), (3, "s", "Last"), (6, "s", name)], flags=1))
        client.close()
        call = scene.host.wait_call("Last")
        assert call.header.type == MessageType.METHOD_CALL
        scene.host.release_name(name)
