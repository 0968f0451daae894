"""Clients that break the protocol, take too much, or do not read: their connection ends, and nobody else's."""

import array
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from broker.wire.header import MessageType, serialise_header
from integration.harness.buses import KINDS, open_bus
from integration.harness.messages import make_header, make_message
from integration.harness.rawclient import BUS, BUS_PATH, RawClient, connect_socket
from integration.harness.scripts import (
    auth,
    echo,
    echo_message,
    handshake,
    hello_message,
    open_fds,
    patched,
    read_until,
    twice_destination,
    with_path,
    with_text,
)
from integration.harness.service import ECHO, PATH, running_service
from integration.harness.supervised import Sandbox, Warden, open_warden, wait_for

ERROR = "org.freedesktop.DBus.Error."
MIB = 1024 * 1024
LIMITS = f"""[limits]
bytes_held = {MIB}
bytes_queued = {MIB}
pending_calls = 8
match_rules = 4
names = 3
"""


@pytest.fixture(scope="module", params=KINDS)
def small(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Warden]:
    """A supervisor with small limits, and the service on its bus."""
    folder = tmp_path_factory.mktemp("h", numbered=True)
    config = folder / "config.toml"
    config.write_text(LIMITS)
    with (
        open_bus(request.param, folder) as bus,
        running_service(bus.address),
        open_warden(bus, folder / "run", "--config", str(config)) as warden,
    ):
        yield warden


@pytest.fixture
def victim(small: Warden) -> Iterator[Sandbox]:
    """The sandbox that misbehaves; others must go on, and the gate must have lost no descriptor."""
    before = open_fds(small)
    sandbox = small.add_server(rules=[f"send:{ECHO}", "own:org.example.V*"])
    other = small.connect(small.add_server(rules=[f"send:{ECHO}"]))
    sibling = small.connect(sandbox)
    host = small.connect_host()
    yield sandbox
    for client in (other, sibling, host):
        echo(client)
    assert small.who(sibling.unique_name) == sandbox.path
    small.tidy()
    wait_for(lambda: open_fds(small) == before)


# -- bytes that break the protocol ------------------------------------------------------------------------


