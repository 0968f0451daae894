"""The upgrade as the supervisor sees it: what becomes of the new gate's process, whatever is answered."""

import errno
import os
import socket
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from broker.control_protocol.messages import (
    PROTOCOL,
    Answer,
    Done,
    HandedOver,
    HandOver,
    Request,
    Started,
    StartNext,
)
from broker.engines import gate_upgrade as upgrade_module
from broker.engines.base import EngineLostError
from broker.engines.gate_process import GateError
from broker.engines.gate_upgrade import ANSWER_TIMEOUT, upgrade
from broker.wire.errors import FAILED, NOT_SUPPORTED, CallRefusedError


class FakeLink:
    """A connection to a gate: what it is asked, and what it answers."""

    def __init__(self, answer: Answer | Exception | None) -> None:
        self.answer = answer  # None: never
        self.asked: list[Request] = []
        self.is_service = False

    async def request(self, body: Request, fds: Sequence[int] = ()) -> Answer:
        await trio.lowlevel.checkpoint()
        self.asked.append(body)
        assert all(map(os.fstat, fds))
        if isinstance(body, StartNext):
            if self.is_service:
                return Started(5)
            raise CallRefusedError(NOT_SUPPORTED, "no service")
        if self.answer is None:
            await trio.sleep_forever()
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return self.answer


class FakeProcess:
    """The gate's process, and the next one."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.done: list[tuple[str, int]] = []

    async def start_next(self, take_over: int, ask: object) -> int:
        assert callable(ask)
        assert os.fstat(take_over)
        if self.failure is not None:
            raise self.failure
        pid: int = await ask(("gate",), {}, [])
        return pid or 7

    def replaced(self, pid: int) -> None:
        self.done.append(("replaced", pid))

    def give_up(self, pid: int) -> None:
        self.done.append(("given up", pid))


async def run(link: FakeLink, process: FakeProcess) -> None:
    await upgrade(link, process)  # type: ignore[arg-type]


@pytest.mark.parametrize(("is_service", "pid"), [(False, 7), (True, 5)])
async def test_who_took_over_is_the_gate_from_then_on(is_service: bool, pid: int) -> None:
    link, process = FakeLink(HandedOver(pid)), FakeProcess()
    link.is_service = is_service
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    await run(link, process)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert link.asked[-1] == HandOver(upgrade_module.HAND_OVER_TIMEOUT, PROTOCOL)
    assert process.done == [("replaced", pid)]


async def test_who_is_not_wanted_is_given_up() -> None:
    link, process = FakeLink(CallRefusedError(FAILED, "it hangs")), FakeProcess()
    with pytest.raises(CallRefusedError, match="it hangs"):
        await run(link, process)
    assert process.done == [("given up", 7)]


async def test_who_does_not_start_is_no_reason_to_ask() -> None:
    link, process = FakeLink(Done()), FakeProcess(GateError("it did not start"))
    with pytest.raises(CallRefusedError, match="cannot take over: it did not start"):
        await run(link, process)
    assert not link.asked


async def test_without_descriptors_the_old_one_serves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socketpair", refuse)
    link, process = FakeLink(Done()), FakeProcess()
    with pytest.raises(CallRefusedError, match="cannot be started: Too many open files"):
        await run(link, process)
    assert not link.asked
    assert not process.done
    await trio.lowlevel.checkpoint()


async def test_who_it_is_now_is_not_guessed() -> None:
    process = FakeProcess()
    with pytest.raises(EngineLostError, match="Done"):
        await run(FakeLink(Done()), process)
    with pytest.raises(EngineLostError):
        await run(FakeLink(EngineLostError("the gate went away")), process)
    assert not process.done


async def test_a_gate_that_never_answers_is_not_waited_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    process = FakeProcess()
    with pytest.raises(EngineLostError, match="did not answer"):
        await run(FakeLink(None), process)
    assert trio.current_time() >= ANSWER_TIMEOUT
    assert not process.done
