"""Attacks by folders that another user made, and by descriptors whose end never comes."""

import os
import select
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from integration.harness.clients import Outcome, run
from integration.harness.other_user import NOBODY, as_user
from integration.harness.processes import PROJECT, PYTHON
from integration.harness.rawclient import CallError
from integration.harness.supervised import Warden, wait_for

CLI = [PYTHON, "-m", "broker.cli"]
PRECIOUS = "of the victim"
# What is told of the other user's folder, or of a file in it.
REASONS = ("another user", "others may write", "not a folder of this user", "symbolic link")


@pytest.fixture
def evil(folder: Path) -> Path:
    """A folder that another user made, inside a sticky one of ours."""
    if os.geteuid():
        pytest.skip("the machine's tests do not run as root: nobody else can be")
    folder.chmod(0o1777)
    path = folder / "evil"
    as_user(NOBODY, lambda: _make_folder(path))
    return path


@pytest.fixture
def victim(folder: Path) -> Path:
    path = folder / "victim"
    path.write_text(PRECIOUS)
    path.chmod(0o600)
    return path


def _make_folder(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def plant_link(path: Path, victim: Path) -> None:
    as_user(NOBODY, lambda: path.symlink_to(victim))


def plant_fifo(path: Path) -> None:
    as_user(NOBODY, lambda: os.mkfifo(path, 0o666))


def refused(outcome: Outcome) -> None:
    assert outcome.code, outcome
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("buswarden"), outcome.err
    assert any(reason in outcome.err for reason in REASONS), outcome.err


def run_in(runtime_dir: Path, folder: Path, *arguments: str) -> Outcome:
    """Start a broker with that runtime folder; one that was not refused would not end."""
    config = folder / "config.toml"
    config.write_text(f'runtime_dir = "{runtime_dir}"\n')
    return run(*CLI, "run", "--config", str(config), *arguments, timeout=10)


@pytest.mark.parametrize("name", ["private-bus.lock", "lock", "bus-address.new", "state.db"])
@pytest.mark.parametrize("kind", ["private", "given"])
def test_attack_f1_a_link_in_anothers_folder_is_not_followed(
    evil: Path, victim: Path, folder: Path, name: str, kind: str
) -> None:
    plant_link(evil / name, victim)
    given = () if kind == "private" else ("--bus", f"session=unix:path={folder}/no-bus")
    refused(run_in(evil, folder, *given))
    assert victim.read_text() == PRECIOUS


def test_attack_f1_a_fifo_in_anothers_folder_is_not_waited_for(evil: Path, folder: Path) -> None:
    plant_fifo(evil / "private-bus.lock")
    refused(run_in(evil, folder))


def test_attack_f1_a_folder_below_anothers_is_no_better(evil: Path, folder: Path) -> None:
    (evil / "ours").mkdir(mode=0o700)
    refused(run_in(evil / "ours", folder))
    refused(run_in(evil / "new", folder))
    assert not (evil / "new").exists()


def test_attack_f1_a_way_through_anothers_link_is_not_gone(evil: Path, folder: Path) -> None:
    (folder / "ours").mkdir(mode=0o700)
    plant_link(folder / "link", folder / "ours")
    refused(run_in(folder / "link", folder))
    refused(run_in(folder / "link" / "run", folder))
    assert not list((folder / "ours").iterdir())


@pytest.mark.parametrize("name", ["private-bus.lock", "state.db", "gate.pid"])
def test_attack_f1_what_another_user_left_in_our_folder_is_not_used(
    evil: Path, victim: Path, folder: Path, name: str
) -> None:
    ours = folder / "ours"
    ours.mkdir()
    ours.chmod(0o777)  # it was open once
    plant_link(ours / name, victim)
    refused(run_in(ours, folder))  # and still is
    ours.chmod(0o700)
    refused(run_in(ours, folder))
    assert victim.read_text() == PRECIOUS


def test_attack_f1_the_gate_by_itself(evil: Path, victim: Path, folder: Path) -> None:
    plant_link(evil / "gate.sock", folder / "elsewhere")
    argv = [PYTHON, "-m", "broker.gate", "--control", str(evil / "gate.sock")]
    refused(run(*argv, timeout=10))
    assert not (folder / "elsewhere").exists()


def test_attack_f1_the_trace_of_the_gate(evil: Path, victim: Path) -> None:
    # The file is made under a name that has the gate's pid in it, which can be known before.
    code = "import pathlib, sys; from broker.gate.recorder import trace_into; sys.stdin.read(); "
    code += f"trace_into(pathlib.Path({str(evil / 'trace')!r}))"
    with subprocess.Popen(
        [PYTHON, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=PROJECT
    ) as process:
        plant_link(evil / f"trace.{process.pid}", victim)
        process.communicate(timeout=10)
    assert process.returncode
    assert victim.read_text() == PRECIOUS


def test_attack_f1_units_are_not_written_through_a_link(
    evil: Path, victim: Path, folder: Path
) -> None:
    plant_link(evil / ".buswarden.service.new", victim)
    plant_link(evil / "buswarden.service.new", victim)
    refused(run(*CLI, "install-units", "--dir", str(evil)))
    # In a folder where everybody may make files, others' are in the way, and no more.
    plant_link(folder / ".buswarden.service.new", victim)
    plant_link(folder / "buswarden.service.new", victim)
    run(*CLI, "install-units", "--dir", str(folder))
    assert victim.read_text() == PRECIOUS


def test_attack_f1_units_do_not_wait_for_a_fifo(evil: Path, folder: Path) -> None:
    plant_fifo(folder / "buswarden.service")
    outcome = run(*CLI, "install-units", "--dir", str(folder), timeout=10)
    assert outcome.code
    assert outcome.err.count("\n") == 1


def test_attack_f1_a_proxy_does_not_listen_in_anothers_folder(evil: Path, folder: Path) -> None:
    outcome = run(*CLI, "proxy", f"unix:path={folder}/bus", str(evil / "socket"), timeout=10)
    refused(outcome)
    assert not list(evil.iterdir())


def test_attack_f1_the_address_of_a_broker_is_not_waited_for(folder: Path) -> None:
    (folder / "buswarden").mkdir()
    os.mkfifo(folder / "buswarden" / "bus-address")
    outcome = run(*CLI, "list", env={"XDG_RUNTIME_DIR": str(folder)}, timeout=10)
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1


# -- descriptors ---------------------------------------------------------------------------------------


def _sockets(stack: ExitStack, folder: Path) -> dict[str, int]:
    """Return sockets that have no one other end, by kind."""
    udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    udp.connect(("127.0.0.1", 9))
    netlink = stack.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
    listening = stack.enter_context(socket.socket(socket.AF_UNIX))
    listening.bind(str(folder / "listening"))
    listening.listen()
    tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    unconnected = stack.enter_context(socket.socket(socket.AF_UNIX))
    datagrams = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in datagrams:
        stack.enter_context(end)
    return {
        "udp": udp.fileno(),
        "netlink": netlink.fileno(),
        "listening": listening.fileno(),
        "tcp-listening": tcp.fileno(),
        "unconnected": unconnected.fileno(),
        "datagrams": datagrams[0].fileno(),
        "path-of-socket": _kept(stack, os.open(folder / "listening", os.O_PATH)),
    }


def _others(stack: ExitStack, folder: Path) -> dict[str, int]:
    """Return what is no socket and has no other end, by kind."""
    os.mkfifo(folder / "fifo")
    (folder / "file").touch()
    epoll = select.epoll()
    stack.callback(epoll.close)
    read_end, write_end = os.pipe()
    return {
        "file": _kept(stack, os.open(folder / "file", os.O_RDWR)),
        "folder": _kept(stack, os.open(folder, os.O_RDONLY)),
        "device": _kept(stack, os.open("/dev/null", os.O_RDWR)),
        "epoll": epoll.fileno(),
        "eventfd": _kept(stack, os.eventfd(0)),
        "pidfd": _kept(stack, os.pidfd_open(os.getpid())),
        "memfd": _kept(stack, os.memfd_create("x")),
        "path-of-fifo": _kept(stack, os.open(folder / "fifo", os.O_PATH)),
        "read-end": _kept(stack, read_end),
        "write-end": _kept(stack, write_end),
        "fifo-both-ways": _kept(stack, os.open(folder / "fifo", os.O_RDWR)),
    }


def _kept(stack: ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


@pytest.fixture
def endless(folder: Path) -> Iterator[dict[str, int]]:
    with ExitStack() as stack:
        yield _sockets(stack, folder) | _others(stack, folder)


FITTING = {
    "CloseNotify": {"read-end"},
    "ReadyNotify": {"write-end", "fifo-both-ways"},
    "Socket": {"listening"},
    "ProcessFd": {"pidfd"},
}


@pytest.mark.parametrize("name", FITTING)
def test_attack_f2_what_cannot_end_is_refused(
    shared: Warden, endless: dict[str, int], name: str
) -> None:
    before = shared.list_sandboxes()
    for kind, fd in endless.items():
        if kind in FITTING[name]:
            continue
        with pytest.raises(CallError) as caught:
            shared.add_server(fds={name: fd})
        assert caught.value.name == "org.freedesktop.DBus.Error.InvalidArgs", (kind, caught.value)
        assert caught.value.text.startswith(name), (kind, caught.value)
        assert "\n" not in caught.value.text
    assert shared.list_sandboxes() == before


def test_attack_f2_the_refusal_says_what_is_taken(shared: Warden, endless: dict[str, int]) -> None:
    for name, end in (("CloseNotify", "read end"), ("ReadyNotify", "write end")):
        with pytest.raises(CallError, match=f"{name} .*{end} of a pipe, or a connected unix"):
            shared.add_server(fds={name: endless["udp"]})


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_attack_f2_a_connected_socket_is_taken_and_ends_the_sandbox(
    shared: Warden, kind: socket.SocketKind
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with theirs:
        sandbox = shared.add_server(fds={"CloseNotify": theirs.fileno()})
    ours.close()
    wait_for(lambda: sandbox.id not in [one["id"] for one in shared.list_sandboxes()])
