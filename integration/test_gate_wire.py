"""The gate on the wire, for clients that keep to the protocol: descriptors, sizes, byte orders, handshakes, serials."""

import os
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from broker.wire.header import MessageType, serialise_header
from broker.wire.reader import MAX_ARRAY
from integration.harness.buses import Bus
from integration.harness.messages import make_header, make_message
from integration.harness.rawclient import BUS, BUS_PATH, connect_socket
from integration.harness.relay import running_relay
from integration.harness.scripts import (
    auth,
    echo,
    echo_message,
    handshake,
    hello_message,
    open_fds,
    read_until,
)
from integration.harness.service import ECHO, PATH, running_service
from integration.harness.supervised import NAME, Sandbox, Warden, open_warden, wait_for

ERROR = "org.freedesktop.DBus.Error."
ALL = f"send:{ECHO}"


@pytest.fixture(scope="module")
def service(module_warden: Warden) -> Iterator[None]:
    with running_service(module_warden.bus.address):
        yield


@pytest.fixture
def sandbox(shared: Warden, service: None) -> Iterator[Sandbox]:
    """A sandbox that may call the service; the gate must have as many descriptors afterwards as before."""
    before = open_fds(shared)
    yield shared.add_server(rules=[ALL])
    shared.tidy()
    wait_for(lambda: open_fds(shared) == before)


# -- descriptors -------------------------------------------------------------------------------------------


