"""A gate with a control socket, whose own connection to the bus leads to a bus of the test's."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.bus.values import pack, unpack
from broker.control_protocol.framing import make_frame
from broker.control_protocol.messages import (
    AddSandbox,
    Answer,
    BusSpec,
    CallBus,
    Called,
    ContainerServer,
    Done,
    Envelope,
    Listener,
    Request,
    SandboxSpec,
    SetBuses,
    Snapshot,
    TakeSnapshot,
)
from broker.engines.containers1_dialect import ADD_TAKES
from broker.gate.containers1 import bus_client
from broker.wire.interfaces import CONTAINERS1
from policy.rules import AccessList
from tests.gate.test_server import APP, BUS, Supervisor
from tests.helpers.fake_own_bus import OwnBus

OTHER = BusSpec(name="other", address=BUS.address)
ADD = CallBus(
    bus="session",
    uid=os.geteuid(),
    interface=CONTAINERS1,
    member="AddServer",
    signature=ADD_TAKES,
    body=pack(ADD_TAKES, ["org.example.T", "a", {}, {}]),
    undo="StopInstance",
)
PING = CallBus(
    bus="session", uid=os.geteuid(), interface="org.freedesktop.DBus.Peer", member="Ping"
)


class Stage(Supervisor):
    """A gate whose own connection leads to `bus`."""

    def __init__(self, folder: Path, bus: OwnBus) -> None:
        super().__init__(folder)
        self.bus = bus

    def start(self, request: Request, fds: tuple[int, ...] = ()) -> int:
        """Ask without waiting."""
        self.serial += 1
        frame = make_frame(Envelope(serial=self.serial, body=request, fds=len(fds)))
        socket.send_fds(self.sock, [frame], fds)
        self.go_on()
        return self.serial

    def go_on(self) -> None:
        for _ in range(4):
            self.turn()
            if hasattr(self.bus, "sock") and self.bus.sock.fileno() >= 0:
                self.bus.turn()
        self.turn()

    def call(self, request: Request, fds: tuple[int, ...] = ()) -> Answer:
        serial = self.start(request, fds)
        (answer,) = [e.body for e in self.take() if e.serial == serial]
        assert isinstance(answer, Answer)
        return answer

    def make(self) -> ContainerServer:
        """Have the bus make a server."""
        called = self.call(ADD)
        assert isinstance(called, Called), called
        instance, _, address = unpack(called.signature, called.body)
        return ContainerServer(instance=instance, address=address)

    def add_labelled(
        self, upstream: ContainerServer, id_: str = "c0", buses: tuple[str, ...] = ("session",)
    ) -> Answer:
        """Add a sandbox that the first of the buses labels; for the others it has a socket `ID-BUS`."""
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in buses]
            for sock, bus in zip(socks, buses, strict=True):
                sock.bind(str(self.folder / (id_ if bus == "session" else f"{id_}-{bus}")))
                sock.listen()
            spec = SandboxSpec(
                id=id_,
                identity=APP,
                uid=os.getuid(),
                listeners=tuple(Listener(bus=bus, fd=fd) for fd, bus in enumerate(buses)),
                access=AccessList(),
                container_servers={"session": upstream},
            )
            return self.call(AddSandbox(spec), tuple(sock.fileno() for sock in socks))

    @contextlib.contextmanager
    def client(self, name: str) -> Iterator[socket.socket]:
        """Have somebody connect to a sandbox's socket, and say nothing."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.folder / name))
            self.go_on()
            yield sock

    def asked(self) -> list[str]:
        """Return what the bus was called for."""
        return [member for member, _ in self.bus.driver.asked]

    def upstreams(self, id_: str = "c0") -> dict[str, ContainerServer]:
        snapshot = self.call(TakeSnapshot())
        assert isinstance(snapshot, Snapshot)
        (spec,) = [one.spec for one in snapshot.sandboxes if one.spec.id == id_]
        return spec.container_servers

    def pass_time(self) -> None:
        """Have every deadline of a call be over."""
        for _, _, timer in list(self.loop._timers):
            if timer.callback is not None and "check" in repr(timer.callback):
                callback, timer.callback = timer.callback, None
                callback()
        self.go_on()

    def stopped(self) -> list[str]:
        """Return which instances the bus was told to stop."""
        return [values[0] for member, values in self.bus.driver.asked if member == "StopInstance"]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    bus = OwnBus()
    monkeypatch.setattr(bus_client, "connect_unix", bus.connect)
    stage = Stage(tmp_path, bus)
    assert stage.ask(SetBuses((BUS, OTHER))) == Done()
    yield stage
    stage.close()
    bus.close()
