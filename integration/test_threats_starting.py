"""Threats C26, D2 and D7: services that a bus starts when they are written to."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.wire.header import Flag
from integration.harness.buses import KINDS, open_bus
from integration.harness.processes import PYTHON
from integration.harness.rawclient import BUS, BUS_PATH, RawClient
from integration.harness.service import ECHO, PATH as ECHO_PATH, running_service
from integration.harness.stage import (
    DENIED,
    INTERFACE,
    NO_OWNER,
    PATH,
    UNKNOWN,
    Stage,
    refusal,
    settle,
)
from integration.harness.supervised import Warden, open_warden, wait_for
from integration.harness.threats import Scene, open_scene

STARTS = "org.example.Starts"
QUESTION = (STARTS, ECHO_PATH, ECHO, "Sender")
START = (BUS, BUS_PATH, BUS, "StartServiceByName", "su", (STARTS, 0))


@pytest.fixture(scope="module", params=KINDS)
def starting(request: pytest.FixtureRequest) -> Iterator[Warden]:
    """A supervisor on a bus that starts a service."""
    argv = [PYTHON, "-m", "integration.harness.service", "--name", STARTS]
    with tempfile.TemporaryDirectory(prefix="bw-") as name:
        folder = Path(name)
        with (
            open_bus(request.param, folder, {STARTS: argv}) as bus,
            running_service(bus.address),
            open_warden(bus, folder / "run") as warden,
        ):
            yield warden


@pytest.fixture
def scene(starting: Warden) -> Iterator[Scene]:
    """An attacker and others; at the end the service must not run."""
    with open_scene(starting) as set_scene:
        yield set_scene
        if is_there(set_scene.host):
            assert set_scene.host.call(STARTS, ECHO_PATH, ECHO, "Quit").error is None
            wait_for(lambda: not is_there(set_scene.host))  # it answers before it goes


@pytest.fixture
def stage(scene: Scene) -> Stage:
    """More apps and hosts, on the same gate."""
    return Stage(scene.warden)


def is_there(host: RawClient) -> bool:
    """Return whether the service runs."""
    return bool(host.driver("NameHasOwner", "s", STARTS)[0])


def test_c26_only_who_may_send_starts_by_writing(scene: Scene, stage: Stage) -> None:
    hidden, seen = stage.app(), stage.app(f"see:{STARTS}", f"receive:{STARTS}")
    for flags, error in ((0, UNKNOWN), (Flag.NO_AUTO_START, NO_OWNER)):
        assert hidden.call(*QUESTION, flags=flags).error == error
        assert seen.call(*QUESTION, flags=flags).error == DENIED
    for app in (hidden, seen):
        app.emit(PATH, INTERFACE, "Done", destination=STARTS)
        app.start_call(*QUESTION, flags=Flag.NO_REPLY_EXPECTED)
    settle(hidden, seen)
    assert not is_there(scene.host)
    app = stage.app(f"send:{STARTS}")
    assert app.call(*QUESTION, flags=Flag.NO_AUTO_START).error == NO_OWNER
    assert not is_there(scene.host)
    assert app.ask(*QUESTION) == (app.unique_name,)


def test_d2_activatable_names_are_listed_if_they_may_be_seen(stage: Stage) -> None:
    assert STARTS in stage.host().driver("ListActivatableNames")[0]
    assert STARTS not in stage.app().driver("ListActivatableNames")[0]
    assert STARTS in stage.app(f"see:{STARTS}").driver("ListActivatableNames")[0]


def test_d7_only_who_may_send_starts_by_asking(scene: Scene, stage: Stage) -> None:
    absent = "org.example.Absent"
    hidden, seen = stage.app("send:org.example.Else"), stage.app(f"see:{STARTS}", f"own:{STARTS}")
    expected = refusal(scene.host, *START[:5], (absent, 0))
    assert expected is not None
    assert refusal(hidden, *START) == (expected[0], expected[1].replace(absent, STARTS))
    assert seen.call(*START).error == DENIED
    denied = stage.app(f"send:{STARTS}:{INTERFACE}.Do", deny=[f"send:{STARTS}"])
    assert denied.call(*START).error is not None
    for name in ("nodots", ":1.1", ""):
        assert hidden.call(*START[:5], (name, 0)).error is not None
    assert not is_there(scene.host)
    # A right to send anything is a right to start: docs/design.md.
    assert stage.app(f"send:{STARTS}:{INTERFACE}.Do").ask(*START) == (1,)
    assert is_there(scene.host)
