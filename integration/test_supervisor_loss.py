"""Supervisors killed at any moment: no connection lost, no message judged by a wrong list, no sandbox leaked or forgotten.

A model keeps what was acknowledged. What the kill left without an answer may have been done or not; whichever it is, the
next supervisor and the gate agree on it, and the model takes it from there.
"""

import contextlib
import os
import random
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from integration.harness.apps import App, Traffic, rules_of
from integration.harness.buses import KINDS, open_bus
from integration.harness.processes import PYTHON, running
from integration.harness.rawclient import CallError
from integration.harness.service import running_service
from integration.harness.supervised import Sandbox, Warden, open_warden, stop_and_check, wait_for
from integration.harness.values import Variant

if TYPE_CHECKING:
    from collections.abc import Callable

KEEP: Final = Variant("b", True)
SANDBOXES: Final = 50
# In all, in rounds that begin anew; `BUSWARDEN_KILLS=1000 make test` for longer.
KILLS: Final = int(os.environ.get("BUSWARDEN_KILLS", "200"))
ROUNDS: Final = 4  # on each bus
# Seconds that a supervisor lives once it is ready, at most.
LONGEST_LIFE: Final = 0.1
# How many are killed before that, as well, and after how many seconds at most.
STILLBORN: Final = 0.2
LONGEST_START: Final = 1.0
MAX_EXTRAS: Final = 12
# What the bus says for who has died, or is not there yet.
_DIED: Final = {"NoReply", "ServiceUnknown", "Disconnected"}


@dataclass(slots=True)
class Extra:
    """A sandbox that comes and goes; with a pipe, the end of it that keeps it alive."""

    sandbox: Sandbox
    pipe: int = -1

    def close(self) -> None:
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1


@dataclass(slots=True)
class Model:
    """What there is, by all that was acknowledged."""

    apps: dict[str, App] = field(default_factory=dict)
    extras: dict[str, Extra] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    highest: int = -1
    # Asked for and not answered.
    adding: int = 0
    stopping: set[str] = field(default_factory=set)

    def added(self, extra: Extra) -> None:
        number = int(extra.sandbox.id[1:])
        assert number > self.highest, "an id was given again"
        self.highest = number
        self.extras[extra.sandbox.id] = extra

    def end(self, id_: str) -> None:
        self.ended.add(id_)
        self.extras.pop(id_).close()

    def settle(self, there: set[str]) -> set[str]:
        """Compare with what there is; return those that nobody was told of."""
        wanted = {*self.apps, *self.extras}
        assert not there & self.ended, "they are back"
        assert wanted - there <= self.stopping, "forgotten"
        assert len(there - wanted) <= self.adding, "leaked"
        for id_ in wanted - there:
            self.end(id_)
        self.stopping.clear()
        self.adding = 0
        return there - wanted


class Actor:
    """Asks for things, in a thread, until the supervisor is dead."""

    def __init__(self, model: Model, warden: Warden, seed: int) -> None:
        self._model: Final = model
        self._warden: Final = warden
        self._random: Final = random.Random(seed)
        self._thread: Final = threading.Thread(target=self._run)
        self.failure = ""
        self._thread.start()

    def join(self) -> None:
        self._thread.join()
        assert not self.failure

    def _run(self) -> None:
        acts: tuple[Callable[[], None], ...] = (
            *(self._add, self._stop, self._connect),
            *(self._change, self._change),
        )
        try:
            while True:
                self._random.choice(acts)()
        except CallError as exc:
            if exc.name.rpartition(".")[2] not in _DIED:
                self.failure = repr(exc)
        except (OSError, EOFError, AssertionError) as exc:
            self.failure = repr(exc)

    def _add(self) -> None:
        model, warden = self._model, self._warden
        if len(model.extras) >= MAX_EXTRAS:
            return
        model.adding += 1
        if self._random.random() < 0.5:
            model.added(Extra(warden.add_server("extra", KeepAfterCreator=KEEP)))
        else:
            read_end, write_end = os.pipe()
            try:
                sandbox = warden.add_server("extra", fds={"CloseNotify": read_end})
            except BaseException:
                os.close(write_end)
                raise
            finally:
                os.close(read_end)
            model.added(Extra(sandbox, write_end))
        model.adding -= 1

    def _stop(self) -> None:
        model = self._model
        if not model.extras:
            return
        id_ = self._random.choice(sorted(model.extras))
        if model.extras[id_].pipe >= 0:
            model.end(id_)  # the gate sees to it, whoever is there
            return
        model.stopping.add(id_)
        self._warden.stop_instance(model.extras[id_].sandbox)
        model.stopping.discard(id_)
        model.end(id_)

    def _connect(self) -> None:
        app = self._random.choice(list(self._model.apps.values()))
        with app.sandbox.connect() as client:
            assert self._warden.who(client.unique_name) == app.sandbox.path

    def _change(self) -> None:
        app = self._random.choice(list(self._model.apps.values()))
        number = app.begin()
        self._warden.set_access(app.sandbox, rules_of(number))
        app.done()


