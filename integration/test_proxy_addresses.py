"""The addresses that are no unix socket, in `buswarden proxy` and the real xdg-dbus-proxy, at a real dbus-daemon.

Only 127.0.0.1 is ever connected to. The C program passes the client's handshake on, ours makes its own: so
the client here can do whatever is asked of it, and what it may do afterwards is compared.
"""

import os
import socket
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from integration.harness.buses import Bus
from integration.harness.processes import wait_until
from integration.harness.proxies import (
    OURS,
    PROGRAMS,
    SECOND,
    THEIRS,
    error_of,
    open_proxy,
    refused,
)
from integration.harness.rawclient import BUS, BUS_PATH
from integration.harness.scripts import echo
from integration.harness.service import ECHO, PATH
from integration.harness.tcp_world import (
    ANONYMOUS,
    COOKIE,
    TcpWorld,
    closed_port,
    connect,
    open_tcp_world,
)

MIB = 1024 * 1024


@pytest.fixture(params=list(PROGRAMS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(
    scope="module",
    params=[("tcp", COOKIE), ("tcp", ANONYMOUS), ("nonce-tcp", COOKIE), ("nonce-tcp", ANONYMOUS)],
    ids="-".join,
)
def tcp(request: pytest.FixtureRequest) -> Iterator[TcpWorld]:
    transport, auth = request.param
    with tempfile.TemporaryDirectory(prefix="bw-") as name:
        with open_tcp_world(Path(name), transport, auth) as made:
            yield made


@pytest.fixture
def plain(folder: Path) -> Iterator[TcpWorld]:
    """One of each test's own, with cookies."""
    with open_tcp_world(folder, "tcp", COOKIE) as made:
        yield made


# -- tcp and nonce-tcp --------------------------------------------------------------------------------


def test_a_client_uses_the_bus(kind: str, tcp: TcpWorld) -> None:
    path = tcp.world.next_path()
    arguments = [tcp.address, str(path), "--filter", f"--talk={ECHO}"]
    with ExitStack() as stack:
        proxy = stack.enter_context(open_proxy(kind, path, arguments, env=tcp.env))
        one, two = (stack.enter_context(connect(path, tcp.home)) for _ in range(2))
        for client in (one, two, one):
            echo(client)
        assert one.driver("NameHasOwner", "s", SECOND) == (False,)
        assert one.unique_name != two.unique_name
        assert proxy.end() == 0
    assert not path.exists()


def test_whom_the_bus_takes_it_for(kind: str, tcp: TcpWorld) -> None:
    path = tcp.world.next_path()
    with open_proxy(kind, path, [tcp.address, str(path)], env=tcp.env):
        with connect(path, tcp.home) as client:
            host = tcp.world.host
            if tcp.auth == COOKIE:
                uid = host.driver("GetConnectionUnixUser", "s", client.unique_name)
                assert uid == (os.getuid(),)
            else:
                error = error_of(host, "GetConnectionUnixUser", "s", client.unique_name)
                assert error == "org.freedesktop.DBus.Error.Failed"
            # The socket says nothing of a process: dbus 1.14 makes a 0 of that, dbus 1.16 an error.
            reply = host.call(
                BUS, BUS_PATH, BUS, "GetConnectionUnixProcessID", "s", (client.unique_name,)
            )
            unknown = "org.freedesktop.DBus.Error.UnixProcessIdUnknown"
            assert (reply.error, reply.values) == (None, (0,)) or reply.error == unknown


def test_no_descriptors_are_agreed_on(kind: str, tcp: TcpWorld) -> None:
    path = tcp.world.next_path()
    with open_proxy(kind, path, [tcp.address, str(path)], env=tcp.env):
        with connect(path, tcp.home, asks_for_fds=True) as client:
            echo(client)


def test_a_descriptor_that_comes_all_the_same_ends_the_client(tcp: TcpWorld) -> None:
    path = tcp.world.next_path()
    with open_proxy(OURS, path, [tcp.address, str(path)], env=tcp.env) as proxy:
        with connect(path, tcp.home) as client, connect(path, tcp.home) as other:
            before = proxy.fds
            with socket.socket() as sock:
                client.start_call(ECHO, PATH, ECHO, "Echo", "s", ("x",), fds=[sock.fileno()])
            assert client.is_closed()
            assert wait_until(lambda: proxy.fds == before - 2)  # both of its sockets
            echo(other)


def test_much_passes_in_both_directions(kind: str, tcp: TcpWorld) -> None:
    path = tcp.world.next_path()
    with open_proxy(kind, path, [tcp.address, str(path)], env=tcp.env):
        with connect(path, tcp.home) as client:
            text = "x" * (8 * MIB)
            assert client.ask(ECHO, PATH, ECHO, "Echo", "s", (text,)) == (text,)
            for _ in range(5):  # dbus-daemon lets a client wait for so many at a time
                serials = [
                    client.start_call(ECHO, PATH, ECHO, "Echo", "s", (str(number),))
                    for number in range(100)
                ]
                for number, serial in enumerate(serials):
                    assert client.wait_reply(serial).values == (str(number),)


@pytest.mark.parametrize(
    "form",
    [
        "tcp:host=localhost,port={port},family=ipv4",
        "tcp:port={port},host=127.0.0.1",
        "tcp:host=127.0.0.1,port={closed};{good}",
        "unix:path=/nonexistent/bus;{good};tcp:host=127.0.0.1,port={closed}",
        "{good};unix:path=/nonexistent/bus",
        "nonce-tcp:host=127.0.0.1,port={port},noncefile=/nonexistent/nonce;{good}",
    ],
)
def test_address_forms(kind: str, plain: TcpWorld, form: str) -> None:
    address = form.format(port=plain.port, closed=closed_port(), good=plain.address)
    path = plain.world.next_path()
    with open_proxy(kind, path, [address, str(path)], env=plain.env):
        with connect(path, plain.home) as client:
            echo(client)


def test_a_unix_socket_is_taken_before_tcp(kind: str, plain: TcpWorld) -> None:
    path = plain.world.next_path()
    address = f"{plain.world.bus.address};{plain.address}"
    with open_proxy(kind, path, [address, str(path)], env=plain.env) as proxy:
        client = proxy.connect()  # which wants descriptors to be agreed on
        echo(client)
        pid = plain.world.host.driver("GetConnectionUnixProcessID", "s", client.unique_name)
        assert pid == (proxy.process.pid,)


@pytest.mark.parametrize(
    "address",
    ["tcp:host=127.0.0.1,port={closed}", "nonce-tcp:host=127.0.0.1,port={closed},noncefile=/none"],
)
def test_nobody_there_ends_a_client_and_not_the_proxy(
    kind: str, folder: Path, address: str
) -> None:
    path = folder / "s"
    address = address.format(closed=closed_port())
    with open_proxy(kind, path, [address, str(path)]) as proxy:
        for _ in range(2):
            with pytest.raises((EOFError, ConnectionError)):
                connect(path, folder)
        assert proxy.end() == 0


def test_a_bus_that_comes_back_is_connected_to_again(plain: TcpWorld, folder: Path) -> None:
    # An address of a server that goes and comes, at one port.
    port = closed_port()
    path = folder / "s"
    with open_proxy(OURS, path, [f"tcp:host=127.0.0.1,port={port}", str(path)]) as proxy:
        for _ in range(2):
            with socket.create_server(("127.0.0.1", port)) as server:
                server.settimeout(10)
                app = socket.socket(socket.AF_UNIX)
                with app:
                    app.connect(str(path))
                    uid = str(os.getuid()).encode().hex().encode()
                    app.sendall(b"\0AUTH EXTERNAL " + uid + b"\r\nBEGIN\r\n")
                    accepted, _ = server.accept()
                    with accepted:
                        accepted.settimeout(10)
                        assert accepted.recv(99) == b"\0AUTH EXTERNAL " + uid + b"\r\n"
                    app.settimeout(10)
                    while app.recv(99):
                        pass
        assert proxy.end() == 0


@pytest.mark.parametrize("trouble", ["none", "open", "wrong"])
def test_without_the_cookie_the_bus_lets_nobody_in(
    plain: TcpWorld, folder: Path, trouble: str
) -> None:
    home = folder / "home"
    keyrings = home / ".dbus-keyrings"
    keyrings.mkdir(parents=True, mode=0o700)
    if trouble != "none":
        _ask_for_cookie(plain)
        (ring,) = (plain.home / ".dbus-keyrings").iterdir()
        text = ring.read_text()
        (keyrings / ring.name).write_text(
            text if trouble == "open" else text.replace(text.split()[2], "00" * 24)
        )
    if trouble == "open":
        keyrings.chmod(0o755)
    why = {"none": "No such file", "open": "not private to the user", "wrong": "rejected"}[trouble]
    path = plain.world.next_path()
    log = folder / "log"
    env = {"HOME": str(home)}
    with open_proxy(OURS, path, [plain.address, str(path)], env=env, log=log) as proxy:
        with pytest.raises((EOFError, ConnectionError)):
            connect(path, home)
        (line,) = proxy.process.log.splitlines()
        assert "the bus rejected the authentication: EXTERNAL: rejected; DBUS_COOKIE_SHA1: " in line
        assert why in line


def _ask_for_cookie(tcp: TcpWorld) -> None:
    """Have the bus write its cookies, which it does when it is first asked."""
    with socket.create_connection(("127.0.0.1", tcp.port)) as sock:
        sock.settimeout(10)
        uid = str(os.getuid()).encode().hex().encode()
        sock.sendall(b"\0AUTH DBUS_COOKIE_SHA1 " + uid + b"\r\n")
        received = b""
        while not received.endswith(b"\r\n"):
            received += sock.recv(999)
    assert b"DATA " in received


# -- autolaunch ---------------------------------------------------------------------------------------

# dbus-launch needs an X11 display, and a machine for tests has none: so what is run here is a script that
# answers as dbus-launch does, with a real bus.
SCRIPT = """#!/bin/sh
echo "$*" >> "{folder}/asked"
cat "{folder}/answer"
"""


def fake_launch(folder: Path, address: str) -> dict[str, str]:
    """Return an environment whose dbus-launch answers with that address."""
    answer = address.encode() + b"\0" + struct.pack("=i", 4711) + struct.pack("@l", 0)
    (folder / "answer").write_bytes(answer)
    (folder / "bin").mkdir()
    program = folder / "bin" / "dbus-launch"
    program.write_text(SCRIPT.format(folder=folder))
    program.chmod(stat.S_IRWXU)
    return {"DISPLAY": ":99", "PATH": f"{folder}/bin:{os.environ['PATH']}"}


def test_autolaunch_takes_the_bus_that_dbus_launch_gives(kind: str, bus: Bus, folder: Path) -> None:
    env = fake_launch(folder, bus.address)
    path = folder / "s"
    with open_proxy(kind, path, ["autolaunch:", str(path)], env=env) as proxy:
        assert proxy.connect().driver("GetId")
        assert proxy.end() == 0
    machine_id = Path("/etc/machine-id").read_text().strip()
    asked = f"--autolaunch={machine_id} --binary-syntax --close-stderr\n"
    assert (folder / "asked").read_text() == asked


def test_autolaunch_may_give_tcp(kind: str, plain: TcpWorld, folder: Path) -> None:
    env = fake_launch(folder, plain.address) | plain.env
    path = folder / "s"
    with open_proxy(kind, path, ["autolaunch:", str(path)], env=env):
        with connect(path, plain.home) as client:
            echo(client)


def test_no_bus_is_launched_where_one_is(kind: str, bus: Bus, folder: Path) -> None:
    env = fake_launch(folder, "unix:path=/nonexistent")
    path = folder / "s"
    with open_proxy(kind, path, [f"{bus.address};autolaunch:", str(path)], env=env) as proxy:
        assert proxy.connect().driver("GetId")
    assert not (folder / "asked").exists()


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({"DISPLAY": ""}, "there is no DISPLAY"),
        ({"DISPLAY": ":99", "PATH": "/nonexistent"}, "there is no program dbus-launch"),
    ],
)
def test_autolaunch_that_cannot_be_is_refused_at_once(
    folder: Path, env: dict[str, str], problem: str
) -> None:
    line = refused("autolaunch:", str(folder / "s"), env=env)
    assert line.startswith("buswarden proxy: bus address 'autolaunch:': autolaunch: ")
    assert problem in line
    assert not (folder / "s").exists()


def test_autolaunch_that_cannot_be_fails_each_client_of_the_c_program(folder: Path) -> None:
    path = folder / "s"
    with open_proxy(THEIRS, path, ["autolaunch:", str(path)], env={"DISPLAY": ""}):
        with pytest.raises((EOFError, ConnectionError)):
            connect(path, folder)
