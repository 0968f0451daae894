"""X1, X4, P1, P4: from inside `exec` no socket of the host answers, however it was made or is reached."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from integration.harness.clients import run
from integration.harness.exec_probe import probe, report_of
from integration.harness.processes import PYTHON, running
from integration.harness.supervised import Warden

INSIDE: Final = f"/run/user/{os.getuid()}/bus"
Maker = Callable[[Path, ExitStack], list[str]]


@pytest.fixture(params=["/opt", "/srv", "shared"])
def visible(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that a command may see: of the system, or one that is shared with it."""
    parent = tempfile.gettempdir() if request.param == "shared" else request.param
    with tempfile.TemporaryDirectory(dir=parent, prefix="bw-") as name:
        yield Path(name)


def listen(stack: ExitStack, path: str) -> None:
    sock = stack.enter_context(socket.socket(socket.AF_UNIX))
    sock.bind(path)
    sock.listen()


def answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(path) == 0


def by_path(folder: Path, stack: ExitStack) -> list[str]:
    listen(stack, str(folder / "s"))
    return [str(folder / "s")]


def by_relative_path(folder: Path, stack: ExitStack) -> list[str]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        listen(stack, "relative")
    finally:
        os.chdir(before)
    return [str(folder / "relative")]


def renamed(folder: Path, stack: ExitStack) -> list[str]:
    listen(stack, str(folder / "old"))
    (folder / "old").rename(folder / "new")
    return [str(folder / "new")]


def hard_linked(folder: Path, stack: ExitStack) -> list[str]:
    listen(stack, str(folder / "one"))
    (folder / "other").hardlink_to(folder / "one")
    return [str(folder / "one"), str(folder / "other")]


def with_a_newline(folder: Path, stack: ExitStack) -> list[str]:
    listen(stack, str(folder / "a\nb"))
    return [str(folder / "a\nb")]


def behind_a_link(folder: Path, stack: ExitStack) -> list[str]:
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    listen(stack, str(folder / "real/s"))
    return [str(folder / "link/s")]


def in_another_network(folder: Path, stack: ExitStack) -> list[str]:
    script = f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({str(folder / 'n')!r})"
    argv = ["unshare", "--net", PYTHON, "-c", f"{script}; s.listen(); print('up'); input()"]
    if subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True).returncode:
        pytest.skip("the kernel lets no network namespace be made here")
    stack.enter_context(running([*argv[:2], *argv[2:]])).wait_line("up")
    return [str(folder / "n")]


MAKERS: Final = (
    by_path,
    by_relative_path,
    renamed,
    hard_linked,
    with_a_newline,
    behind_a_link,
    in_another_network,
)


def test_attack_x1_a_socket_in_a_folder_that_is_seen(shared: Warden, visible: Path) -> None:
    with ExitStack() as stack:
        paths = [path for make in MAKERS for path in make(visible, stack)]
        assert all(answers(path) for path in paths)
        options = [] if visible.parent == Path("/opt") else ["--share", str(visible)]
        report = report_of(shared.cli("exec", *options, "--", *probe(reach=paths)))
    assert report["reached"] == [INSIDE]


def test_attack_x1_a_socket_that_is_made_later(shared: Warden, visible: Path) -> None:
    """A service that starts anew at the same path, and one that was never there."""
    old, new = str(visible / "old"), str(visible / "new")
    with ExitStack() as stack:
        listen(stack, old)
        options = ["--share", str(visible)]
        script = 'echo up; read line; exec "$@"'
        command = ["sh", "-c", script, "sh", *probe(reach=[old, new])]
        argv = [PYTHON, "-m", "broker.cli", "exec", *options, "--", *command]
        process = stack.enter_context(running(argv, env={"XDG_RUNTIME_DIR": str(shared.runtime)}))
        process.wait_line("up")
        Path(old).unlink()
        listen(stack, old)
        listen(stack, new)
        process.send_line("go")
        assert f'"reached": ["{INSIDE}"]' in process.read_line()


def in_private_mounts(*script: str) -> list[str]:
    """Return the beginning of an argv that mounts first, seen by nobody else."""
    return ["unshare", "--mount", "sh", "-ec", "; ".join((*script, 'exec "$@"')), "sh"]


