"""Threats A: what a client may try before it has said Hello."""

import os
import resource
import socket
import stat
import time
from pathlib import Path

import pytest

from broker.wire.interfaces import DRIVER
from integration.harness.buses import Bus
from integration.harness.clients import run
from integration.harness.other_user import NOBODY, as_user
from integration.harness.rawclient import connect_socket
from integration.harness.relay import Relay, running_relay
from integration.harness.scripts import auth, echo, echo_message, hello_message, read_until
from integration.harness.service import running_service
from integration.harness.supervised import Warden, open_warden, wait_for
from integration.harness.threats import Scene, assert_rests, is_closed, open_limited, open_scene

BEGIN = b"BEGIN\r\n"
HELLO = BEGIN + hello_message()
OK = b"\0AUTH EXTERNAL\r\nDATA\r\n"


def answer(scene: Scene, data: bytes) -> bytes:
    """Return the first line that the gate answers to these bytes."""
    return read_until(scene.raw(data), b"\r\n")


def assert_ended(scene: Scene, data: bytes) -> None:
    """Assert that these bytes end the connection, and that it never got as far as a message."""
    sock = scene.raw(data)
    said = b""
    while more := receive(sock):
        said += more
    assert b"NameAcquired" not in said
    assert scene.connections() == 0


def receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except ConnectionError:
        return b""


def test_a1_no_byte_of_a_clients_handshake_reaches_the_bus(bus: Bus, folder: Path) -> None:
    with (
        running_relay(folder / "relay", bus.address) as relay,
        running_service(bus.address),
        open_warden(
            bus, folder / "run", "--bus", f"session={relay.address}", add_bus=False
        ) as warden,
        open_scene(warden) as scene,
    ):
        before = settled(relay)  # the supervisor's own connection passes there, too
        sock = scene.raw(b"\0AUTH NONSENSE\r\nAUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\n")
        read_until(sock, b"AGREE_UNIX_FD\r\n")
        assert settled(relay) == before
        sock.sendall(HELLO)
        read_until(sock, b"NameAcquired")
        assert relay.passed > before


def settled(relay: Relay) -> int:
    """Return how many bytes have passed, once no more do."""
    passed = -1
    while passed != relay.passed:
        passed = relay.passed
        time.sleep(0.1)
    return passed


@pytest.mark.parametrize("first", [b"A", b"\r", b"\x01", b"l", b"\xff"])
def test_a2_first_byte_is_not_nul(scene: Scene, first: bytes) -> None:
    assert_ended(scene, first + auth()[1:] + HELLO)


@pytest.mark.parametrize("before", [b"\0", b"\0AUTH\r\n", b"\0AUTH EXTERNAL\r\n"])
def test_a3_begin_before_ok(scene: Scene, before: bytes) -> None:
    assert_ended(scene, before + HELLO)


@pytest.mark.parametrize(
    "line",
    [
        b"begin",
        b" BEGIN",
        b"\tBEGIN",
        b"BEGIN\n",
        b"BEGIN\t",
        b"\rBEGIN",
        b"BEGIN\0",
        b"BEGINBEGIN",
        b"BEG\xc3\x8fN",
        b"",
    ],
)
def test_a4_almost_begin_is_not_begin(scene: Scene, line: bytes) -> None:
    sock = scene.raw(OK)
    read_until(sock, b"OK ")
    sock.sendall(line + b"\r\n")
    assert sock.recv(100).rpartition(b"\r\n")[0].endswith(b"ERROR") or is_closed(sock)
    assert scene.connections() == 0


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\n\r", b"\0"])
def test_a4_only_cr_lf_ends_a_line(scene: Scene, end: bytes) -> None:
    sock = scene.raw(OK)
    read_until(sock, b"\r\n")
    sock.sendall(b"BEGIN" + end + hello_message())
    sock.settimeout(0.1)
    with pytest.raises(TimeoutError):
        sock.recv(100)
    assert scene.connections() == 0


@pytest.mark.parametrize("more", [b" ", b" x", b" BEGIN"])
def test_a5_begin_with_an_argument(scene: Scene, more: bytes) -> None:
    assert_ended(scene, OK + b"BEGIN" + more + b"\r\n" + hello_message())


def test_a6_begin_as_data_or_in_a_body_means_nothing(scene: Scene) -> None:
    for data in (b"DATA BEGIN", b"DATA " + BEGIN.hex().encode()):
        assert answer(scene, b"\0AUTH EXTERNAL\r\n" + data + b"\r\n").startswith(b"DATA\r\n")
    assert scene.connections() == 0
    client = scene.attack()
    echo(client, "\r\nBEGIN\r\n\0AUTH EXTERNAL 30\r\n".replace("\0", ""))
    echo(client)


