"""Fixtures of the integration tests, and the rule that in CI nothing is skipped for want of a program."""

import os
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from integration.harness.buses import CONTAINERS1, CONTAINERS1_DAEMON, KINDS, Bus, open_bus
from integration.harness.proxies import World, open_world
from integration.harness.stage import Stage
from integration.harness.supervised import Warden, open_warden
from integration.harness.threats import Scene, open_scene, open_threatened

# A skip whose text has one of these is of the kernel or the machine, which CI cannot install.
_EXCUSES = ("the kernel", "the machine", "this kernel", "this machine")


# Modules that say what holds whatever mediates the bus.
_CONFORMANCE = (
    "test_attack_identity",
    "test_identity",
    "test_lifetimes",
    "test_rules_",
    "test_service_",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests on each bus; those of the conformance also by the other engine, if its bus is built."""
    module = metafunc.module.__name__.rpartition(".")[2]
    kinds: tuple[str, ...] = KINDS
    if module.startswith(_CONFORMANCE) and CONTAINERS1_DAEMON.exists():
        kinds = (*KINDS, CONTAINERS1)
    if "bus" in metafunc.fixturenames:
        metafunc.parametrize("bus", kinds, indirect=True, scope="function")
    if "module_warden" in metafunc.fixturenames:
        metafunc.parametrize("module_warden", kinds, indirect=True, scope="module")


def pytest_configure() -> None:
    """Have what the tests start end by the signals that end a program, as from a terminal."""
    # Who is started in the background of a script, or by nohup, ignores these, and its children do so as well.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_skip_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_skip_in_ci(report)
    return report


def _fail_skip_in_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail") or os.environ.get("CI") != "true":
        return
    text = str(report.longrepr)
    if not is_excused(text):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {text}"


def is_excused(text: str) -> bool:
    """Say whether a skip of that text is no failure in CI."""
    return any(excuse in text for excuse in _EXCUSES)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: a Unix socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="bw-") as name:
        yield Path(name)


@pytest.fixture
def bus(request: pytest.FixtureRequest, folder: Path) -> Iterator[Bus]:
    """A real bus: each test that takes it runs on dbus-daemon and on dbus-broker."""
    with open_bus(request.param, folder) as running_bus:
        yield running_bus


@pytest.fixture
def warden(bus: Bus, folder: Path) -> Iterator[Warden]:
    """A supervisor with its gate on that bus; the test fails if it leaves anything behind."""
    with open_warden(bus, folder / "run") as running_warden:
        yield running_warden


@pytest.fixture(scope="module")
def module_warden(request: pytest.FixtureRequest) -> Iterator[Warden]:
    """A supervisor on a real bus, for all tests of a module: take `shared`."""
    with tempfile.TemporaryDirectory(prefix="bw-") as name:
        folder = Path(name)
        with (
            open_bus(request.param, folder) as running_bus,
            open_warden(running_bus, folder / "run") as running_warden,
        ):
            yield running_warden


@pytest.fixture
def shared(module_warden: Warden) -> Iterator[Warden]:
    """As `warden`, for tests that neither end nor configure it: it was used before and will be again."""
    yield module_warden
    module_warden.tidy()


@pytest.fixture
def stage(shared: Warden) -> Stage:
    """Apps in sandboxes, and hosts, for tests of the rules."""
    return Stage(shared)


@pytest.fixture(scope="module", params=KINDS)
def threatened(request: pytest.FixtureRequest) -> Iterator[Warden]:
    """A supervisor with small limits on a real bus with the service, for all tests of a module: take `scene`."""
    with tempfile.TemporaryDirectory(prefix="bw-") as name:
        with open_threatened(request.param, Path(name)) as running_warden:
            yield running_warden


@pytest.fixture
def scene(threatened: Warden) -> Iterator[Scene]:
    """An attacker and those who must not notice; afterwards the gate has to be as it was before."""
    with open_scene(threatened) as set_scene:
        yield set_scene


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A real bus with services on it, for all tests of a module that put proxies in front of it."""
    with tempfile.TemporaryDirectory(prefix="bw-") as name:
        with open_world(request.param, Path(name)) as made:
            yield made
