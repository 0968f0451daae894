import os

import pytest
import trio

from broker.control_protocol.messages import Listeners, TakeListeners
from broker.engines.gate_engine import fetch_listening_sockets
from broker.engines.held_sockets import HeldSockets
from broker.wire.errors import CallRefusedError
from tests.helpers.records import make_record, make_snapshot, make_state


class Lender:
    """A link to a gate that lends what sandboxes listen on."""

    def __init__(self, held: HeldSockets) -> None:
        self.held = held
        self.asked: list[tuple[str, ...]] = []
        self.refuses = False
        self.ending = ""  # which sandbox ends before the answer

    async def request_fds(self, request: TakeListeners) -> tuple[Listeners, list[int]]:
        await trio.lowlevel.checkpoint()
        self.asked.append(request.sandboxes)
        self.held.end(self.ending)
        if self.refuses:
            raise CallRefusedError("org.example.No", "not now")
        what = tuple((sandbox, "session") for sandbox in request.sandboxes)
        return Listeners(what), [os.open("/dev/null", os.O_RDONLY) for _ in what]


async def test_what_a_gate_that_runs_listens_on_is_borrowed_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lender = Lender(held := HeldSockets())
    snapshot = make_snapshot(*(make_state(make_record(number)) for number in range(3)))
    for _ in range(2):
        await fetch_listening_sockets(lender, held, snapshot.sandboxes)  # type: ignore[arg-type]
    assert lender.asked == [("c0", "c1", "c2")]
    assert list(held) == ["c0", "c1", "c2"]
    lender.refuses = True
    await fetch_listening_sockets(lender, held, [make_state(make_record(3))])  # type: ignore[arg-type]
    assert "cannot hold the gate's listening sockets" in caplog.text
    held.close()


async def test_what_ends_while_it_is_lent_is_not_kept() -> None:
    lender = Lender(held := HeldSockets())
    lender.ending = "c1"
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    await fetch_listening_sockets(
        lender,  # type: ignore[arg-type]
        held,
        [make_state(make_record(number)) for number in range(3)],
    )
    assert list(held) == ["c0", "c2"]
    held.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