def cli_under(shared: Warden, prefix: list[str], *args: str) -> dict[str, Any]:
    argv = [*prefix, PYTHON, "-m", "broker.cli", *args]
    return report_of(run(*argv, env={"XDG_RUNTIME_DIR": str(shared.runtime)}))


def test_attack_x1_a_second_mount_of_a_hidden_folder(shared: Warden, visible: Path) -> None:
    """The real bus, the gate and another sandbox in a folder that is bound once more where the command sees it."""
    other = shared.add_server()
    top = shared.runtime.parent
    (visible / "again").mkdir()
    real = [shared.bus.address.removeprefix("unix:path=").partition(",")[0], str(other.socket)]
    real.append(str(shared.folder / "gate.sock"))
    again = [str(visible / "again" / Path(path).relative_to(top)) for path in real]
    prefix = in_private_mounts(f"mount --rbind {top} {visible}/again")
    script = "import socket, sys; [socket.socket(socket.AF_UNIX).connect(x) for x in sys.argv[1:]]"
    assert run(*prefix, PYTHON, "-c", script, *again).ok
    options = ["--share", str(visible)]
    report = cli_under(shared, prefix, "exec", *options, "--", *probe(reach=[*real, *again]))
    assert report["reached"] == [INSIDE]


def test_what_is_mounted_inside_a_folder_is_there_but_its_sockets(shared: Warden) -> None:
    """A file, a socket in a file's place, an overlay, a kernel's file system, a name with a newline."""
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/opt", prefix="bw-")))
        away = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        for name in ("lower", "lower2"):
            (away / name).mkdir()
        (away / "text").write_text("text\n")
        (away / "lower/inner").write_text("inner\n")
        (top / "file").touch()
        (top / "socket").touch()
        for name in ("over", "proc", "a\nb c"):
            (top / name).mkdir()
        listen(stack, str(away / "s"))
        prefix = in_private_mounts(
            f"mount --bind {away}/text {top}/file",
            f"mount --bind {away}/s {top}/socket",
            f"mount -t overlay none -o lowerdir={away}/lower:{away}/lower2 {top}/over",
            f"mount -t proc none {top}/proc",
            f"mount --bind {away} '{top}/a\nb c'",
        )
        argv = [*prefix, PYTHON, "-m", "broker.cli", "exec", "--"]
        env = {"XDG_RUNTIME_DIR": str(shared.runtime)}
        script = f"cat {top}/file {top}/over/inner '{top}/a\nb c/text'; ls {top}/proc; wc -c < {top}/socket"
        outcome = run(*argv, "sh", "-c", script, env=env)
        paths = [str(top / "socket"), str(top / "a\nb c/s")]
        report = report_of(run(*argv, *probe(reach=paths), env=env))
    assert outcome.out == "text\ninner\ntext\n0\n", outcome.err
    assert report["reached"] == [INSIDE]


@pytest.mark.parametrize("where", ["", "/buswarden", "/buswarden/containers"])
def test_program_p1_a_folder_of_the_runtime_directory_is_shared(shared: Warden, where: str) -> None:
    """The folder is shown, and no socket of a bus, gate or other sandbox answers."""
    shared.add_server()
    folder = Path(f"{shared.runtime}{where}")
    with ExitStack() as stack:
        (shared.runtime / "at-spi").mkdir(exist_ok=True)
        stack.callback(shutil.rmtree, shared.runtime / "at-spi")
        listen(stack, str(shared.runtime / "at-spi/bus"))
        report = report_of(shared.cli("exec", "--share", str(folder), "--", *probe()))
    assert report["reached"] == [INSIDE]


def test_program_p1_a_socket_is_no_folder_to_share(shared: Warden) -> None:
    for option in ("--share", "--bind"):
        outcome = shared.cli("exec", option, str(shared.folder / "gate.sock"), "--", "true")
        assert outcome.code == 2
        assert "is a socket" in outcome.err


@pytest.mark.parametrize("where", ["", "/buswarden", "/buswarden/containers", "/.."])
def test_program_p1_no_folder_with_a_bus_is_given_as_it_is(shared: Warden, where: str) -> None:
    outcome = shared.cli("exec", "--bind", f"{shared.runtime}{where}", "--", "true")
    assert outcome.code == 2
    assert "leads to the sockets of" in outcome.err
    assert not shared.list_sandboxes()


