"""How `buswarden proxy` and the real xdg-dbus-proxy start: arguments, addresses, sockets. Each test runs on both.

What differs on purpose is in test_proxy_differences.py.
"""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from integration.harness.buses import DAEMON, open_bus
from integration.harness.processes import make_env, running
from integration.harness.proxies import OURS, PROGRAMS, SECOND, World, open_proxy
from integration.harness.scripts import echo
from integration.harness.service import ECHO, PATH, running_service


@pytest.fixture(params=list(PROGRAMS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def start(kind: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run a proxy that is to end by itself."""
    return subprocess.run(
        [*PROGRAMS[kind], *arguments],
        env=make_env(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=20,
        check=False,
    )


# -- arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bogus"],
        ["-x"],
        ["--fd=abc"],
        ["--fd=-1"],
        ["--fd"],
        ["--args"],
        ["--args=x"],
        ["--args=99"],
        ["--filter"],
        ["--filter", "unix:path=/b", "SOCKET"],
        ["--talk=org.example.Early", "unix:path=/b", "SOCKET"],
        ["unix:path=/b"],
        ["unix:path=/b", "--filter"],
        ["unix:path=/b", "SOCKET", "--bogus"],
        ["unix:path=/b", "SOCKET", "--filter=yes"],
        ["unix:path=/b", "SOCKET", "--talk"],
        ["unix:path=/b", "SOCKET", "--talk="],
        ["unix:path=/b", "SOCKET", "--talk=nodots"],
        ["unix:path=/b", "SOCKET", "--talk=*"],
        ["unix:path=/b", "SOCKET", "--see=org.*"],
        ["unix:path=/b", "SOCKET", "--own=org.*.x"],
        ["unix:path=/b", "SOCKET", "--own=:1.5"],
        ["unix:path=/b", "SOCKET", "--see=.org.x"],
        ["unix:path=/b", "SOCKET", f"--see=org.{'x' * 255}"],
        ["unix:path=/b", "SOCKET", "--call=org.example.X"],
        ["unix:path=/b", "SOCKET", "--call="],
        ["unix:path=/b", "SOCKET", "--broadcast=org.example.X"],
        ["unix:path=/b", "SOCKET", "more"],
        ["unix:path=/b", "/nonexistent/folder/socket"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_one_line_and_exit_1(
    kind: str, folder: Path, arguments: list[str]
) -> None:
    made = [str(folder / "s") if argument == "SOCKET" else argument for argument in arguments]
    done = start(kind, *made)
    assert done.returncode == 1
    assert done.stdout == b""
    lines = [line for line in done.stderr.splitlines() if line and b"GLib" not in line]
    assert len(lines) == 1
    if kind == OURS:
        assert lines[0].startswith(b"buswarden proxy: ")


def test_nothing_is_an_error_as_well(kind: str) -> None:
    done = start(kind)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr


@pytest.mark.parametrize("before", [[], ["unix:path=/b", "/tmp/never"]], ids=["first", "behind"])
def test_help_and_version(kind: str, before: list[str]) -> None:
    done = start(kind, *before, "--help")
    assert done.returncode == 0
    for option in ("--fd=FD", "--args=FD", "--sloppy-names", "--broadcast=NAME=RULE"):
        assert option.encode() in done.stdout
    done = start(kind, *before, "--version")
    assert done.returncode == 0
    assert done.stdout.startswith(b"xdg-dbus-proxy 0.1.")


def test_arguments_from_a_descriptor(kind: str, world: World) -> None:
    path = world.next_path()
    read_end, write_end = os.pipe()
    os.write(write_end, f"{world.bus.address}\0{path}\0--filter\0--talk={ECHO}".encode())
    os.close(write_end)
    # They stand where --args stands: what is behind it belongs to their last group.
    with open_proxy(kind, path, [f"--args={read_end}", "--log"], pass_fds=[read_end]) as proxy:
        os.close(read_end)
        client = proxy.connect()
        echo(client)
        assert client.driver("NameHasOwner", "s", SECOND) == (False,)
        assert proxy.end() == 0


# -- addresses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        "unix:path={bus}",
        "unix:path={escaped}",
        "unix:path=/nonexistent/bus;unix:path={bus}",
        "unix:path={bus},guid=00000000000000000000000000000000",
        "unix:guid=00000000000000000000000000000000,path={bus}",
        "unix:path={bus};",
        "unix:path={bus};unix:path=/nonexistent/bus",
    ],
)
def test_address_forms(kind: str, world: World, form: str) -> None:
    bus = f"{world.folder}/bus"
    escaped = "".join(f"%{ord(char):02x}" if char in "bus/" else char for char in bus)
    path = world.next_path()
    arguments = [form.format(bus=bus, escaped=escaped), str(path), "--filter", f"--talk={ECHO}"]
    with open_proxy(kind, path, arguments) as proxy:
        echo(proxy.connect())


def test_an_abstract_address(kind: str, folder: Path) -> None:
    name = f"buswarden-test-{os.getpid()}-{kind}"
    argv = [DAEMON, "--session", "--nofork", "--nopidfile", "--print-address=1"]
    env = {"XDG_RUNTIME_DIR": str(folder), "HOME": str(folder)}
    with running([*argv, f"--address=unix:abstract={name}"], env=env) as bus:
        assert bus.wait_line("unix:").startswith(f"unix:abstract={name}")
        path = folder / "s"
        with open_proxy(kind, path, [f"unix:abstract={name}", str(path), "--filter"]) as proxy:
            assert proxy.connect().driver("GetId")


def test_a_relative_path(kind: str, world: World) -> None:
    path = world.next_path()
    relative = os.path.relpath(path)
    with open_proxy(kind, path, [world.bus.address, relative]) as proxy:
        echo(proxy.connect())
        assert proxy.end() == 0
    assert not path.exists()


# -- sockets -------------------------------------------------------------------------------------------


def test_what_a_launcher_or_another_proxy_left_is_replaced(kind: str, world: World) -> None:
    empty, stale, link = world.next_path(), world.next_path(), world.next_path()
    empty.touch()
    link.symlink_to("/nonexistent/target")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stale))
    for path in (empty, stale, link):
        with open_proxy(kind, path, [world.bus.address, str(path)]) as proxy:
            echo(proxy.connect())
            assert proxy.end() == 0
        assert not os.path.lexists(path)


def test_several_groups(kind: str, world: World, folder: Path) -> None:
    paths = [world.next_path() for _ in range(3)]
    with (
        open_bus(DAEMON, folder) as other,
        running_service(other.address, "org.example.Elsewhere"),
    ):
        arguments = [world.bus.address, str(paths[0]), "--filter", f"--talk={ECHO}"]
        arguments += [other.address, str(paths[1]), "--filter", "--talk=org.example.Elsewhere"]
        arguments += [world.bus.address, str(paths[2])]
        with open_proxy(kind, paths[0], arguments) as proxy:
            one, two, three = (proxy.connect(path) for path in paths)
            echo(one)
            assert one.driver("NameHasOwner", "s", SECOND) == (False,)
            assert two.driver("NameHasOwner", "s", ECHO) == (False,)
            assert two.ask("org.example.Elsewhere", PATH, ECHO, "Echo", "s", ("x",)) == ("x",)
            assert three.driver("NameHasOwner", "s", SECOND) == (True,)
            # Whoever comes through one group may be called through another, as anybody.
            serial = three.start_call(one.unique_name, "/a", "a.b", "Do")
            one.reply(one.wait_call("Do"), "s", ("done",))
            assert three.wait_reply(serial).values == ("done",)
            assert proxy.end() == 0
        assert not any(path.exists() for path in paths)
