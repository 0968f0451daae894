"""The engine for buses that label, with the gate and the buses in this process."""

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from broker.bus.values import pack, unpack
from broker.control_protocol.messages import (
    Answer,
    BusSpec,
    CallBus,
    Called,
    Done,
    Listener,
    Request,
    SandboxSpec,
)
from broker.engines.containers1_engine import Containers1Engine
from broker.wire.errors import DISCONNECTED, FAILED, NO_REPLY, CallRefusedError
from tests.helpers.fake_driver import FakeDriver
from tests.helpers.records import make_record, make_state

BUSES = tuple(BusSpec(name=name, address="unix:path=/nowhere") for name in ("session", "other"))
NO_FDS: list[int] = []


class Engine(Containers1Engine):
    """With a gate that does what it is asked, and a bus for each name that is in `drivers`."""

    def __init__(self, *, is_required: bool = False, **drivers: FakeDriver) -> None:
        super().__init__(control=Path("/none"), buses=BUSES, is_required=is_required)
        self.drivers = drivers
        self.asked: list[Request] = []
        self.refuse: Exception | None = None
        self.gone = False
        self._buses_are_known.set()

    async def _request(self, request: Request, fds: Sequence[int] = ()) -> Answer:
        await trio.lowlevel.checkpoint()
        self.asked.append(request)
        if isinstance(request, CallBus):
            return self._drive(request)
        if self.refuse is not None:
            raise self.refuse
        return Done()

    def _drive(self, request: CallBus) -> Called:
        driver = self.drivers.get(request.bus)
        if self.gone or driver is None:
            raise CallRefusedError(DISCONNECTED, "it cannot be reached")
        result = driver.answer(request.member, unpack(request.signature, request.body))
        if result is None:
            raise CallRefusedError(NO_REPLY, "it did not answer")
        signature, values = result
        return Called(signature=signature, body=pack(signature, values), little=True)

    def requests(self, kind: type[Any]) -> list[Any]:
        return [one for one in self.asked if isinstance(one, kind)]


@pytest.fixture(autouse=True)
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(address: str) -> None:
        if "/nowhere" in address:
            raise CallRefusedError(FAILED, "cannot be reached")

    monkeypatch.setattr("broker.engines.containers1_client._check_reachable", check)


def make_spec(number: int = 0, *buses: str, **changes: Any) -> SandboxSpec:
    spec = make_state(make_record(number=number)).spec
    listeners = tuple(Listener(bus=bus, fd=0) for bus in buses or ("session",))
    return msgspec.structs.replace(spec, listeners=listeners, **changes)


@pytest.fixture
def fd() -> Any:
    with socket.socket(socket.AF_UNIX) as sock:
        yield sock.fileno()


@asynccontextmanager
async def remaking(engine: Engine) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine._servers.recreate_lost, engine._recreate)
        yield
        await trio.testing.wait_all_tasks_blocked(0.001)
        nursery.cancel_scope.cancel()