def test_a7_lines_in_pieces(scene: Scene) -> None:
    sock = scene.raw()
    for piece in (b"\0", b"AUTH EXT", b"ERNAL\r", b"\nDA", b"TA\r", b"\nBEGIN", b"\r"):
        sock.sendall(piece)
        time.sleep(0.01)
    sock.sendall(b"\n" + hello_message()[:20])
    time.sleep(0.01)
    sock.sendall(hello_message()[20:])
    assert read_until(sock, b"NameAcquired")


def test_a8_everything_in_one_write(scene: Scene) -> None:
    sock = scene.raw(auth() + b"NEGOTIATE_UNIX_FD\r\n" + HELLO + echo_message(2, "at once"))
    assert read_until(sock, b"at once\0")


@pytest.mark.parametrize(
    "data",
    [b"\0" + b"A" * 20_000, b"\0" + b"DATA\r\n" * 4000, b"\0AUTH EXTERNAL " + b"30" * 10_000],
)
def test_a9_more_than_16_kib_of_authentication(scene: Scene, data: bytes) -> None:
    assert is_closed(scene.raw(data))


def test_a10_six_failures_are_enough(scene: Scene) -> None:
    assert_ended(scene, b"\0" + b"AUTH NONSENSE\r\n" * 6 + OK[1:] + HELLO)
    sock = scene.raw(b"\0" + b"AUTH NONSENSE\r\n" * 5 + OK[1:] + HELLO)
    assert read_until(sock, b"NameAcquired").count(b"REJECTED") == 5


def test_a11_silence_and_trickle_end_in_time(bus: Bus, folder: Path) -> None:
    with open_limited(bus, folder, handshake_seconds=1) as warden, open_scene(warden) as scene:
        names = len(scene.host.list_names())
        start = time.monotonic()
        silent, trickling = scene.raw(), scene.raw()
        later = scene.raw(auth() + BEGIN)  # on the bus, but without a Hello
        for byte in auth():
            trickling.send(bytes([byte]))
            time.sleep(0.02)
        assert len(scene.host.list_names()) == names
        assert all(is_closed(sock) for sock in (silent, trickling, later))
        assert 0.9 < time.monotonic() - start < 3
        assert "handshake_seconds=1" in warden.log


@pytest.mark.parametrize(
    "mechanism", [b"ANONYMOUS", b"ANONYMOUS 74", b"DBUS_COOKIE_SHA1 30", b"KERBEROS_V4", b""]
)
def test_a12_other_mechanisms(scene: Scene, mechanism: bytes) -> None:
    sock = scene.raw(b"\0AUTH " + mechanism + b"\r\n")
    assert read_until(sock, b"\r\n") == b"REJECTED EXTERNAL\r\n"
    sock.sendall(OK[1:] + HELLO)
    assert read_until(sock, b"NameAcquired")


def test_a13_a_claim_that_is_no_uid_is_rejected(scene: Scene) -> None:
    for uid in (b"-1", b"+0", b"00", b"root", b"4294967296"):
        said = answer(scene, b"\0AUTH EXTERNAL " + uid.hex().encode() + b"\r\n")
        assert said == b"REJECTED EXTERNAL\r\n", uid
        scene.leave()


def test_a13_a_claimed_uid_gives_no_right(scene: Scene) -> None:
    """The kernel decides which user may connect, and the gate gives its own uid to the bus."""
    before = set(scene.host.list_names())
    sock = scene.raw(b"\0AUTH EXTERNAL " + b"12345".hex().encode() + b"\r\n" + HELLO)
    assert read_until(sock, b"NameAcquired")
    (name,) = set(scene.host.list_names()) - before
    assert scene.host.driver("GetConnectionUnixUser", "s", name) == (os.geteuid(),)


def test_bug_7_a_program_in_a_user_namespace_connects(scene: Scene) -> None:
    """The program claims the uid that the program has in the namespace."""
    inside = ["bwrap", "--unshare-user", "--uid", "1234", "--dev-bind", "/", "/"]
    call = ["--dest", DRIVER, "--object-path", "/", "--method", f"{DRIVER}.GetId"]
    done = run(*inside, "gdbus", "call", "--address", scene.villain.address, *call)
    assert done.ok, done.err
    done = run(
        *inside,
        "dbus-send",
        f"--bus={scene.villain.address}",
        "--print-reply",
        f"--dest={DRIVER}",
        "/",
        f"{DRIVER}.GetId",
    )
    assert done.ok, done.err


@pytest.mark.skipif(os.geteuid() != 0, reason="the machine cannot: another user takes root")
def test_a14_another_user_is_sent_away_without_a_word(scene: Scene) -> None:
    path = scene.villain.socket
    opened = [(path, 0o777), *((each, 0o711) for each in path.parents if each.owner() == "root")]
    before = [(each, stat.S_IMODE(each.stat().st_mode)) for each, _ in opened]

    def intruder() -> str:
        with connect_socket(scene.villain.address) as sock:
            return repr(sock.recv(100))

    try:
        for each, mode in opened:
            each.chmod(each.stat().st_mode | mode)
        assert as_user(NOBODY, intruder) == "b''"
    finally:
        for each, mode in before:
            each.chmod(mode)
    assert "wrong-uid" in scene.warden.log


