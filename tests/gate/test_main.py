"""How the gate's process ends: in order it tidies up, and of a defect it does not."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.control_protocol.messages import Done, Ended, SetBuses
from broker.gate.__main__ import _serve
from tests.gate.test_server import BUS, Supervisor


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    """A gate with one sandbox. The signals of this process are as they were afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    supervisor = Supervisor(tmp_path)
    assert supervisor.ask(SetBuses((BUS,))) == Done()
    assert supervisor.add() == Done()
    supervisor.loop._running = True
    yield supervisor
    for number, handler in before.items():
        signal.signal(number, handler)
    supervisor.sock.close()
    supervisor.listening.close()


def test_what_ends_in_order_unlinks_its_sockets_and_says_so(supervisor: Supervisor) -> None:
    _serve(supervisor.loop, supervisor.gate, supervisor.loop.stop)
    supervisor.take()
    assert supervisor.events == [Ended("c0", "stopped")]
    assert not (supervisor.folder / "c0").exists()


def test_a_defect_ends_the_process_and_no_sandbox(supervisor: Supervisor) -> None:
    def fail() -> None:
        raise MemoryError

    def begin() -> None:
        supervisor.loop.next_turn(fail)

    with pytest.raises(MemoryError):
        _serve(supervisor.loop, supervisor.gate, begin)
    supervisor.take()
    assert supervisor.events == []
    assert (supervisor.folder / "c0").exists()
    for sandbox in supervisor.gate._sandboxes.values():  # which the end of a process closes
        for listening in sandbox._listening:
            listening.sock.close()
    assert supervisor.gate._channel.connection is not None
    supervisor.gate._channel.connection.sock.close()