BROKEN: dict[str, Callable[[], bytes]] = {
    "noise": lambda: b"X" * 64,
    "auth again": lambda: auth()[1:] * 4,
    "endian byte": lambda: patched(0, ord("L")),
    "type 0": lambda: patched(1, 0),
    "version 2": lambda: patched(3, 2),
    "serial 0": lambda: patched(8, 0),
    "longer than any": lambda: patched(7, 0xFF),
    "fields longer than any": lambda: patched(15, 0x7F),
    "bad path": lambda: with_path("/a//b"),
    "path ends in slash": lambda: with_path("/a/"),
    "Local path": lambda: with_path("/org/freedesktop/DBus/Local"),
    "Local interface": lambda: with_text(interface="org.freedesktop.DBus.Local"),
    "bad interface": lambda: with_text(interface="nodots"),
    "bad member": lambda: with_text(member="a.b"),
    "bad destination": lambda: with_text(destination="nodots"),
    "two destinations": twice_destination,
    "reply to 0": lambda: make_message(
        make_header(MessageType.METHOD_RETURN, 7, reply_serial=0, destination=ECHO)
    ),
    "no member": lambda: make_message(
        make_header(MessageType.SIGNAL, 7, path="/a", interface="a.b")
    ),
    "big-endian noise": lambda: b"B" + bytes(15) + b"\xff" * 16,
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_bytes_end_that_connection_only(small: Warden, victim: Sandbox, how: str) -> None:
    client = small.connect(victim)
    echo(client)
    client.send_raw(BROKEN[how]())
    assert client.is_closed(3)
    assert "Traceback" not in small.log


@pytest.mark.parametrize(
    "data",
    [
        b"AUTH EXTERNAL 30\r\n",  # no NUL
        b"\0BEGIN\r\n",
        b"\0" + b"A" * 20_000,
        b"\0" + b"AUTH NONSENSE\r\n" * 8,
        auth() + b"BEGIN\r\n" + b"X" * 64,
        auth() + b"BEGIN\r\n" + echo_message(1),  # no Hello
        b"\0AUTH EXTERNAL 2d31\r\nBEGIN\r\n",
    ],
)
def test_broken_handshake_ends_that_connection_only(
    small: Warden, victim: Sandbox, data: bytes
) -> None:
    with handshake(victim, data) as sock:
        with contextlib.suppress(ConnectionError):
            while sock.recv(4096):
                pass
    assert len(small.show(victim)["connections"]) == 1  # the sibling's


def test_second_hello_fails_and_changes_nothing(small: Warden, victim: Sandbox) -> None:
    client = small.connect(victim)
    client.send_raw(hello_message(50))
    assert client.wait_reply(50).error == f"{ERROR}Failed"
    echo(client)
    assert small.who(client.unique_name) == victim.path


def test_forged_sender_and_fields_are_taken_away(small: Warden, victim: Sandbox) -> None:
    client = small.connect(victim)
    header = make_header(
        MessageType.METHOD_CALL, 60, path=PATH, interface=ECHO, member="Sender", destination=ECHO
    )
    data = serialise_header(
        replace(header, sender=":1.1"), sender=True, extra={10: ("o", "/evil"), 77: ("s", "x")}
    )
    client.send_raw(data)
    assert client.wait_reply(60).values == (client.unique_name,)


def test_unknown_message_type_is_ignored(small: Warden, victim: Sandbox) -> None:
    client = small.connect(victim)
    client.send_raw(patched(1, 9))
    echo(client)


# -- descriptors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("declared", "sent"), [(1, 0), (0, 1), (2, 1), (1, 2), (0xFFFFFFFF, 1)])
def test_wrong_count_of_descriptors_ends_the_connection(
    small: Warden, victim: Sandbox, declared: int, sent: int
) -> None:
    client = small.connect(victim)
    header = make_header(
        MessageType.METHOD_CALL,
        7,
        path=PATH,
        interface=ECHO,
        member="Ping",
        destination=ECHO,
        unix_fds=declared,
    )
    read_end, write_end = os.pipe()
    client.send_raw(make_message(header), [write_end] * sent)
    os.close(write_end)
    assert client.is_closed(3)
    assert os.read(read_end, 1) == b""  # nobody has a copy
    os.close(read_end)


@pytest.mark.parametrize("when", ["handshake", "not negotiated"])
def test_descriptors_where_none_may_be_end_the_connection(
    small: Warden, victim: Sandbox, when: str
) -> None:
    read_end, write_end = os.pipe()
    with connect_socket(victim.address) as sock:
        sock.settimeout(5)
        if when == "handshake":
            sock.sendmsg([auth()], [_rights(write_end)])
        else:
            sock.sendall(auth() + b"BEGIN\r\n" + hello_message())
            read_until(sock, b"NameAcquired")
            header = make_header(
                MessageType.METHOD_CALL,
                7,
                path=PATH,
                interface=ECHO,
                member="Ping",
                destination=ECHO,
                unix_fds=1,
            )
            sock.sendmsg([make_message(header)], [_rights(write_end)])
        os.close(write_end)
        assert os.read(read_end, 1) == b""
    os.close(read_end)


def _rights(fd: int) -> tuple[int, int, bytes]:
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]).tobytes()


# -- budgets -----------------------------------------------------------------------------------------------