def test_a15_negotiation_in_and_out_of_its_place(scene: Scene) -> None:
    assert answer(scene, b"\0NEGOTIATE_UNIX_FD\r\n").startswith(b"ERROR")
    sock = scene.raw(OK + b"NEGOTIATE_UNIX_FD\r\n" * 2)
    assert read_until(sock, b"AGREE_UNIX_FD\r\nAGREE_UNIX_FD\r\n")
    sock.sendall(HELLO)
    read_until(sock, b"NameAcquired")
    sock.sendall(b"NEGOTIATE_UNIX_FD\r\n")
    assert is_closed(sock)


@pytest.mark.parametrize("data", [b"\0", auth(), auth() + HELLO])
def test_a16_descriptors_with_the_handshake(scene: Scene, data: bytes) -> None:
    reading, writing = os.pipe()
    sock = scene.raw(data, [writing])
    os.close(writing)
    assert is_closed(sock)
    assert os.read(reading, 1) == b""  # nobody has a copy
    os.close(reading)


def test_a17_descriptors_without_negotiation(scene: Scene) -> None:
    sock = scene.greeted(negotiate=b"")
    reading, writing = os.pipe()
    socket.send_fds(sock, [echo_message(5)], [writing])
    os.close(writing)
    assert is_closed(sock)
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_a18_connections_are_counted_when_they_are_made(scene: Scene) -> None:
    held = [scene.raw() for _ in range(15)]  # the sibling is the sixteenth
    for _ in range(30):
        assert is_closed(scene.raw())
    scene.others_work()
    assert scene.use()["max_connections_per_container"] == 16
    assert "max_connections_per_container=16" in scene.warden.log
    held[0].close()
    wait_for(lambda: scene.use()["max_connections_per_container"] == 15)
    scene.greeted()


def test_a19_no_descriptor_left_for_a_connection(scene: Scene) -> None:
    pid = scene.warden.gate_pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    highest = max(int(each) for each in os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, before[1]))
    try:
        waiting = [scene.raw(auth() + HELLO) for _ in range(8)]
        scene.others_work()
        scene.sibling_works()
        assert_rests(pid)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    served = [sock for sock in waiting if b"NameAcquired" in all_of(sock)]
    assert served, "nobody was let in afterwards"
    assert "accept sandbox=" in scene.warden.log


def all_of(sock: socket.socket) -> bytes:
    """Return what comes until the end, or until a NameAcquired."""
    said = b""
    while b"NameAcquired" not in said and (more := receive(sock)):
        said += more
    return said


def test_a20_who_vanishes_half_way_leaves_nothing(scene: Scene) -> None:
    whole = auth() + b"NEGOTIATE_UNIX_FD\r\n" + HELLO
    flood = whole + echo_message(2, "x" * 200_000)  # more than is read at once
    for size in (*range(0, len(whole) + 1, 9), len(whole) - 1, len(whole), len(flood)):
        sock = connect_socket(scene.villain.address)
        sock.settimeout(0.2)
        try:
            sock.sendall(flood[:size])
        except TimeoutError:
            assert size == len(flood)
        sock.close()
        wait_for(lambda: scene.use()["max_connections_per_container"] < 8)  # room for the next
    wait_for(lambda: scene.use()["max_connections_per_container"] == 1)
    assert "Traceback" not in scene.warden.log


def test_a20_bus_that_cannot_be_reached(bus: Bus, folder: Path) -> None:
    with open_limited(bus, folder) as warden, open_scene(warden) as scene:
        (folder / "bus").rename(folder / "away")
        try:
            assert is_closed(scene.raw(auth() + HELLO))
            scene.others_work()
        finally:
            (folder / "away").rename(folder / "bus")
        scene.greeted()
        assert "bus-unreachable" in warden.log


def test_a21_only_our_own_socket_is_ever_removed(scene: Scene) -> None:
    sandbox = scene.warden.add_server()
    path = sandbox.socket
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_ISSOCK(path.lstat().st_mode)
    precious = path.parent.parent / "precious"
    precious.write_text("keep")
    path.unlink()
    path.symlink_to(precious)
    scene.warden.stop_instance(sandbox)
    assert path.is_symlink()
    assert precious.read_text() == "keep"
    path.unlink()
    precious.unlink()


def test_a22_no_descriptor_would_go_to_a_child(scene: Scene, threatened: Warden) -> None:
    scene.attack()
    scene.raw()
    wait_for(lambda: scene.use()["max_connections_per_container"] == 3)
    folder = Path(f"/proc/{threatened.gate_pid}/fdinfo")
    for each in folder.iterdir():
        flags = next(line for line in each.read_text().splitlines() if line.startswith("flags:"))
        assert int(each.name) <= 2 or int(flags.split()[1], 8) & os.O_CLOEXEC, each.name
