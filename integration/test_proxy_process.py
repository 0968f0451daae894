"""`buswarden proxy` and the real xdg-dbus-proxy as processes: their ends, their clients. Each test runs on both.

What differs on purpose is in test_proxy_differences.py.
"""

import os
import shutil
import signal
import subprocess
import threading
from functools import partial
from pathlib import Path

import pytest

from integration.harness.buses import DAEMON, open_bus
from integration.harness.clients import dbus_send_text, gdbus_text, run
from integration.harness.processes import PROJECT, is_running, running, wait_until
from integration.harness.proxies import OURS, PROGRAMS, SECOND, PatientClient, World, open_proxy
from integration.harness.rawclient import RawClient, connect_socket
from integration.harness.scripts import echo
from integration.harness.service import ECHO, PATH, running_service


@pytest.fixture(params=list(PROGRAMS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- ends ----------------------------------------------------------------------------------------------


def test_it_ends_when_the_other_end_closes(kind: str, world: World) -> None:
    path = world.next_path()
    with open_proxy(kind, path, [world.bus.address, str(path)]) as proxy:
        client = proxy.connect()
        assert path.is_socket()
        assert proxy.end() == 0
        assert not path.exists()
        assert client.is_closed()


def test_it_ends_with_a_pipe_and_whoever_held_it(kind: str, world: World) -> None:
    # As a launcher does it: the proxy has the write end, the launcher reads, and is killed.
    path = world.next_path()
    code = (
        "import os, subprocess, sys, time\n"
        "read_end, write_end = os.pipe()\n"
        "argv = [*sys.argv[1:], f'--fd={write_end}']\n"
        "child = subprocess.Popen(argv, pass_fds=[write_end])\n"
        "os.close(write_end)\n"
        "assert os.read(read_end, 1) == b'x'\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    argv = [shutil.which("python3") or "python3", "-c", code, *PROGRAMS[kind]]
    with running([*argv, world.bus.address, str(path)]) as launcher:
        pid = int(launcher.read_line())
        assert path.is_socket()
        launcher.send_signal(signal.SIGKILL)
        assert wait_until(lambda: not path.exists())
        assert wait_until(lambda: not is_running(pid))


def test_the_bus_is_killed(kind: str, folder: Path) -> None:
    path = folder / "s"
    with open_bus(DAEMON, folder) as bus:
        with open_proxy(kind, path, [bus.address, str(path), "--filter"]) as proxy:
            client = proxy.connect()
            os.kill(bus.pid, signal.SIGKILL)
            assert client.is_closed()
            # It waits for the bus to come back, or for its own end.
            with pytest.raises((EOFError, ConnectionError)):
                proxy.connect()
            assert proxy.process.returncode is None
            assert proxy.end() == 0
        assert not path.exists()


def test_the_bus_comes_back(kind: str, folder: Path) -> None:
    path = folder / "s"
    arguments = [f"unix:path={folder}/bus", str(path), "--filter", f"--talk={ECHO}"]
    with open_proxy(kind, path, arguments) as proxy:
        for _ in range(2):
            with pytest.raises((EOFError, ConnectionError)):
                proxy.connect()
            with open_bus(DAEMON, folder) as bus, running_service(bus.address):
                echo(proxy.connect())


# -- clients -------------------------------------------------------------------------------------------


def test_many_clients_at_once(kind: str, world: World) -> None:
    path = world.next_path()
    arguments = [world.bus.address, str(path), "--filter", f"--talk={ECHO}"]
    failures: list[str] = []

    def talk() -> None:
        try:
            with PatientClient.connect(f"unix:path={path}") as client:
                for number in range(10):
                    echo(client, str(number))
        except (AssertionError, OSError, EOFError) as exc:
            failures.append(repr(exc))

    with open_proxy(kind, path, arguments) as proxy:
        threads = [threading.Thread(target=talk) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        clients = [proxy.connect() for _ in range(100)]
        for client in clients:
            echo(client)


def test_a_client_is_killed_in_the_middle(kind: str, world: World) -> None:
    path = world.next_path()
    arguments = [world.bus.address, str(path), "--filter", f"--talk={ECHO}"]
    with open_proxy(kind, path, arguments) as proxy:
        stays = proxy.connect()
        for cut in (0, 1, 20, 60):
            goes = proxy.connect()
            owner_of = partial(world.host.driver, "NameHasOwner", "s", goes.unique_name)
            goes.start_call(ECHO, PATH, ECHO, "Slow", "u", (50,))
            goes.send_raw(b"l\x01\0\x01\0\0\1\0\x09\0\0\0\x70\0\0\0" + bytes(100) if cut else b"")
            goes.sock.close()
            assert wait_until(lambda ask=owner_of: ask() == (False,))  # type: ignore[misc]
            echo(stays)


def test_bug_7_a_client_may_claim_the_uid_that_it_knows(kind: str, world: World) -> None:
    """The kernel says who connects. xdg-dbus-proxy leaves the claim to the bus, which rejects it."""
    path = world.next_path()
    with open_proxy(kind, path, [world.bus.address, str(path)]):
        sock = connect_socket(f"unix:path={path}")
        sock.settimeout(10)
        sock.sendall(b"\0AUTH EXTERNAL " + b"12345".hex().encode() + b"\r\n")
        assert sock.recv(99).startswith(b"OK" if kind == "buswarden" else b"REJECTED")
        sock.close()


@pytest.mark.parametrize("program", ["gdbus", "dbus-send"])
def test_real_clients(kind: str, world: World, program: str) -> None:
    path = world.next_path()
    call = {"gdbus": gdbus_text, "dbus-send": dbus_send_text}[program]
    arguments = [world.bus.address, str(path), "--filter", f"--talk={ECHO}"]
    with open_proxy(kind, path, arguments) as proxy:
        answered = call(proxy.address, ECHO, PATH, f"{ECHO}.Echo", "hi")
        assert (answered.ok, "hi" in answered.out) == (True, True)
        assert "ServiceUnknown" in call(proxy.address, SECOND, PATH, f"{ECHO}.Echo", "hi").err


def test_a_client_in_a_sandbox(kind: str, world: World) -> None:
    path = world.next_path()
    arguments = [world.bus.address, str(path), "--filter", f"--talk={ECHO}"]
    with open_proxy(kind, path, arguments):
        sandbox = [
            "bwrap",
            "--unshare-user",
            "--unshare-pid",
            "--unshare-net",
            "--ro-bind",
            "/",
            "/",
            "--tmpfs",
            "/tmp",
        ]
        inside = ["--bind", str(path), "/tmp/bus", "--dev", "/dev", "--proc", "/proc", "--"]
        call = ["gdbus", "call", "--address", "unix:path=/tmp/bus", "--dest", ECHO]
        call += ["--object-path", PATH, "--method", f"{ECHO}.Echo", "'hi'"]
        done = run(*sandbox, *inside, *call)
        assert (done.code, done.out) == (0, "('hi',)\n"), done.err
        hidden = run(*sandbox, *inside, *[SECOND if word == ECHO else word for word in call])
        assert "ServiceUnknown" in hidden.err


def test_a_proxy_behind_ours(kind: str, world: World) -> None:
    # Behind theirs: 0.1.4 takes no pipelined handshake, and 0.1.9 and itself cannot be nested.
    first, second = world.next_path(), world.next_path()
    options = ["--filter", f"--talk={ECHO}", f"--talk={SECOND}"]
    with (
        open_proxy(OURS, first, [world.bus.address, str(first), *options]) as outside,
        open_proxy(kind, second, [outside.address, str(second), *options[:2]]) as inside,
    ):
        client = inside.connect()
        echo(client)
        assert client.driver("NameHasOwner", "s", SECOND) == (False,)
        with RawClient.connect(world.bus.address) as host:
            assert host.driver("NameHasOwner", "s", client.unique_name) == (True,)


def test_a_launcher_that_closes_what_it_can(kind: str, world: World) -> None:
    # No environment, no standard descriptors, a pipe that does not block, arguments that come late.
    path = world.next_path()
    read_args, write_args = os.pipe()
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(read_end, True)
    argv = [*PROGRAMS[kind], f"--fd={write_end}", f"--args={read_args}"]
    argv[0] = shutil.which(argv[0]) or argv[0]
    process = subprocess.Popen(
        ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *argv],
        env={},
        cwd=PROJECT,
        pass_fds=[read_args, write_end],
    )
    os.close(read_args)
    os.close(write_end)
    try:
        text = f"{world.bus.address}\0{path}\0--log\0--filter\0--talk={ECHO}\0"
        os.write(write_args, text.encode())
        os.close(write_args)
        assert os.read(read_end, 9) == b"x"
        with PatientClient.connect(f"unix:path={path}") as client:
            echo(client)
            assert client.driver("NameHasOwner", "s", SECOND) == (False,)
        os.close(read_end)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
    assert not path.exists()