def test_message_over_the_budget_is_refused_and_the_connection_lives(
    small: Warden, victim: Sandbox
) -> None:
    client = small.connect(victim)
    client.send_raw(echo_message(90, "x" * (2 * MIB)))
    reply = client.wait_reply(90)
    assert reply.error == f"{ERROR}LimitsExceeded"
    assert f"bytes_held={MIB}" in reply.values[0]
    echo(client)
    echo(client, "x" * (MIB // 2))


def test_budget_is_shared_by_the_connections_of_a_sandbox(small: Warden, victim: Sandbox) -> None:
    first, second = small.connect(victim), small.connect(victim)
    data = echo_message(90, "x" * (MIB - 1000))
    first.send_raw(data[: MIB - 10_000])
    other = small.connect(small.add_server(rules=[f"send:{ECHO}"]))
    deadline = time.monotonic() + 5
    errors: set[str | None] = set()
    while not errors and time.monotonic() < deadline:
        second.send_raw(echo_message(91, "x" * 200_000))
        errors = {second.wait_reply(91).error} - {None}  # None: the first has not been read yet
    assert errors == {f"{ERROR}LimitsExceeded"}
    echo(second, "short")
    echo(other, "x" * 800_000)  # each sandbox has its own
    first.send_raw(data[MIB - 10_000 :])
    assert first.wait_reply(90).error is None
    echo(second, "x" * 200_000)


def test_budget_is_given_back_by_who_leaves(small: Warden, victim: Sandbox) -> None:
    for _ in range(3):
        client = small.connect(victim)
        client.send_raw(echo_message(90, "x" * (MIB - 1000))[:-500])
        client.close()
    wait_for(lambda: len(small.show(victim)["connections"]) == 1)
    echo(small.connect(victim), "x" * (MIB - 1000))


def test_who_does_not_read_is_cut_off_and_others_go_on(small: Warden, victim: Sandbox) -> None:
    deaf, host = small.connect(victim), small.connect_host()
    sibling = small.connect(victim)
    sent = 0
    deadline = time.monotonic() + 10
    while deaf.unique_name in host.list_names() and time.monotonic() < deadline:
        for _ in range(16):
            host.emit("/a", "a.b", "S", "s", ("x" * 65536,), destination=deaf.unique_name)
            sent += 65536
        echo(sibling)
    assert sent < 32 * MIB
    assert deaf.is_closed(5)
    assert "does not read" in small.log


def test_who_pipelines_calls_and_does_not_read_the_answers_is_cut_off(
    small: Warden, victim: Sandbox
) -> None:
    deaf = small.connect(victim)
    sibling = small.connect(victim)
    message = echo_message(90, "x" * 100_000)
    with pytest.raises((ConnectionError, TimeoutError)):
        for serial in range(100, 1000):
            deaf.send_raw(message[:8] + serial.to_bytes(4, "little") + message[12:])
            if serial % 50 == 0:
                echo(sibling)
    assert deaf.is_closed(5)


def test_pending_calls_have_a_limit(small: Warden, victim: Sandbox) -> None:
    client = small.connect(victim)
    serials = [client.start_call(ECHO, PATH, ECHO, "Slow", "u", (20,)) for _ in range(9)]
    replies = [client.wait_reply(serial) for serial in serials]
    assert [reply.error for reply in replies] == [None] * 8 + [f"{ERROR}LimitsExceeded"]
    assert "pending_calls=8" in replies[-1].values[0]
    echo(client)


def test_match_rules_have_a_limit(small: Warden, victim: Sandbox) -> None:
    client = small.connect(victim)
    rules = [f"type='signal',interface='a.b{n}'" for n in range(5)]
    for rule in rules[:4]:
        client.add_match(rule)
    reply = client.call(BUS, BUS_PATH, BUS, "AddMatch", "s", (rules[4],))
    assert reply.error == f"{ERROR}LimitsExceeded"
    client.remove_match(rules[0])
    client.add_match(rules[4])


def test_names_have_a_limit(small: Warden, victim: Sandbox) -> None:
    client = small.connect(victim)
    for index in range(3):
        assert client.request_name(f"org.example.V{index}") == 1
    values = ("org.example.V3", 4)
    reply = client.call(BUS, BUS_PATH, BUS, "RequestName", "su", values)
    assert reply.error == f"{ERROR}LimitsExceeded"
    client.release_name("org.example.V0")
    assert client.request_name("org.example.V3") == 1


def test_flood_of_refused_calls_is_counted_not_kept(small: Warden, victim: Sandbox) -> None:
    client = small.connect(victim)
    header = make_header(
        MessageType.METHOD_CALL,
        7,
        flags=1,
        path="/a",
        interface="a.b",
        member="C",
        destination="a.b",
    )
    client.send_raw(make_message(header) * 2000)
    echo(client)
    wait_for(lambda: small.show(victim)["denied"] >= 50)
    assert len(small.show(victim)["denials"]) <= 50


def test_connections_that_come_and_go_leave_nothing(small: Warden, victim: Sandbox) -> None:
    whole = auth() + b"NEGOTIATE_UNIX_FD\r\nBEGIN\r\n" + hello_message()
    for index in range(60):
        # Some come before those that left are gone, and so are one too many.
        with connect_socket(victim.address) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(whole[: index * 4])
    wait_for(lambda: len(small.show(victim)["connections"]) == 1)
    wait_for(lambda: _can_connect(small, victim))


def _can_connect(small: Warden, sandbox: Sandbox) -> bool:
    try:
        return bool(small.connect(sandbox).unique_name)
    except (EOFError, ConnectionError):
        return False


def test_half_closed_connection_ends(small: Warden, victim: Sandbox) -> None:
    client = small.connect(victim)
    client.sock.shutdown(socket.SHUT_WR)
    assert client.is_closed(5)


def test_gate_spends_nothing_while_nobody_asks(small: Warden, victim: Sandbox) -> None:
    # A descriptor left in the loop that is ready for ever would show here.
    def ticks() -> int:
        fields = Path(f"/proc/{small.gate_pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    quiet: RawClient = small.connect(victim)
    before = ticks()
    time.sleep(0.5)
    assert ticks() - before <= 5  # of 50
    echo(quiet)
