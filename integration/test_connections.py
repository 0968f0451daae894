"""Plugs connected to slots on real buses: the rules come and go with the connection, under held connections."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from integration.harness.buses import Bus
from integration.harness.processes import PROJECT, PYTHON, Process, running
from integration.harness.rawclient import CallError, RawClient
from integration.harness.stage import (
    DENIED,
    NO_OWNER,
    PASSED,
    UNKNOWN,
    arrivals,
    call,
    listen,
    signal,
)
from integration.harness.supervised import MANAGE_PATH, NAME, Sandbox, Warden, open_warden
from integration.harness.values import Variant

POLICY: Final = "org.buswarden.Broker1.Policy"
SNAP_TYPE: Final = "io.snapcraft.snapd"
PLAYER: Final = "org.example.Player"
PLAYER_PATH: Final = "/org/example/Player"
# The `dbus` interface lets a plug talk to such names, too, if an app of the slot has them.
HOST_PLAYER: Final = f"{PLAYER}-7"
REMOTE: Final = "org.example.Remote"
ATTRIBUTES: Final = {"bus": "session", "name": PLAYER}
PORT: Final = {"interface": "dbus", "attributes": ATTRIBUTES}
SNAPS: Final = {
    "snaps": [
        {"name": "player", "apps": ["player"], "slots": {"control": PORT}},
        {"name": "remote", "apps": ["remote"], "plugs": {"control": PORT}},
        {"name": "other", "apps": ["other"], "plugs": {"control": PORT}},
    ]
}
PLUG, SLOT = "remote:control", "player:control"
# A checkout or a Python below /tmp is not there in the sandbox otherwise.
SHARES: Final = [
    word
    for directory in (PROJECT, Path(sys.prefix), Path(sys.base_prefix))
    for word in ("--share", str(directory))
]


def policy(warden: Warden, member: str, signature: str = "", *values: Any) -> Any:
    """Call a method of the policy interface. Raises CallError."""
    answer = warden.host.ask(NAME, MANAGE_PATH, POLICY, member, signature, values)
    return answer[0] if answer else None


def load(warden: Warden, snaps: object = SNAPS) -> None:
    policy(warden, "LoadSnaps", "s", json.dumps(snaps))


def add_app(
    warden: Warden, snap: str, app: str | None = None, *, plugs: list[str] | None = None
) -> Sandbox:
    return warden.add_server(
        snap,
        type=SNAP_TYPE,
        Plugs=Variant("as", plugs or []),
        Component=Variant("s", app or snap),
        ReceiveFromHost=Variant("b", False),
        KeepAfterCreator=Variant("b", True),
    )


def try_call(sender: RawClient, receiver: RawClient, destination: str) -> str:
    return call(sender, receiver, destination, path=PLAYER_PATH, interface=PLAYER)


def try_signal(sender: RawClient, receiver: RawClient) -> bool:
    return signal(sender, receiver, path=PLAYER_PATH, interface=PLAYER)


@pytest.fixture
def snaps(shared: Warden) -> Iterator[Warden]:
    """A supervisor with the three snaps and nothing connected; others are told of no snaps after it."""
    load(shared)
    assert policy(shared, "Connections") == []
    yield shared
    load(shared, {})


@pytest.mark.parametrize(("plugs", "result"), [(["control"], PASSED), (["other"], UNKNOWN)])
def test_an_app_has_the_plugs_only_that_its_sandbox_was_made_with(
    snaps: Warden, plugs: list[str], result: str
) -> None:
    player = snaps.connect(add_app(snaps, "player"))
    remote = snaps.connect(add_app(snaps, "remote", plugs=plugs))
    assert player.request_name(PLAYER) == 1
    policy(snaps, "Connect", "ss", PLUG, SLOT)
    assert try_call(remote, player, PLAYER) == result


def test_a_connection_gives_and_takes_on_held_connections(snaps: Warden) -> None:
    player = snaps.connect(add_app(snaps, "player"))
    remote = listen(snaps.connect(add_app(snaps, "remote")))
    other = snaps.connect(add_app(snaps, "other"))
    host = snaps.connect_host()
    assert player.request_name(PLAYER) == 1
    assert host.request_name(HOST_PLAYER) == 1
    for _ in range(3):
        assert try_call(remote, player, PLAYER) == UNKNOWN
        assert not try_signal(player, remote)
        assert policy(snaps, "Connect", "ss", PLUG, SLOT) == [
            "snap.player.player: 3 rules added",
            "snap.remote.remote: 10 rules added",
        ]
        assert try_call(remote, player, PLAYER) == PASSED
        assert try_signal(player, remote)
        # The host has a name of the same kind, and the same object; it is not the slot's app.
        assert try_call(remote, host, HOST_PLAYER) in {DENIED, UNKNOWN}
        assert try_call(remote, host, host.unique_name) in {DENIED, UNKNOWN, NO_OWNER}
        assert not try_signal(host, remote)
        # Nor is another snap with such a plug that is not connected.
        assert try_call(other, player, PLAYER) == UNKNOWN
        assert policy(snaps, "Connections") == [(PLUG, SLOT, "dbus")]
        assert len(policy(snaps, "Disconnect", "ss", PLUG, SLOT)) == 2
    assert try_call(remote, player, PLAYER) == UNKNOWN
    assert not try_signal(player, remote)


def test_connecting_touches_only_the_sandboxes_concerned(snaps: Warden) -> None:
    clients = [snaps.connect(add_app(snaps, name)) for name in ("player", "player", "remote")]
    player, second, remote = clients
    assert second.request_name(PLAYER) == 1
    policy(snaps, "Connect", "ss", PLUG, SLOT)
    assert policy(snaps, "Connect", "ss", PLUG, SLOT) == []
    assert try_call(remote, second, PLAYER) == PASSED
    # One that comes later has the rules at once.
    late = snaps.connect(add_app(snaps, "remote"))
    assert try_call(late, second, PLAYER) == PASSED
    assert not arrivals(player)


@pytest.mark.parametrize(
    ("plug", "slot"),
    [("remote:no", SLOT), (PLUG, "no:no"), ("remote", SLOT), (PLUG, "snapd:network-manager")],
)
def test_nonsense_is_refused_and_changes_nothing(snaps: Warden, plug: str, slot: str) -> None:
    for member in ("Connect", "Disconnect"):
        with pytest.raises(CallError, match="InvalidArgs"):
            policy(snaps, member, "ss", plug, slot)
    assert policy(snaps, "Connections") == []


def test_snaps_are_refused_whole_and_kept_connections_make_sense(snaps: Warden) -> None:
    player = snaps.connect(add_app(snaps, "player"))
    remote = snaps.connect(add_app(snaps, "remote"))
    assert player.request_name(PLAYER) == 1
    policy(snaps, "Connect", "ss", PLUG, SLOT)
    policy(snaps, "Connect", "ss", "other:control", SLOT)
    bad = {"snaps": [*SNAPS["snaps"], {"name": "x", "plugs": {"p": {"interface": "dbus"}}}]}
    for snaps_text in (json.dumps(bad), "{", '{"snap": []}'):
        with pytest.raises(CallError, match="InvalidArgs"):
            policy(snaps, "LoadSnaps", "s", snaps_text)
    assert try_call(remote, player, PLAYER) == PASSED
    load(snaps, {"snaps": SNAPS["snaps"][:2]})
    assert policy(snaps, "Connections") == [(PLUG, SLOT, "dbus")]
    assert try_call(remote, player, PLAYER) == PASSED
    load(snaps, {"snaps": SNAPS["snaps"][:1]})
    assert try_call(remote, player, PLAYER) == UNKNOWN


def test_an_app_in_a_sandbox_may_neither_change_nor_ask(snaps: Warden) -> None:
    sandbox = snaps.add_server("nosy", rules=[f"send:{NAME}"])
    client = snaps.connect(sandbox)
    for member, signature, values in (
        ("Connect", "ss", (PLUG, SLOT)),
        ("Connections", "", ()),
        ("Snaps", "", ()),
        ("LoadSnaps", "s", ("{}",)),
        ("Explain", "sa{sv}", ("remote.remote", {})),
    ):
        with pytest.raises(CallError, match="AccessDenied"):
            client.ask(NAME, MANAGE_PATH, POLICY, member, signature, values)


def test_the_supervisor_forgets_no_connection(bus: Bus, folder: Path) -> None:
    with open_warden(bus, folder / "run", orderly=False) as first:
        load(first)
        player = first.connect(add_app(first, "player"))
        remote = first.connect(add_app(first, "remote"))
        assert player.request_name(PLAYER) == 1
        policy(first, "Connect", "ss", PLUG, SLOT)
        first.kill()
        assert try_call(remote, player, PLAYER) == PASSED
        with open_warden(bus, folder / "run") as second:
            assert "other rules" not in second.log
            assert policy(second, "Connections") == [(PLUG, SLOT, "dbus")]
            assert try_call(remote, player, PLAYER) == PASSED
            policy(second, "Disconnect", "ss", PLUG, SLOT)
            assert try_call(remote, player, PLAYER) == UNKNOWN


# the command line, and real processes under bubblewrap


def test_the_command_line_loads_connects_and_explains(snaps: Warden, folder: Path) -> None:
    file = folder / "snaps.json"
    file.write_text(json.dumps(SNAPS))
    assert snaps.cli("snaps", "load", str(file)).ok
    assert "player" in snaps.cli("snaps").out
    message = ("session", PLAYER, PLAYER_PATH, PLAYER, "Play")
    question = ("explain", "remote.remote", "--send", *message)
    peer = ("--peer", f"app:{SNAP_TYPE}/player#player")
    denied = snaps.cli(*question, *peer)
    assert denied.ok, denied.err
    assert denied.out.startswith("denied: ")
    assert f"connect {PLUG} {SLOT}" in denied.out
    assert "snap.remote.remote: 10 rules added" in snaps.cli("connect", PLUG, SLOT).out
    assert SLOT in snaps.cli("connections").out
    allowed = snaps.cli(*question, *peer)
    assert allowed.out.startswith("allowed: ")
    assert f"connected {PLUG} {SLOT}" in allowed.out
    assert snaps.cli(*question).out.startswith("denied: ")  # the host is not the app
    sandbox = add_app(snaps, "remote")
    by_id = snaps.cli("explain", sandbox.id, "--send", *message, *peer)
    assert by_id.out == allowed.out
    assert snaps.cli("disconnect", PLUG, SLOT).ok
    refused = snaps.cli("disconnect", PLUG, SLOT)
    assert (refused.code, refused.err.count("\n")) == (1, 1)


@contextmanager
def app_process(warden: Warden, snap: str, name: str, *options: str) -> Iterator[Process]:
    """Run the tests' service as an app of a snap, under bubblewrap, with one connection that it keeps."""
    script = f'exec {PYTHON} -m integration.harness.service --address "$DBUS_SESSION_BUS_ADDRESS" --name {name}'
    argv = [PYTHON, "-m", "broker.cli", "exec", "--snap", snap, "--app", snap, *SHARES, *options]
    env = {"XDG_RUNTIME_DIR": str(warden.runtime), "HOME": "/"}
    with running([*argv, "--", "sh", "-c", script], env=env) as process:
        process.wait_line("READY")
        yield process


def test_two_real_processes_meet_while_their_snaps_are_connected(snaps: Warden) -> None:
    from_host = ("--allow", f"own:{REMOTE}", "--allow", "receive:,peer=host")
    with ExitStack() as stack:
        stack.enter_context(app_process(snaps, "player", PLAYER))
        stack.enter_context(app_process(snaps, "remote", REMOTE, *from_host))
        host = snaps.connect_host()
        assert host.request_name(HOST_PLAYER) == 1
        remote = host.name_owner(REMOTE)

        def ask(destination: str) -> str:
            """Have the remote control call the player, and return what came of it."""
            values = (destination, PLAYER_PATH, PLAYER, "Sender")
            (answer,) = host.ask(REMOTE, "/", REMOTE, "Ask", "ssss", values)
            return str(answer)

        assert ask(PLAYER) == UNKNOWN
        assert snaps.cli("connect", PLUG, SLOT).ok
        assert ask(PLAYER) == remote
        assert ask(HOST_PLAYER) in {DENIED, UNKNOWN}
        assert not [each for each in arrivals(host) if each.header.member == "Sender"]
        assert snaps.cli("disconnect", PLUG, SLOT).ok
        assert ask(PLAYER) == UNKNOWN
