"""Other users: at a sandbox's socket, and at the service. Needs root, to be somebody else for a while."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.harness.buses import open_dbus_broker
from integration.harness.other_user import NOBODY, as_user
from integration.harness.rawclient import CallError, RawClient, connect_socket
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    MANAGE,
    MANAGE_PATH,
    NAME,
    TYPE,
    Warden,
    open_warden,
)
from integration.harness.values import Variant

ERROR = "org.freedesktop.DBus.Error."

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="the machine gives tests no root")


def test_wrong_uid_is_closed_without_a_word(shared: Warden) -> None:
    name = f"\0buswarden-uid-{os.getpid()}-{shared.bus.kind}"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(name)
        sandbox = shared.add_server(fds={"Socket": listening.fileno()})

    def attempt() -> str:
        with connect_socket(sandbox.address) as sock, contextlib.suppress(ConnectionError):
            sock.settimeout(5)
            sock.sendall(b"\0AUTH EXTERNAL 30\r\n")  # says it is root
            return sock.recv(100).decode()
        return ""

    assert as_user(NOBODY, attempt) == ""
    assert "wrong-uid" in shared.log
    # The sandbox goes on for its own user, and nothing was counted against it.
    clients = [shared.connect(sandbox) for _ in range(16)]
    assert all(client.driver("GetId") for client in clients)


def test_the_socket_cannot_be_reached_by_path(shared: Warden) -> None:
    sandbox = shared.add_server()

    def attempt() -> str:
        try:
            connect_socket(sandbox.address).close()
        except PermissionError:
            return "forbidden"
        return "connected"

    assert as_user(NOBODY, attempt) == "forbidden"


def test_claiming_another_uid_changes_nothing(shared: Warden) -> None:
    """The kernel's uid has decided already: see `test_bug_7_*` and `test_a13_*`."""
    sandbox = shared.add_server()
    with connect_socket(sandbox.address) as sock:
        sock.settimeout(5)
        sock.sendall(b"\0AUTH EXTERNAL " + str(NOBODY).encode().hex().encode() + b"\r\n")
        assert sock.recv(100).startswith(b"OK ")


@pytest.fixture
def system(folder: Path) -> Iterator[Warden]:
    """A supervisor for everybody, on a bus that everybody may connect to (dbus-daemon's session takes its own user only)."""
    folder.chmod(0o711)
    config = folder / "config.toml"
    config.write_text(
        f'runtime_dir = "{folder}/run/buswarden"\n[limits]\nmax_containers_per_user = 3\n'
    )
    with open_dbus_broker(folder) as bus:
        (folder / "bus").chmod(0o666)
        args = ("--scope", "system", "--config", str(config))
        (folder / "run").mkdir(mode=0o711)
        with open_warden(bus, folder / "run", *args) as warden:
            yield warden


def ask(client: RawClient, member: str, signature: str, *values: Any) -> Any:
    """Call a method of Containers1; return the values, or the error's name."""
    try:
        return client.ask(NAME, CONTAINERS_PATH, CONTAINERS, member, signature, values)
    except CallError as exc:
        return exc.name


def test_another_user_may_ask_but_not_stop_or_change(system: Warden) -> None:
    sandbox = system.add_server(rules=["see:org.example.Private"])
    client = system.connect(sandbox)

    def attempt() -> list[Any]:
        with RawClient.connect(system.bus.address) as other:
            results = [
                ask(other, "StopInstance", "o", sandbox.path),
                ask(other, "StopListening", "o", sandbox.path),
                ask(other, "RemoveContainerServer", "o", sandbox.path),
                ask(other, "SetContainerAccess", "sa(usos)", sandbox.id, []),
            ]
            for member, signature, values in (
                ("ChangeAccess", "sa(bs)b", (sandbox.id, [], True)),
                ("Show", "s", (sandbox.id,)),
            ):
                reply = other.call(NAME, MANAGE_PATH, MANAGE, member, signature, values)
                results.append(reply.error)
            results.append(other.ask(NAME, MANAGE_PATH, MANAGE, "List")[0])
            results.append(ask(other, "GetConnectionInstance", "s", client.unique_name)[0])
            return results

    denied = f"{ERROR}AccessDenied"
    assert as_user(NOBODY, attempt) == [*[denied] * 6, [], sandbox.path]
    assert system.show(sandbox)["listening"]


def test_attack_i3_other_users_learn_nothing_by_guessing_ids(system: Warden) -> None:
    sandbox = system.add_server()
    absent = sandbox.path.replace(sandbox.id, "c77")

    def attempt() -> list[str]:
        with RawClient.connect(system.bus.address) as other:
            told = []
            for path in (sandbox.path, absent):
                try:
                    about = other.ask(
                        NAME, CONTAINERS_PATH, CONTAINERS, "GetInstanceInfo", "o", (path,)
                    )
                    told.append(str(about))
                except CallError as exc:
                    told.append(f"{exc.name}: {exc.text.replace(path, 'it')}")
            return told

    there, not_there = as_user(NOBODY, attempt)
    assert there == not_there
    assert there.startswith(f"{ERROR}NotContainer")
    assert system.containers("GetInstanceInfo", "o", sandbox.path)[1] == TYPE


def test_each_user_has_its_own_sandboxes_and_share(system: Warden) -> None:
    ours = system.add_server()

    def attempt() -> list[Any]:
        with RawClient.connect(system.bus.address) as other:
            named = {"Rules": Variant("a(bs)", [(False, "send:")])}
            adds = [ask(other, "AddServer", "ssa{sv}a{sv}", TYPE, "x", {}, named) for _ in range(4)]
            path, _socket, address = adds[0]
            with RawClient.connect(address) as inside:
                uid = inside.driver("GetConnectionUnixUser", "s", inside.unique_name)[0]
                who = ask(other, "GetConnectionInstance", "s", inside.unique_name)
                stopped = ask(other, "StopInstance", "o", path)
                closed = inside.is_closed(5)
            return [adds[3], uid, who[0] == path, who[1]["UnixUserID"], list(stopped), closed]

    limit = f"{ERROR}LimitsExceeded"
    assert as_user(NOBODY, attempt) == [limit, NOBODY, True, NOBODY, [], True]
    assert system.show(ours)["listening"]


def test_root_cannot_pass_for_the_user_of_a_sandbox_but_may_stop_it(system: Warden) -> None:
    keep = {"KeepAfterCreator": Variant("b", True)}

    def attempt() -> list[str]:
        with RawClient.connect(system.bus.address) as other:
            path, _socket, address = ask(other, "AddServer", "ssa{sv}a{sv}", TYPE, "x", {}, keep)
            return [path, address]

    path, address = as_user(NOBODY, attempt)
    with pytest.raises((EOFError, ConnectionError)):
        RawClient.connect(address)
    system.containers("StopInstance", "o", path)
    with pytest.raises(CallError, match="NotContainer"):
        system.containers("GetInstanceInfo", "o", path)
