"""The gate learns a bus's id before any app connects, for names on file."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.control_protocol.messages import BusSpec, Done, Refused, SandboxOf, SetBuses, WhoIs
from broker.gate.name_ledger import NameLedger
from tests.gate.test_server import Supervisor

ID = "a" * 32
OK = b"OK " + ID.encode() + b"\r\n"


class Stage(Supervisor):
    """A gate that is new, the file of one before it, and a bus that says who it is when told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.gate._folder = folder  # type: ignore[misc]
        names = NameLedger(folder)
        names.meet(ID)
        names.add(":1.5")
        names.close()
        self.bus = socket.socket(socket.AF_UNIX)
        self.bus.bind(str(folder / "bus"))
        self.bus.listen()
        self.bus.setblocking(False)
        spec = BusSpec(name="session", address=f"unix:path={folder}/bus")
        assert self.ask(SetBuses((spec,))) == Done()
        self.late: list[object] = []

    def start_asking(self, name: str) -> None:
        """Ask, and do not wait for the answer."""
        from broker.control_protocol.framing import make_frame  # noqa: PLC0415
        from broker.control_protocol.messages import Envelope  # noqa: PLC0415

        self.serial += 1
        self.sock.send(make_frame(Envelope(serial=self.serial, body=WhoIs("session", name))))
        self.turn()

    def answers(self) -> list[object]:
        self.turn()
        return [envelope.body for envelope in self.take() if envelope.serial]

    def let_in(self, data: bytes = OK) -> None:
        there, _ = self.bus.accept()
        with there:
            there.send(data)
            self.turn()

    def close(self) -> None:
        self.bus.close()
        super().close()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.close()


def test_who_is_in_no_file_is_a_host_at_once(stage: Stage) -> None:
    assert stage.ask(WhoIs("session", ":1.6")) == SandboxOf(None)
    with pytest.raises(BlockingIOError):
        stage.bus.accept()


def test_attack_i1_name_of_a_gate_that_died_is_asked_about_when_it_is_known(stage: Stage) -> None:
    for name in (":1.5", ":1.5"):
        stage.start_asking(name)
    assert stage.answers() == []
    stage.let_in()
    assert stage.answers() == [SandboxOf("")] * 2
    assert stage.ask(WhoIs("session", ":1.5")) == SandboxOf("")
    assert stage.ask(WhoIs("session", ":1.6")) == SandboxOf(None)
    with pytest.raises(BlockingIOError):  # one connection was enough
        stage.bus.accept()


def test_another_bus_has_other_names(stage: Stage) -> None:
    stage.start_asking(":1.5")
    stage.let_in(b"OK " + b"b" * 32 + b"\r\n")
    assert stage.answers() == [SandboxOf(None)]


@pytest.mark.parametrize("data", [b"", b"REJECTED EXTERNAL\r\n", b"nonsense\r\n"])
def test_bus_that_does_not_say_is_no_answer(stage: Stage, data: bytes) -> None:
    stage.start_asking(":1.5")
    stage.let_in(data)
    (answer,) = stage.answers()
    assert isinstance(answer, Refused)
    stage.start_asking(":1.5")  # it is tried again
    stage.let_in()
    assert stage.answers() == [SandboxOf("")]


def test_bus_that_is_not_there_is_no_answer(stage: Stage) -> None:
    stage.bus.close()
    stage.start_asking(":1.5")
    (answer,) = stage.answers()
    assert isinstance(answer, Refused)
