"""`--scope system`: one broker for everybody, on a bus that all users share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.harness.buses import CONTAINERS1, CONTAINERS1_DAEMON, open_bus
from integration.harness.other_user import NOBODY, as_user
from integration.harness.rawclient import CallError, RawClient
from integration.harness.supervised import Warden, open_warden

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="the machine cannot: becoming another user takes root"
)


@pytest.fixture(
    params=["dbus-daemon", CONTAINERS1] if CONTAINERS1_DAEMON.exists() else ["dbus-daemon"]
)
def shared(request: pytest.FixtureRequest, folder: Path) -> Iterator[Warden]:
    folder.chmod(0o711)
    with open_bus(request.param, folder, everybody=True) as bus:
        config = folder / "buswarden.toml"
        config.write_text(f'runtime_dir = "{folder}/run/buswarden"\n')
        args = ("--scope", "system", "--config", str(config), "--bus", f"system={bus.address}")
        (folder / "run").mkdir()
        with open_warden(bus, folder / "run", *args, add_bus=False) as warden:
            (folder / "run").chmod(0o711)
            yield warden


def test_app_is_on_the_bus_as_the_user_who_made_its_sandbox(shared: Warden) -> None:
    def nobodys_app() -> list[int]:
        with RawClient.connect(shared.bus.address) as creator:
            sandbox = shared.add_server(creator=creator)
            with sandbox.connect() as app:
                return [app.driver("GetConnectionUnixUser", "s", app.unique_name)[0], os.getuid()]

    assert as_user(NOBODY, nobodys_app) == [NOBODY, NOBODY]
    # A bus that labels makes a server for that user, too.
    assert "the gate alone" not in shared.log


def test_another_users_connection_is_closed_without_a_word(shared: Warden) -> None:
    sandbox = shared.add_server()

    def intruder() -> str:
        try:
            sandbox.connect(hello=False)
        except (EOFError, ConnectionError):
            return "closed"
        return "talked to"

    sandbox.socket.chmod(0o777)
    assert as_user(NOBODY, intruder) == "closed"


def test_another_user_cannot_change_or_stop_a_sandbox(shared: Warden) -> None:
    sandbox = shared.add_server()

    def stranger() -> str:
        with RawClient.connect(shared.bus.address) as client:
            reply = client.call(
                "org.buswarden.Broker1",
                "/org/freedesktop/DBus",
                "org.freedesktop.DBus.Containers1",
                "StopInstance",
                "o",
                (sandbox.path,),
            )
            return reply.error or ""

    assert as_user(NOBODY, stranger) == "org.freedesktop.DBus.Error.AccessDenied"
    assert [one["id"] for one in shared.list_sandboxes()] == [sandbox.id]


def test_a_user_has_sixteen_sandboxes_at_most(shared: Warden) -> None:
    for _ in range(16):
        shared.add_server()
    with pytest.raises(CallError, match="max_containers_per_user=16"):
        shared.add_server()

    def somebody_else() -> str:
        with RawClient.connect(shared.bus.address) as creator:
            return shared.add_server(creator=creator).id

    assert as_user(NOBODY, somebody_else)


def test_bus_sees_no_group_of_root_with_a_users_app(shared: Warden) -> None:
    def nobodys_app() -> list[int]:
        with RawClient.connect(shared.bus.address) as creator:
            sandbox = shared.add_server(creator=creator)
            with sandbox.connect() as app:
                (credentials,) = app.driver("GetConnectionCredentials", "s", app.unique_name)
                return list(credentials["UnixGroupIDs"])

    assert 0 not in as_user(NOBODY, nobodys_app)
