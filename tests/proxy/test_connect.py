"""Connecting by TCP in the loop: one place after the other, with the nonce, and without waiting."""

import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.gate.io.loop import Loop
from broker.proxy.connect import Place, TcpPlace, dial, read_nonce
from broker.wire.address import UnixAddress

NONCE = bytes(range(16))
NOWHERE = UnixAddress(b"/nonexistent/bus")


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    before = set(Path("/proc/self/fd").iterdir())
    yield made
    assert set(Path("/proc/self/fd").iterdir()) == before
    made.close()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(5)
        yield sock


def at(server: socket.socket, noncefile: bytes | None = None) -> TcpPlace:
    return TcpPlace(socket.AF_INET, server.getsockname(), noncefile)


def closed_place() -> TcpPlace:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return at(sock)


def run(loop: Loop, places: list[Place], seconds: float = 5) -> socket.socket | None:
    """Dial, and return what came of it."""
    got: list[socket.socket | None] = []

    def done(sock: socket.socket | None) -> None:
        got.append(sock)
        loop.stop()

    dial(loop, places, os.getuid(), seconds, done)
    if not got:
        loop.run()
    (sock,) = got
    return sock


def test_a_server_is_connected_to(loop: Loop, server: socket.socket) -> None:
    sock = run(loop, [at(server)])
    assert sock is not None
    with sock, server.accept()[0] as accepted:
        assert not sock.getblocking()
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        loop.add(sock.fileno(), 0, lambda _events: None)  # it is nobody's any more
        loop.remove(sock.fileno())
        sock.sendall(b"hello")
        assert accepted.recv(99) == b"hello"


def test_the_first_that_answers_is_taken(loop: Loop, server: socket.socket, tmp_path: Path) -> None:
    sock = run(loop, [NOWHERE, closed_place(), at(server), closed_place()])
    assert sock is not None
    assert sock.getpeername() == server.getsockname()
    sock.close()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        sock = run(loop := Loop(), [closed_place(), UnixAddress(bytes(tmp_path / "s")), at(server)])
        loop.close()
        assert sock is not None
        assert sock.family == socket.AF_UNIX
        sock.close()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_nobody_answers(loop: Loop, count: int) -> None:
    assert run(loop, [closed_place() for _ in range(count)]) is None


def test_many_places_are_no_deep_stack(loop: Loop) -> None:
    assert run(loop, list(itertools.repeat(NOWHERE, 5000))) is None


def test_who_does_not_answer_leaves_the_others_time(loop: Loop, server: socket.socket) -> None:
    # With no room for more connections the kernel leaves the next one without an answer.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf:
        with socket.create_connection(deaf.getsockname()):
            sock = run(loop, [at(deaf), at(server)], seconds=0.2)
            assert sock is not None
            assert sock.getpeername() == server.getsockname()
            sock.close()


def test_the_nonce_is_said_first_and_read_each_time(
    loop: Loop, server: socket.socket, tmp_path: Path
) -> None:
    path = tmp_path / "nonce"
    for nonce in (NONCE, NONCE[::-1]):
        path.write_bytes(nonce)
        sock = run(Loop(), [at(server, bytes(path))])
        assert sock is not None
        with sock, server.accept()[0] as accepted:
            accepted.settimeout(5)
            assert accepted.recv(99) == nonce


def test_without_its_nonce_a_place_is_passed_over(
    loop: Loop, server: socket.socket, tmp_path: Path
) -> None:
    (tmp_path / "short").write_bytes(NONCE[1:])
    (tmp_path / "long").write_bytes(NONCE + b"x")
    for name in ("none", "short", "long"):
        with pytest.raises(OSError, match=r"16 bytes|No such"):
            read_nonce(bytes(tmp_path / name))
    places: list[Place] = [at(server, bytes(tmp_path / n)) for n in ("none", "short", "long")]
    assert run(loop, places) is None
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()


def test_nobody_talks_to_themselves(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel may give the very port that nobody listens at, which then is connected to itself.
    real = socket.socket

    class Bound(socket.socket):
        def connect(self, address: object) -> None:
            self.bind(address)  # type: ignore[arg-type]
            super().connect(address)  # type: ignore[arg-type]

    place = closed_place()
    monkeypatch.setattr("broker.proxy.connect.socket.socket", Bound)
    try:
        assert run(loop, [place]) is None
    finally:
        monkeypatch.setattr("broker.proxy.connect.socket.socket", real)
