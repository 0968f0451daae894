"""The harness itself, without buswarden: both buses, the four clients, the service."""

import os
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import is_excused
from integration.harness.buses import BUILD_FAILED, KINDS, Bus, open_bus, why_no_containers1
from integration.harness.clients import TEXT_CALLS
from integration.harness.processes import PROJECT, PYTHON, is_running, wait_gone
from integration.harness.rawclient import CallError, RawClient
from integration.harness.service import ECHO, PATH, running_service
from integration.harness.values import Variant, decode, encode


def test_bus_answers_and_is_the_process_it_says(bus: Bus) -> None:
    assert is_running(bus.pid)
    with RawClient.connect(bus.address) as client:
        assert client.unique_name.startswith(":1.")
        assert client.driver("GetConnectionUnixUser", "s", client.unique_name) == (os.getuid(),)


@pytest.mark.parametrize("kind", KINDS)
def test_bus_is_gone_after_its_block(kind: str, folder: Path) -> None:
    with open_bus(kind, folder) as bus:
        pid = bus.pid
    assert wait_gone(pid)


@pytest.mark.parametrize(
    ("note", "may_be_skipped"),
    [
        ("cannot get Debian's source package of dbus (offline?); see log", True),
        ("this version of dbus has no bus/containers.c", True),
        (f"{BUILD_FAILED}; see log", False),
        (None, False),
    ],
)
def test_a_build_that_failed_is_no_excuse(
    note: str | None, may_be_skipped: bool, tmp_path: Path
) -> None:
    if note is not None:
        (tmp_path / "why-not").write_text(f"{note}\n")
    text = why_no_containers1(tmp_path)
    assert (note or "run make containers1-daemon") in text
    assert is_excused(text) == may_be_skipped
    assert f'why_not "{BUILD_FAILED}' in (PROJECT / ".ci" / "containers1-daemon").read_text()


@pytest.mark.parametrize("library", TEXT_CALLS)
def test_every_library_calls_the_service(bus: Bus, library: str) -> None:
    with running_service(bus.address):
        outcome = TEXT_CALLS[library](bus.address, ECHO, PATH, f"{ECHO}.Echo", "hello there")
    assert outcome.ok, outcome.err
    assert "hello there" in outcome.out


def test_service_says_who_called(bus: Bus) -> None:
    with running_service(bus.address), RawClient.connect(bus.address) as client:
        assert client.ask(ECHO, PATH, ECHO, "Sender") == (client.unique_name,)


def test_service_fails_and_knows_its_methods(bus: Bus) -> None:
    with running_service(bus.address), RawClient.connect(bus.address) as client:
        with pytest.raises(CallError, match="as you wish"):
            client.ask(ECHO, PATH, ECHO, "Fail")
        with pytest.raises(CallError, match="UnknownMethod"):
            client.ask(ECHO, PATH, ECHO, "Nonsense")


def test_service_asks_others_and_emits_to_one(bus: Bus) -> None:
    with running_service(bus.address), RawClient.connect(bus.address) as client:
        call = ("org.freedesktop.DBus", "/", "org.freedesktop.DBus", "GetId")
        (bus_id,) = client.ask(ECHO, PATH, ECHO, "Ask", "ssss", call)
        assert len(bus_id) == 32
        client.ask(ECHO, PATH, ECHO, "EmitTo", "s", (client.unique_name,))
        assert client.wait_signal("Emitted").header.destination == client.unique_name


def test_descriptors_go_there_and_back(bus: Bus, folder: Path) -> None:
    content = folder / "content"
    content.write_bytes(bytes(range(10)))
    with (
        running_service(bus.address),
        RawClient.connect(bus.address) as client,
        content.open("rb") as file,
    ):
        reply = client.call(ECHO, PATH, ECHO, "Sum", "h", (0,), fds=[file.fileno()])
    (fd,) = reply.fds
    with open(fd, "rb") as pipe:  # noqa: PTH123 (a descriptor)
        assert pipe.read() == b"45"


def test_broadcast_reaches_who_subscribed(bus: Bus) -> None:
    with running_service(bus.address), RawClient.connect(bus.address) as client:
        client.add_match(f"type='signal',interface='{ECHO}'")
        client.ask(ECHO, PATH, ECHO, "Emit")
        assert client.wait_signal("Emitted").values == (client.unique_name,)


def test_service_quits_when_told(bus: Bus) -> None:
    with running_service(bus.address) as service, RawClient.connect(bus.address) as client:
        client.ask(ECHO, PATH, ECHO, "Quit")
        assert service.wait() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_name_is_activatable(kind: str, folder: Path) -> None:
    name = "org.example.Started"
    command = [PYTHON, "-m", "integration.harness.service", "--name", name]
    with open_bus(kind, folder, {name: command}) as bus, RawClient.connect(bus.address) as client:
        assert name in client.driver("ListActivatableNames")[0]
        assert client.ask(name, PATH, ECHO, "Echo", "s", ("started",)) == ("started",)


def test_connection_that_breaks_the_protocol_is_closed(bus: Bus) -> None:
    with RawClient.connect(bus.address) as client:
        client.send_raw(b"X" * 64)
        assert client.is_closed()


def test_codec_gives_back_what_it_was_given() -> None:
    signature = "sa{sv}a(usos)ayasxb"
    values: tuple[Any, ...] = (
        "text",
        {"key": Variant("u", 7), "more": Variant("as", ["a", "b"])},
        [(1, "org.example", "/", ""), (2, "", "/x", "i.M")],
        b"bytes\0",
        [],
        -1,
        True,
    )
    plain = ("text", {"key": 7, "more": ["a", "b"]}, *values[2:])
    assert decode(signature, encode(signature, values)) == plain
