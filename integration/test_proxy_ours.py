"""`buswarden proxy` where it is alone: sockets, log, signals, its other name, a launcher's sandbox."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from integration.harness.clients import run
from integration.harness.other_user import NOBODY, as_user
from integration.harness.processes import PROJECT, make_env, running, wait_until
from integration.harness.proxies import (
    OURS,
    PROGRAMS,
    SECOND,
    Proxy,
    Scene,
    World,
    echo_error,
    open_proxy,
    refused,
)
from integration.harness.rawclient import BUS, BUS_PATH, RawClient, connect_socket
from integration.harness.scripts import echo
from integration.harness.service import ECHO, PATH
from integration.harness.stage import UNKNOWN

FAILED = "org.freedesktop.DBus.Error.Failed"


@pytest.fixture
def scene(world: World) -> Scene:
    return Scene(kind=OURS, world=world)


def test_bug_9_a_glob_for_names_that_have_a_number(scene: Scene) -> None:
    mine = "org.kde.StatusNotifierItem"
    with scene.client("--own=org.kde.StatusNotifierItem-*", "--talk=org.example.Sec*d") as app:
        for name in (f"{mine}-4711-1", f"{mine}-2-1.x"):
            assert app.request_name(name) == 1
            assert scene.world.host.name_owner(name) == app.unique_name
        for name in (mine, f"{mine}x-1", "org.kde.Other"):
            reply = app.call(BUS, BUS_PATH, BUS, "RequestName", "su", (name, 0))
            assert reply.error == UNKNOWN
        assert echo_error(app, SECOND) == ""
        assert echo_error(app, ECHO) == UNKNOWN
    done = run(*PROGRAMS[OURS], "--help")
    assert "org.kde.StatusNotifierItem-*" in done.out


# -- addresses, sockets, arguments --------------------------------------------------------------------


def test_the_runtime_directory_as_address(world: World) -> None:
    path = world.next_path()
    env = {"XDG_RUNTIME_DIR": str(world.folder)}
    with open_proxy(OURS, path, ["unix:runtime=yes", str(path)], env=env) as proxy:
        echo(proxy.connect())


@pytest.mark.parametrize(
    "address", ["", "bogus", "tcp:host=localhost", "unixexec:path=/bin/x", "unix:path=", "unix:"]
)
def test_an_address_that_cannot_be_used_is_refused_at_once(folder: Path, address: str) -> None:
    assert f"bus address {address!r}: " in refused(address, str(folder / "s"))
    assert not (folder / "s").exists()


def test_files_are_not_removed_for_a_socket(folder: Path) -> None:
    (folder / "file").write_text("precious")
    (folder / "dir").mkdir()
    for name in ("file", "dir"):
        assert "socket" in refused("unix:path=/b", str(folder / name))
    assert (folder / "file").read_text() == "precious"
    assert (folder / "dir").is_dir()


def test_what_another_bound_there_meanwhile_is_not_removed(world: World) -> None:
    path = world.next_path()
    with open_proxy(OURS, path, [world.bus.address, str(path)]) as one:
        with open_proxy(OURS, path, [world.bus.address, str(path)]) as two:
            assert one.end() == 0
            echo(two.connect())
            assert two.end() == 0
    assert not path.exists()


def test_nothing_is_left_if_a_later_group_cannot_start(folder: Path) -> None:
    refused("unix:path=/b", str(folder / "s"), "unix:path=/b", "/nonexistent/s")
    refused("unix:path=/b", str(folder / "s"), "unix:path=/b", str(folder / "t"), "--talk=x")
    refused("unix:path=/b", str(folder / "s"), "unix:path=/b", str(folder / "s"))
    refused("unix:path=/b", "")
    refused("unix:path=/b", str(folder / ("x" * 120)))
    refused("unix:path=/b", str(folder / "s"), "--fd=99")
    assert list(folder.iterdir()) == []


def test_only_the_owner_may_connect(world: World) -> None:
    path = world.next_path()
    with open_proxy(OURS, path, [world.bus.address, str(path)]):
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.getuid() != 0, reason="the machine's tests run without root")
def test_another_user_is_turned_away(world: World) -> None:
    path = world.next_path()
    world.folder.chmod(0o755)
    with open_proxy(OURS, path, [world.bus.address, str(path)]) as proxy:
        path.chmod(0o666)

        def try_it() -> str:
            with connect_socket(proxy.address) as sock:
                sock.settimeout(10)
                try:
                    sock.sendall(b"\0AUTH EXTERNAL 30\r\n")  # the proxy's own uid
                    return sock.recv(99).decode()
                except ConnectionError:
                    return ""

        try:
            assert as_user(NOBODY, try_it) == ""
        finally:
            world.folder.chmod(0o700)


def test_a_rule_that_can_match_nothing_is_told(world: World, folder: Path) -> None:
    path = world.next_path()
    arguments = [world.bus.address, str(path), "--filter", "--call=org.example.X=x.Y"]
    with open_proxy(OURS, path, arguments, log=folder / "log") as proxy:
        assert "can match no message" in proxy.process.log
        assert len(proxy.process.log.splitlines()) == 1


# -- log ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filtered", [True, False])
def test_log(scene: Scene, filtered: bool) -> None:
    options = ["--filter", f"--talk={ECHO}"] if filtered else []
    with scene.proxy("--log", *options) as proxy:
        app = proxy.connect()
        name = proxy.path.name
        for _ in range(2):  # what is known already is printed, too
            echo(app)
            line = proxy.process.wait_line(f"allowed {name} {app.unique_name} -> {ECHO}")
            assert f"call {ECHO}.Echo at {PATH} #" in line
            # What the bus itself has to say comes when it comes.
            while BUS in (line := proxy.process.wait_line(f"allowed {name} {app.unique_name} <- ")):
                pass
            assert "return to #" in line
        app.call(SECOND, PATH, ECHO, "Echo", "s", ("x",))
        word = "denied" if filtered else "allowed"
        line = proxy.process.wait_line(f"{word} {name} {app.unique_name} -> {SECOND}")
        assert f"call {ECHO}.Echo at {PATH}" in line
        if filtered:
            assert line.endswith(": no rule allows sending it")


def test_log_keeps_the_order(scene: Scene) -> None:
    with scene.proxy("--log", "--filter", f"--talk={ECHO}") as proxy:
        app = proxy.connect()
        serials = [
            app.start_call((ECHO, SECOND)[number % 2], PATH, ECHO, "Echo", "s", ("x",))
            for number in range(20)
        ]
        for serial in serials:
            app.wait_reply(serial)
        lines: list[str] = []
        while len(lines) < 20:
            line = proxy.process.read_line()
            if f" -> {ECHO} " in line or f" -> {SECOND} " in line:
                lines.append(line.split()[0])
        assert lines == ["allowed", "denied"] * 10


def test_a_log_that_nobody_reads_any_more(world: World) -> None:
    path = world.next_path()
    read_end, write_end = os.pipe()
    argv = [*PROGRAMS[OURS], world.bus.address, str(path), "--log"]
    with subprocess.Popen(argv, stdout=write_end, env=make_env()) as process:
        try:
            os.close(write_end)
            os.close(read_end)
            assert wait_until(lambda: listens(path))
            with RawClient.connect(f"unix:path={path}") as client:
                echo(client)
                echo(client)
        finally:
            process.terminate()
        assert process.wait(10) == -signal.SIGTERM


# -- ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_and_leaves_nothing(world: World, number: signal.Signals) -> None:
    path = world.next_path()
    before = set(world.folder.iterdir())
    with open_proxy(OURS, path, [world.bus.address, str(path), "--filter"]) as proxy:
        client = proxy.connect()
        assert not Path(f"/proc/{proxy.process.pid}/task/{proxy.process.pid}/children").read_text()
        proxy.process.send_signal(number)
        assert proxy.process.wait() == -number
        assert client.is_closed()
    assert set(world.folder.iterdir()) == before


def test_a_socket_of_one_that_was_killed_is_taken_over(world: World) -> None:
    path = world.next_path()
    with open_proxy(OURS, path, [world.bus.address, str(path)]) as proxy:
        proxy.process.send_signal(signal.SIGKILL)
        proxy.process.wait()
    assert path.is_socket()
    with open_proxy(OURS, path, [world.bus.address, str(path)]) as proxy:
        echo(proxy.connect())
        assert proxy.end() == 0
    assert not path.exists()


def test_many_clients_leave_no_descriptor(scene: Scene) -> None:
    with scene.proxy("--filter", f"--talk={ECHO}") as proxy:
        echo(proxy.connect())
        before = proxy.fds
        for _ in range(3):
            clients = [RawClient.connect(proxy.address) for _ in range(60)]
            for client in clients:
                client.start_call(ECHO, PATH, ECHO, "Slow", "u", (1,))
                client.close()
        assert wait_until(lambda: proxy.fds == before)


def test_too_many_clients_are_turned_away(scene: Scene) -> None:
    with scene.proxy("--filter") as proxy:
        stays = [proxy.connect() for _ in range(256)]
        with pytest.raises((EOFError, ConnectionError)):
            proxy.connect()
        stays.pop().close()
        assert wait_until(lambda: _connects(proxy))


def _connects(proxy: Proxy) -> bool:
    try:
        proxy.connect()
    except (EOFError, ConnectionError):
        return False
    return True


# -- by another name, and in a launcher's ways ---------------------------------------------------------


def test_a_link_named_as_the_other_program(world: World, folder: Path) -> None:
    link = folder / "xdg-dbus-proxy"
    link.symlink_to(Path(sys.executable).parent / "buswarden")
    assert run(str(link), "--version").out.startswith("xdg-dbus-proxy 0.1.")
    failed = run(str(link), "proxy")
    assert (failed.code, failed.err) == (
        1,
        "xdg-dbus-proxy: proxy: no socket PATH behind this ADDRESS\n",
    )
    path = world.next_path()
    with running(
        [str(link), world.bus.address, str(path), "--filter", f"--talk={ECHO}"]
    ) as process:
        assert wait_until(lambda: listens(path))
        with RawClient.connect(f"unix:path={path}") as client:
            echo(client)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM


def listens(path: Path) -> bool:
    """Say whether somebody takes connections: the file is there a moment before."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def test_a_service_finds_the_files_of_the_proxys_own_sandbox(world: World, folder: Path) -> None:
    # A portal looks for /.flatpak-info in the root of whoever is connected: the launcher puts it there.
    (folder / "info").write_text("[Application]\nname=org.example.App\n")
    path = world.next_path()
    path.touch()
    wrapper = ["bwrap", "--unshare-user", "--dev-bind", "/usr", "/usr", "--proc", "/proc"]
    for name in (
        "/bin",
        "/lib",
        "/lib64",
        "/etc",
        "/tmp",
        str(PROJECT),
        sys.prefix,
        sys.base_prefix,
    ):
        if Path(name).exists():
            wrapper += ["--bind", str(Path(name).resolve()), name]
    wrapper += ["--ro-bind", str(folder / "info"), "/.flatpak-info", "--die-with-parent", "--"]
    arguments = [world.bus.address, str(path), "--filter", f"--talk={ECHO}"]
    with open_proxy(OURS, path, arguments, wrapper=wrapper) as proxy:
        client = proxy.connect()
        echo(client)
        (pid,) = world.host.driver("GetConnectionUnixProcessID", "s", client.unique_name)
        assert "org.example.App" in Path(f"/proc/{pid}/root/.flatpak-info").read_text()
        proxy.close_fd()
        assert wait_until(lambda: not path.exists())


def test_nothing_slow_is_imported(folder: Path) -> None:
    code = (
        "import sys\n"
        "from broker.cli.main import main\n"
        "code = main(['proxy', 'unix:path=/b', '/nonexistent/s', '--filter', '--talk=org.example.X'])\n"
        "slow = {'trio', 'rich', 'dbus_next', 'click', 'asyncio', 'sqlite3', 'argparse', 'hashlib', 'subprocess'}\n"
        "print(code, sorted(slow & sys.modules.keys()))\n"
    )
    assert run(sys.executable, "-c", code).out == "1 []\n"
