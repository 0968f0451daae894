"""Threats B, first part: broken and unusual headers and bodies."""

import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest

from broker.wire.header import MessageType, serialise_header
from integration.harness.buses import Bus
from integration.harness.forge import (
    CALL,
    ERROR,
    GOOD,
    RETURN,
    SIGNAL,
    Field,
    forge,
    text,
    with_field,
    without,
)
from integration.harness.messages import make_header
from integration.harness.rawclient import RawClient
from integration.harness.scripts import echo, echo_message
from integration.harness.service import ECHO, PATH
from integration.harness.threats import (
    ERROR as ERROR_NAME,
    MIB,
    SMALL_LIMITS,
    Scene,
    memory,
    open_limited,
    open_scene,
)

REPLY: list[Field] = [(5, "u", 5), (6, "s", ":1.1")]


def assert_ended(scene: Scene, data: bytes) -> None:
    """Assert that these bytes end a connection that has served well before, at once."""
    client = scene.attack()
    echo(client)
    client.send_raw(data)
    scene.assert_closed(client)


def assert_answered(client: RawClient, data: bytes, serial: int = 77) -> None:
    """Assert that a message is taken for the call that it is."""
    client.send_raw(data)
    assert client.wait_reply(serial).error is None


@pytest.mark.parametrize("endian", [b"L", b"b", b"\0", b"X"])
def test_b1_no_such_byte_order(scene: Scene, endian: bytes) -> None:
    assert_ended(scene, forge(endian=endian))


def test_b2_big_endian_is_served(scene: Scene) -> None:
    header = make_header(
        MessageType.METHOD_CALL, 77, path=PATH, interface=ECHO, member="Ping", destination=ECHO
    )
    assert_answered(scene.attack(), serialise_header(replace(header, little=False)))


@pytest.mark.parametrize(
    "data", [forge(version=2), forge(version=0), forge(kind=0), forge(serial=0)]
)
def test_b3_version_type_serial(scene: Scene, data: bytes) -> None:
    assert_ended(scene, data)


def test_b4_unknown_types_are_dropped(scene: Scene) -> None:
    client = scene.attack()
    for kind in (5, 77, 255):
        client.send_raw(forge(kind=kind))
    echo(client)
    assert not client.queue or client.queue[0].header.type == MessageType.SIGNAL


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (0xFFFFFFFF, None),
        (None, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (128 * MIB, None),
        (None, 64 * MIB + 8),
        (0x80000000, 0x80000000),
    ],
)
def test_b5_longer_than_any_message(scene: Scene, body: int | None, fields: int | None) -> None:
    assert_ended(scene, forge(body_length=body, fields_length=fields))


def test_b6_much_announced_and_nothing_sent_takes_nothing(scene: Scene) -> None:
    before = memory(scene.warden.gate_pid)
    small = [(8, "g", "s"), *GOOD]
    clients = [scene.attack() for _ in range(6)]
    for client in clients[:3]:
        client.send_raw(forge(small, body_length=SMALL_LIMITS["bytes_held"] - 4096))
    for client in clients[3:]:
        client.send_raw(forge(small, body_length=127 * MIB)[:16])
    scene.others_work()
    scene.sibling_works()
    assert scene.use()["bytes_held"] < 4096
    assert memory(scene.warden.gate_pid) - before < MIB
    # A whole header says who is to be told; the rest of it would be thrown away.
    clients[3].send_raw(forge(small, body_length=127 * MIB)[16:])
    assert clients[3].wait_reply(77).error == f"{ERROR_NAME}LimitsExceeded"


def test_b7_message_that_stalls_half_way(bus: Bus, folder: Path) -> None:
    with open_limited(bus, folder, message_seconds=1) as warden, open_scene(warden) as scene:
        start = time.monotonic()
        stalled = [scene.attack() for _ in range(4)]
        for client, size in zip(stalled, (1, 15, 16, 1000), strict=True):
            client.send_raw(echo_message(5, "x" * 3000)[:size])
        steady = scene.attack()
        while time.monotonic() - start < 1.3:  # always half a message there, never the same one
            steady.send_raw(echo_message(6)[20:] if steady.queue else b"")
            steady.send_raw(echo_message(7) + echo_message(8)[:20])
            steady.send_raw(echo_message(8)[20:])
            time.sleep(0.02)
        for client in stalled:
            scene.assert_closed(client)
        assert time.monotonic() - start < 4
        echo(steady)
        assert "message_seconds=1" in warden.log


