from collections.abc import Callable

import trio
import trio.testing

from broker.supervisor.engine_jobs import EngineJobQueue
from broker.wire.errors import FAILED, CallRefusedError
from tests.helpers.fakes import lost


class Work:
    """Jobs that fail as often as they are told to."""

    def __init__(self) -> None:
        self.jobs = EngineJobQueue()
        self.done: list[str] = []

    def add(
        self, name: str, *failures: Exception, at_failure: Callable[[], None] = lambda: None
    ) -> None:
        left = list(failures)

        async def job() -> None:
            await trio.lowlevel.checkpoint()
            self.done.append(name)
            if left:
                at_failure()
                raise left.pop()

        self.jobs.add(name, job)

    async def run(self) -> list[str]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.jobs.run)
            await trio.sleep(60)
            nursery.cancel_scope.cancel()
        return self.done


async def test_what_is_refused_is_done_with(autojump_clock: trio.testing.MockClock) -> None:
    work = Work()
    work.add("a", CallRefusedError(FAILED, "no"))
    work.add("b")
    assert await work.run() == ["a", "b"]


async def test_what_finds_no_engine_is_done_once_there_is_one_and_before_what_follows(
    autojump_clock: trio.testing.MockClock,
) -> None:
    work = Work()
    work.add("a", lost(), lost())
    work.add("b")
    assert await work.run() == ["a", "a", "a", "b"]


async def test_what_a_snapshot_asks_for_again_is_not_tried_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    work = Work()
    work.add("a", lost(), at_failure=work.jobs.begin_anew)
    work.add("b")
    assert await work.run() == ["a", "b"]