def test_descriptor_goes_there_and_one_comes_back(shared: Warden, sandbox: Sandbox) -> None:
    client = shared.connect(sandbox)
    for size in (10, 100_000):
        read_end, write_end = os.pipe()
        serial = client.start_call(ECHO, PATH, ECHO, "Sum", "h", (0,), fds=[read_end])
        os.close(read_end)
        for _ in range(size // 10):
            os.write(write_end, bytes([1] * 10))  # more than the pipe holds: it is read there
        os.close(write_end)
        reply = client.wait_reply(serial)
        with open(reply.fds[0], "rb") as result:  # noqa: PTH123 (a descriptor)
            assert result.read() == str(size).encode()


def test_sixteen_descriptors_keep_their_order(shared: Warden, sandbox: Sandbox) -> None:
    host = shared.connect_host()
    shared.change_access(sandbox, rules=["send:"])
    client = shared.connect(sandbox)
    pipes = [os.pipe() for _ in range(16)]
    ends = [write_end for _, write_end in pipes]
    values = tuple(range(16))
    client.start_call(host.unique_name, "/x", "a.b", "Take", "h" * 16, values, fds=ends)
    echo(client)  # what follows is not disturbed
    call = host.wait_call("Take")
    assert len(call.fds) == 16
    for index, fd in enumerate(call.fds):
        os.write(fd, bytes([index]))
        os.close(fd)
    for index, (read_end, write_end) in enumerate(pipes):
        assert os.read(read_end, 10) == bytes([index])
        os.close(read_end)
        os.close(write_end)


def test_descriptors_of_several_messages_in_one_write_stay_apart(
    shared: Warden, sandbox: Sandbox
) -> None:
    client = shared.connect(sandbox)
    header = make_header(
        MessageType.METHOD_CALL,
        100,
        path=PATH,
        interface=ECHO,
        member="Sum",
        destination=ECHO,
        signature="h",
        unix_fds=1,
    )
    data, fds, results = b"", [], []
    for index in range(4):
        read_end, write_end = os.pipe()
        os.write(write_end, bytes([index + 1]))
        os.close(write_end)
        data += make_message(replace(header, serial=100 + index), (0,))
        fds.append(read_end)
    client.send_raw(data, fds)
    for index, fd in enumerate(fds):
        os.close(fd)
        reply = client.wait_reply(100 + index)
        results.append(os.read(reply.fds[0], 10))
        os.close(reply.fds[0])
    assert results == [b"1", b"2", b"3", b"4"]


def test_too_many_descriptors_are_refused_and_the_connection_lives(
    shared: Warden, sandbox: Sandbox
) -> None:
    client = shared.connect(sandbox)
    with Path(os.devnull).open("rb") as file:
        values = tuple(range(17))
        fds = [file.fileno()] * 17
        reply = client.call(ECHO, PATH, ECHO, "Sum", "h" * 17, values, fds=fds)
    assert reply.error == f"{ERROR}LimitsExceeded"
    echo(client)


def test_refused_call_keeps_no_descriptor(shared: Warden, sandbox: Sandbox) -> None:
    client = shared.connect(sandbox)
    shared.change_access(sandbox, deny=[f"send:{ECHO}:{ECHO}.Sum"])
    read_end, write_end = os.pipe()
    for _ in range(20):
        reply = client.call(ECHO, PATH, ECHO, "Sum", "h", (0,), fds=[write_end])
        assert reply.error == f"{ERROR}AccessDenied"
    os.close(write_end)
    assert os.read(read_end, 1) == b""  # the gate has closed every copy
    os.close(read_end)
    echo(client)


def test_client_that_did_not_negotiate_gets_no_descriptors(
    shared: Warden, sandbox: Sandbox
) -> None:
    with handshake(sandbox, auth() + b"BEGIN\r\n" + hello_message()) as sock:
        data = read_until(sock, b"NameAcquired")
        start = data.index(b":1.")
        name = data[start : data.index(b"\0", start)].decode()
        with Path(os.devnull).open("rb") as file:
            reply = shared.host.call(name, "/x", "a.b", "Take", "h", (0,), fds=[file.fileno()])
        assert reply.error == f"{ERROR}NotSupported"
        sock.sendall(echo_message(2, "still here"))
        assert read_until(sock, b"still here")


# -- sizes -------------------------------------------------------------------------------------------------


def test_twenty_mebibytes_go_there_and_back(shared: Warden, sandbox: Sandbox) -> None:
    client = shared.connect(sandbox)
    text = "0123456789abcdef" * (20 * 1024 * 1024 // 16)
    echo(client, text)
    echo(client)


def test_bug_9_largest_array_fits_with_its_header(shared: Warden, sandbox: Sandbox) -> None:
    client, host = shared.connect(sandbox), shared.connect_host()
    name = "org.example.Largest"
    assert host.request_name(name) == 1
    shared.change_access(sandbox, rules=[f"send:{name}"])
    length = struct.pack("<I", MAX_ARRAY)
    made = make_header(
        MessageType.METHOD_CALL,
        client.next_serial(),
        path="/" + "x" * 1000,
        interface=ECHO,
        member="Take",
        destination=name,
        signature="ay",
    )
    made = replace(made, body_length=len(length) + MAX_ARRAY)
    client.send_raw(serialise_header(made) + length + bytes(MAX_ARRAY))
    got = host.wait_call("Take", 60)
    assert len(got.body) == len(length) + MAX_ARRAY
    host.reply(got)
    assert client.wait_reply(made.serial, 60).error is None


def test_large_message_does_not_hold_up_others(shared: Warden, sandbox: Sandbox) -> None:
    slow, quick = shared.connect(sandbox), shared.connect(sandbox)
    data = echo_message(50, "x" * (8 * 1024 * 1024))
    for start in range(0, len(data), 1024 * 1024):
        slow.send_raw(data[start : start + 1024 * 1024])
        echo(quick)
    assert len(slow.wait_reply(50).values[0]) == 8 * 1024 * 1024


def test_byte_by_byte_is_as_good(shared: Warden, sandbox: Sandbox) -> None:
    data = auth() + b"NEGOTIATE_UNIX_FD\r\nBEGIN\r\n" + hello_message() + echo_message(2, "slow")
    with connect_socket(sandbox.address) as sock:
        sock.settimeout(10)
        for index in range(len(data)):
            sock.sendall(data[index : index + 1])
        assert read_until(sock, b"slow\0")


def test_only_whole_messages_reach_the_bus(bus: Bus, folder: Path) -> None:
    with (
        running_relay(folder / "relay", bus.address) as relay,
        open_warden(
            bus, folder / "run", "--bus", f"session={relay.address}", add_bus=False
        ) as warden,
        running_service(bus.address),
    ):
        client = warden.connect(warden.add_server(rules=[ALL]))
        echo(client)  # its owner is known from here on
        data = echo_message(100, "x" * 3000)
        before = relay.passed
        for start in range(0, len(data) - 1, 700):
            client.send_raw(data[start : min(start + 700, len(data) - 1)])
            time.sleep(0.05)
            assert relay.passed == before
        client.send_raw(data[-1:])
        assert client.wait_reply(100).values == ("x" * 3000,)
        assert relay.passed == before + len(data)


# -- byte order --------------------------------------------------------------------------------------------


def big(serial: int, member: str, destination: str, text: str | None = None) -> bytes:
    """Return a big-endian call, with a string or nothing in it."""
    body = b"" if text is None else struct.pack(">I", len(text)) + text.encode() + b"\0"
    header = make_header(
        MessageType.METHOD_CALL,
        serial,
        path=BUS_PATH if destination == BUS else PATH,
        interface=destination,
        member=member,
        destination=destination,
        signature="" if text is None else "s",
    )
    return serialise_header(replace(header, little=False, body_length=len(body))) + body


def test_big_endian_client_is_served(shared: Warden, sandbox: Sandbox) -> None:
    client, host = shared.connect(sandbox, hello=False), shared.connect_host()
    host.request_name("org.example.Big")
    shared.change_access(sandbox, rules=["send:org.example.Big"])
    client.send_raw(big(1, "Hello", BUS))
    (name,) = client.wait_reply(1).values
    assert shared.who(name) == sandbox.path
    for serial in (2, 3, 4, 0xFFFFFFFE, 0xFFF00000):
        client.send_raw(big(serial, "Take", "org.example.Big", f"text {serial}"))
        call = host.wait_call("Take")
        assert call.body.endswith(f"text {serial}\0".encode())
        assert not call.header.little
        host.reply(call, "s", ("taken",))
        assert client.wait_reply(serial).values == ("taken",)
    client.send_raw(big(9, "NameHasOwner", BUS, ECHO))
    assert client.wait_reply(9).values == (True,)
    client.send_raw(big(10, "NameHasOwner", BUS, NAME))
    assert client.wait_reply(10).values == (False,)
    client.send_raw(big(11, "AddMatch", BUS, "type='signal'"))
    assert client.wait_reply(11).error is None
    client.send_raw(big(12, "Take", "org.example.Hidden", "x"))
    assert client.wait_reply(12).error == f"{ERROR}ServiceUnknown"


# -- handshakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negotiate", [b"", b"NEGOTIATE_UNIX_FD\r\n"])
def test_everything_in_one_write(shared: Warden, sandbox: Sandbox, negotiate: bytes) -> None:
    # As sd-bus and zbus do: handshake, Hello and calls at once.
    messages = hello_message() + echo_message(2, "first") + echo_message(3, "second")
    with handshake(sandbox, auth() + negotiate + b"BEGIN\r\n" + messages) as sock:
        data = read_until(sock, b"second\0")
    assert data.index(b"OK ") < data.index(b"first\0")


def test_bare_auth_first(shared: Warden, sandbox: Sandbox) -> None:
    # As GDBus does.
    with handshake(sandbox, b"\0AUTH\r\n") as sock:
        assert sock.recv(100) == b"REJECTED EXTERNAL\r\n"
        sock.sendall(auth()[1:])
        guid = sandbox.address.partition("guid=")[2]
        assert sock.recv(100) == f"OK {guid}\r\n".encode()
        sock.sendall(b"NEGOTIATE_UNIX_FD\r\n")
        assert sock.recv(100) == b"AGREE_UNIX_FD\r\n"
        sock.sendall(b"BEGIN\r\n" + hello_message())
        assert read_until(sock, b"NameAcquired")


def test_external_without_initial_response(shared: Warden, sandbox: Sandbox) -> None:
    with handshake(sandbox, b"\0AUTH EXTERNAL\r\n") as sock:
        assert sock.recv(100) == b"DATA\r\n"
        sock.sendall(b"DATA\r\nBEGIN\r\n" + hello_message())
        assert read_until(sock, b"NameAcquired")


# -- serials -----------------------------------------------------------------------------------------------


def test_serials_may_come_in_any_order_and_be_topmost(shared: Warden, sandbox: Sandbox) -> None:
    client = shared.connect(sandbox)
    serials = [
        5000,
        4,
        0xFFFFFFFF,
        7,
        0xFFFFFFFE,
        0xFFF00000,
        0xFFF00001,
        0x80000000,
        4,
        0xFFFFFFFF,
    ]
    for serial in serials:
        client.send_raw(echo_message(serial, str(serial)))
        reply = client.wait_reply(serial)
        assert reply.values == (str(serial),)


def test_topmost_serials_pipelined_among_others(shared: Warden, sandbox: Sandbox) -> None:
    client = shared.connect(sandbox)
    serials = [0xFFFFFFFF, 10, 0xFFFFFFFE, 11, 0xFFFFFFFD, 12]
    client.send_raw(b"".join(echo_message(serial, str(serial)) for serial in serials))
    for serial in serials:
        assert client.wait_reply(serial).values == (str(serial),)


def test_one_serial_twice_at_once_is_refused(shared: Warden, sandbox: Sandbox) -> None:
    client = shared.connect(sandbox)
    header = make_header(
        MessageType.METHOD_CALL,
        70,
        path=PATH,
        interface=ECHO,
        member="Slow",
        destination=ECHO,
        signature="u",
    )
    call = make_message(header, (100,))
    client.send_raw(call + call)
    first, second = client.wait_reply(70), client.wait_reply(70)
    assert {first.error, second.error} == {None, f"{ERROR}AccessDenied"}
    client.send_raw(echo_message(70, "again"))
    assert client.wait_reply(70).values == ("again",)


def test_service_with_topmost_serials_is_answered(shared: Warden, sandbox: Sandbox) -> None:
    client = shared.connect(sandbox)
    for serial in (0xFFFFFFFF, 0xFFFFFFFE, 1):
        header = make_header(
            MessageType.METHOD_CALL,
            serial,
            path="/x",
            interface="a.b",
            member="Come",
            destination=client.unique_name,
        )
        shared.host.send_raw(make_message(header))
        client.reply(client.wait_call("Come"), "s", ("came",))
        assert shared.host.wait_reply(serial).values == ("came",)