BODIES: dict[str, bytes] = {
    "too short for its signature": forge([*GOOD, (8, "g", "su")], body=text(b"x")),
    "too long for its signature": forge([*GOOD, (8, "g", "u")], body=bytes(12)),
    "signature and no body": forge([*GOOD, (8, "g", "s")]),
    "body and no signature": forge(body=bytes(8)),
    "padding": forge([*GOOD, (8, "g", "yu")], body=b"\1\1\1\1\0\0\0\0"),
    "array length": forge([*GOOD, (8, "g", "au")], body=struct.pack("<II", 5, 1) + b"\0"),
    "array longer than the body": forge([*GOOD, (8, "g", "ay")], body=struct.pack("<I", 100)),
    "array over 64 MiB": forge([*GOOD, (8, "g", "ay")], body=struct.pack("<I", 64 * MIB + 1)),
    "boolean 2": forge([*GOOD, (8, "g", "b")], body=struct.pack("<I", 2)),
    "no UTF-8": forge([*GOOD, (8, "g", "s")], body=text(b"\xff\xfe")),
    "NUL in a string": forge([*GOOD, (8, "g", "s")], body=text(b"a\0b")),
    "string without its NUL": forge([*GOOD, (8, "g", "s")], body=text(b"ab", end=b"x")),
    "bad path": forge([*GOOD, (8, "g", "o")], body=text(b"//")),
    "variants in variants": forge([*GOOD, (8, "g", "v")], body=b"\1v\0" * 70 + b"\1y\0\0"),
}


@pytest.mark.parametrize("how", BODIES)
def test_b8_b9_b18_b21_b22_broken_bodies(scene: Scene, how: str) -> None:
    # The gate does not look into bodies: the bus does, and ends that one connection.
    assert_ended(scene, BODIES[how])


def test_b9_padding_that_is_not_zero(scene: Scene) -> None:
    assert_ended(scene, forge(padding=b"\1"))


@pytest.mark.parametrize("field", [*GOOD, (8, "g", ""), (9, "u", 0), (5, "u", 5), (7, "s", ":1.5")])
def test_b10_field_twice(scene: Scene, field: Field) -> None:
    assert_ended(scene, forge([*GOOD, field, field]))


@pytest.mark.parametrize(
    "field",
    [
        (1, "s", PATH),
        (2, "o", "/a"),
        (3, "g", "s"),
        (6, "o", "/a"),
        (5, "s", "5"),
        (5, "t", bytes(5) + b"\5" + bytes(7)),
        (8, "s", "s"),
        (9, "s", "1"),
        (7, "o", "/a"),
        (6, "v", b"\1s\0" + text(b"a.b")),
    ],
)
def test_b11_field_of_another_type(scene: Scene, field: Field) -> None:
    assert_ended(scene, forge(with_field(*field)))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CALL, without(1)),
        (CALL, without(3)),
        (SIGNAL, without(1, 6)),
        (SIGNAL, without(2, 6)),
        (SIGNAL, without(3, 6)),
        (RETURN, REPLY[1:]),
        (ERROR, REPLY),
        (ERROR, [(4, "s", "a.b"), *REPLY[1:]]),
    ],
)
def test_b12_field_that_must_be_there(scene: Scene, kind: int, fields: list[Field]) -> None:
    assert_ended(scene, forge(fields, kind=kind))


def test_b13_field_code_0(scene: Scene) -> None:
    assert_ended(scene, forge([*GOOD, (0, "s", "x")]))


def as_received(scene: Scene, fields: list[Field], *, flags: int = 0) -> bytes:
    """Send a forged call to the host by a name that may be called; return what it was as fields and flags."""
    name = "org.example.Victim"
    scene.host.request_name(name)
    scene.warden.change_access(scene.villain, rules=[f"send:{name}"])
    client = scene.attack()
    client.send_raw(forge([*fields[:3], (6, "s", name), *fields[3:]], flags=flags))
    call = scene.host.wait_call("Ping")
    assert call.header.sender == client.unique_name
    assert not call.header.has_unknown
    assert call.header.reply_serial is None
    scene.host.reply(call)
    assert client.wait_reply(77).error is None
    scene.host.release_name(name)
    return bytes([call.header.flags])