def test_program_p1_nor_by_another_mount(shared: Warden, visible: Path) -> None:
    (visible / "again").mkdir()
    prefix = in_private_mounts(f"mount --bind {shared.runtime} {visible}/again")
    argv = [*prefix, PYTHON, "-m", "broker.cli", "exec", "--bind", str(visible / "again")]
    outcome = run(*argv, "--", "true", env={"XDG_RUNTIME_DIR": str(shared.runtime)})
    assert outcome.code == 2
    assert "leads to the sockets of" in outcome.err
    above = run(
        *argv[:-1], str(visible), "--", "true", env={"XDG_RUNTIME_DIR": str(shared.runtime)}
    )
    assert above.code == 2
    assert "is mounted inside" in above.err


def test_program_p1_nor_by_another_name(shared: Warden) -> None:
    """The gate's socket has a hard link in a folder that is to be given as it is."""
    with tempfile.TemporaryDirectory(dir=shared.runtime.parent.parent, prefix="bw-") as name:
        (Path(name) / "s").hardlink_to(shared.folder / "gate.sock")
        outcome = shared.cli("exec", "--bind", name, "--", "true")
    assert outcome.code == 2
    assert "has another name" in outcome.err


def test_what_is_given_as_it_is_has_its_sockets_and_is_writable(
    shared: Warden, visible: Path
) -> None:
    with ExitStack() as stack:
        (path,) = by_path(visible, stack)
        report = report_of(shared.cli("exec", "--bind", str(visible), "--", *probe()))
    assert report["reached"] == sorted([INSIDE, path])
    assert shared.cli("exec", "--bind", str(visible), "--", "touch", f"{visible}/new").ok
    assert (visible / "new").exists()


def abstract(name: str, stack: ExitStack) -> str:
    name = f"{name}-{os.getpid()}"
    listen(stack, f"\0{name}")
    return f"@{name}"


@pytest.mark.parametrize("net", [[], ["--net"]], ids=["default", "net"])
def test_program_p4_an_abstract_socket_takes_nothing_away(shared: Warden, net: list[str]) -> None:
    """IBus listens on one with dbus in its name: the command does not reach it, and keeps its network."""
    with ExitStack() as stack:
        name = abstract("/root/.cache/ibus/dbus", stack)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        outcome = shared.cli("exec", *net, "--", *probe(reach=[name]))
        port = server.getsockname()[1]
        script = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
        network = shared.cli("exec", *net, "--", "/usr/bin/python3", "-c", script)
    assert network.ok is bool(net)
    report = report_of(outcome)
    if net and "can reach the host's abstract sockets" in outcome.err:
        pytest.skip("this kernel cannot keep abstract sockets out of reach")
    assert report["reached"] == [INSIDE]


def test_attack_x4_an_abstract_socket_of_anybody_takes_no_network(shared: Warden) -> None:
    with ExitStack() as stack:
        abstract("dbus-x", stack)
        outcome = shared.cli("exec", "--net", "--", "cat", "/proc/net/route")
        assert outcome.ok
        assert outcome.out == Path("/proc/net/route").read_text()
        assert "network" not in outcome.err


def test_attack_x4_three_thousand_sockets_of_somebody_else(shared: Warden) -> None:
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp"))
        other = stack.enter_context(tempfile.TemporaryDirectory(dir="/opt"))
        for number in range(1500):
            for folder in (name, other):
                # Enough listens if the last one does not: what counts are the names in /proc/net/unix.
                listen(stack, f"{folder}/{number}")
        outcome = shared.cli("exec", "--", "sh", "-c", "exit 41")
    assert (outcome.code, outcome.err.count("trying again")) == (41, 0), outcome.err


def test_inherited_descriptors_and_processes_are_not_there(shared: Warden) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(shared.folder / "gate.sock"))
        argv = [PYTHON, "-m", "broker.cli", "exec", "--", *probe()]
        os.set_inheritable(sock.fileno(), True)
        done = subprocess.run(
            argv,
            env=os.environ | {"XDG_RUNTIME_DIR": str(shared.runtime)},
            pass_fds=[sock.fileno()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )
    assert b'"fds": [0, 1, 2]' in done.stdout
    assert b'"pids": [1, 2]' in done.stdout
