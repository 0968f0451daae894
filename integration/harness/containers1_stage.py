"""A dbus-daemon that has Containers1, a supervisor on it, and a service that asks that bus who calls."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from integration.harness.buses import Bus, open_containers1_daemon
from integration.harness.rawclient import BUS, BUS_PATH, CallError, RawClient
from integration.harness.supervised import CONTAINERS, Sandbox, Warden, open_warden

COMPONENT = "org.buswarden.Component"
ERROR = "org.freedesktop.DBus.Error."
INSTANCES = "/org/freedesktop/DBus/Containers1/c"


class Service:
    """A service that knows nothing of us: it asks its bus who calls."""

    def __init__(self, bus: Bus) -> None:
        self.client = RawClient.connect(bus.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def ask(self, member: str, signature: str, value: str) -> tuple[object, ...]:
        return self.client.ask(BUS, BUS_PATH, CONTAINERS, member, signature, (value,))

    def app_of(self, name: str) -> tuple[str, str, object]:
        """Return type, app and component of a connection. Raises CallError."""
        _path, _creator, kind, app, metadata = self.ask("GetConnectionInstance", "s", name)
        assert isinstance(metadata, dict)
        return str(kind), str(app), metadata.get(COMPONENT)

    def credentials_of(self, name: str) -> str | None:
        """Return the instance path that the credentials have."""
        (credentials,) = self.client.driver("GetConnectionCredentials", "s", name)
        path = credentials.get(f"{CONTAINERS}.Instance")
        return None if path is None else str(path)

    def count(self, most: int = 60) -> int:
        """Count the instances of the bus: it has no list, but its numbers are in a row."""
        found = 0
        for number in range(most):
            with contextlib.suppress(CallError):
                self.ask("GetInstanceInfo", "o", f"{INSTANCES}{number}")
                found += 1
        return found


@pytest.fixture
def labelling(folder: Path) -> Iterator[Bus]:
    with open_containers1_daemon(folder) as bus:
        yield bus


@pytest.fixture
def labelled(labelling: Bus, folder: Path) -> Iterator[Warden]:
    with open_warden(labelling, folder / "run", "--engine", "containers1") as warden:
        yield warden


@pytest.fixture
def service(labelling: Bus) -> Iterator[Service]:
    with Service(labelling) as service:
        yield service


def instance_of(warden: Warden, sandbox: Sandbox) -> str:
    """Return the bus's own path of a sandbox."""
    return str(warden.show(sandbox)["instances"]["session"])