def test_b14_unknown_fields_are_taken_away(scene: Scene) -> None:
    unknown = [(10, "o", "/evil"), (10, "s", "x"), (77, "u", 5), (255, "as", ["a"])]
    as_received(scene, [*without(6), *unknown])


def test_b15_sender_is_taken_away(scene: Scene) -> None:
    for sender in (":1.1", "org.freedesktop.DBus", ECHO):
        as_received(scene, [*without(6), (7, "s", sender)])


def test_b16_reply_serial_on_a_call_or_signal_is_no_reply(scene: Scene) -> None:
    as_received(scene, [*without(6), (5, "u", 1)])
    client = scene.attack()
    client.send_raw(forge([*without(6), (5, "u", 1)], kind=SIGNAL))
    echo(client)


@pytest.mark.parametrize("kind", [CALL, RETURN, ERROR, SIGNAL])
def test_b17_reply_to_serial_0(scene: Scene, kind: int) -> None:
    assert_ended(scene, forge([*GOOD, (4, "s", "a.b"), (5, "u", 0)], kind=kind))


@pytest.mark.parametrize("code", [2, 3, 6, 7])
@pytest.mark.parametrize(
    "value", [text(b"\xff\xfe.b"), text(b"a.b\0c"), text(b"a.b", end=b"x"), text(b"a.b")[:-2]]
)
def test_b18_strings_that_are_none(scene: Scene, code: int, value: bytes) -> None:
    assert_ended(scene, forge(with_field(code, "s", value)))


@pytest.mark.parametrize(
    ("code", "value"),
    [
        (1, "//a"),
        (1, "/a/"),
        (1, ""),
        (1, "a"),
        (1, "/a-b"),
        (2, "nodots"),
        (2, ".a.b"),
        (2, "a.1b"),
        (2, "a." + "b" * 254),
        (3, "a.b"),
        (3, ""),
        (3, "1a"),
        (3, "a" * 256),
        (4, "nodots"),
        (6, "nodots"),
        (6, ":a..b"),
        (6, "a." + "b" * 254),
        (6, ""),
        (7, "no"),
    ],
)
def test_b19_names_that_are_none(scene: Scene, code: int, value: str) -> None:
    assert_ended(scene, forge(with_field(code, "o" if code == 1 else "s", value)))


@pytest.mark.parametrize(
    ("code", "signature", "value"),
    [(1, "o", "/org/freedesktop/DBus/Local"), (2, "s", "org.freedesktop.DBus.Local")],
)
@pytest.mark.parametrize("kind", [CALL, SIGNAL])
def test_b20_local_is_never_sent(
    scene: Scene, code: int, signature: str, value: str, kind: int
) -> None:
    assert_ended(scene, forge(with_field(code, signature, value), kind=kind))


@pytest.mark.parametrize(
    "signature",
    [
        "a" * 33 + "y",
        "(" * 33 + "y" + ")" * 33,
        "()",
        "{ss}",
        "a{vs}",
        "(s",
        "s)",
        "a",
        "z",
        "a{s}",
    ],
)
def test_b21_signatures_that_are_none(scene: Scene, signature: str) -> None:
    assert_ended(scene, forge([*GOOD, (8, "g", signature)], body=bytes(64)))


def test_b21_depth_of_a_field_that_nobody_knows(scene: Scene) -> None:
    assert_ended(scene, forge([*GOOD, (99, "v", b"\1v\0" * 10_000 + b"\1y\0\0")]))


@pytest.mark.parametrize(
    "value",
    [
        ("ay", struct.pack("<I", 64 * MIB + 1)),
        ("au", b"\0" + struct.pack("<II", 6, 1) + b"\0\0"),
        ("b", struct.pack("<I", 2)),
    ],
)
def test_b22_values_of_a_field_that_nobody_knows(scene: Scene, value: tuple[str, bytes]) -> None:
    assert_ended(scene, forge([*GOOD, (99, *value)]))