@pytest.mark.parametrize("kind", KINDS * ROUNDS)
def test_supervisor_is_killed_again_and_again(kind: str, folder: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    model = Model()
    with (
        ExitStack() as stack,
        open_bus(kind, folder) as bus,
        running_service(bus.address),
        Traffic() as traffic,
    ):
        warden = stack.enter_context(open_warden(bus, folder / "run", orderly=False))
        gate = warden.gate_pid
        for n in range(SANDBOXES):
            sandbox = warden.add_server(f"a{n}", allow=[rules_of(0)], KeepAfterCreator=KEEP)
            model.apps[sandbox.id] = App(sandbox)
            traffic.add(model.apps[sandbox.id])
        for n in range(KILLS // len(KINDS * ROUNDS)):
            actor = Actor(model, warden, chance.randrange(1 << 30))
            time.sleep(chance.random() * LONGEST_LIFE)
            warden.kill()
            actor.join()
            warden.host.close()
            if chance.random() < STILLBORN:
                start_and_kill(warden, chance.random() * LONGEST_START)
            warden = stack.enter_context(open_warden(bus, folder / "run", orderly=False))
            assert warden.gate_pid == gate
            settle(model, warden)
            assert not traffic.failures, (n, traffic.failures)
        finish(model, warden, traffic)


def start_and_kill(warden: Warden, after: float) -> None:
    """Kill a supervisor before it is ready, at the latest then: while it takes over."""
    argv = [PYTHON, "-m", "broker.cli", "run", "--bus", f"session={warden.bus.address}"]
    with running(argv, env={"XDG_RUNTIME_DIR": str(warden.runtime)}) as process:
        with contextlib.suppress(TimeoutError):
            process.wait_line("ready", after)
        process.send_signal(signal.SIGKILL)
        process.wait()


def settle(model: Model, warden: Warden) -> None:
    """See that the new supervisor has what the model has, and learn what became of what had no answer."""
    wait_for(lambda: not model.ended & set(listed(warden)))  # pipes end them in their own time
    there = listed(warden)
    for id_ in model.settle(set(there)):
        model.ended.add(id_)
        with contextlib.suppress(CallError):  # its pipe was closed when its creator got no answer
            warden.containers("StopInstance", "o", there[id_]["path"])
    for app in model.apps.values():
        if app.begun != app.acknowledged:
            (rule,) = there[app.sandbox.id]["access"]
            if rule != text_of(app.begun):
                assert rule == text_of(app.acknowledged)
                warden.set_access(app.sandbox, rules_of(app.begun))
            app.done()


def listed(warden: Warden) -> dict[str, dict[str, Any]]:
    return {one["id"]: one for one in warden.list_sandboxes()}


def text_of(number: int) -> tuple[bool, str]:
    """Return what `rules_of` is in the list."""
    return (False, f"send:org.example.Echo:org.example.Mark{number % 2}.*")


def is_alone(warden: Warden, app: App, unique_name: str) -> bool:
    """Say whether a sandbox has this one connection, and no other."""
    found: list[tuple[str, str]] = warden.show(app.sandbox)["connections"]
    return found == [("session", unique_name)]


def finish(model: Model, warden: Warden, traffic: Traffic) -> None:
    """See once more that gate, supervisor and model agree, and that nothing is left in the end."""
    traffic.wait_calls(4)
    assert not traffic.failures
    assert all(app.connections == 1 for app in model.apps.values())
    there = listed(warden)
    assert set(there) == {*model.apps, *model.extras}
    for app in model.apps.values():
        assert there[app.sandbox.id]["access"] == [text_of(app.acknowledged)]
        assert app.client is not None
        wait_for(partial(is_alone, warden, app, app.client.unique_name))
    sockets = {path.name for path in (warden.folder / "containers").iterdir()}
    assert sockets == {app.sandbox.socket.name for app in model.apps.values()} | {
        extra.sandbox.socket.name for extra in model.extras.values()
    }
    assert "gate-lost" not in warden.log
    assert "Traceback" not in warden.log
    for app in traffic.apps:
        traffic.remove(app)
    for extra in model.extras.values():
        extra.close()
    stop_and_check(warden)
