"""The supervisor process: folder, lock, buses, gate and interfaces put together, and taken down in order."""

import fcntl
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from broker.api import containers1, management, policy
from broker.api.caller import Door
from broker.api.dispatch import Objects
from broker.bus.connection import Bus, Call, open_bus
from broker.bus.link import BusLostError
from broker.bus.watch import NameWatch
from broker.engines.gate import GateEngine
from broker.gate.control import BusSpec, Denied
from broker.supervisor.config import CONTAINERS, Config
from broker.supervisor.registry import Record, shorten
from broker.supervisor.state import open_state
from broker.supervisor.supervisor import Outside, Supervisor
from broker.wire.errors import BrokerError, ConfigError

LOGGER: Final = logging.getLogger(__name__)
NAME: Final = "org.buswarden.Broker1"
# Calls that are carried out at the same time on one bus; others wait their turn.
MAX_TASKS: Final = 64
# Signals about refusals are worth less than the memory they would take on a bus that does not read.
MAX_BACKLOG: Final = 1000
SHUTDOWN_TIMEOUT: Final = 4.0  # seconds, from the signal to the end


class StartError(BrokerError):
    """It cannot run here: one line, exit 1."""


async def serve(config: Config) -> None:
    """Run until SIGTERM or SIGINT. Raises StartError, or BusLostError if a bus went away.

    Prints `ready` and the primary bus's address when the service is there.
    """
    if not config.buses:
        raise ConfigError("no bus to serve")
    os.umask(0o077)  # for what SQLite and we make in a folder that others may pass through
    failures: list[BrokerError | OSError] = []
    try:
        await _serve(config)
    except* (BrokerError, OSError) as group:
        failures += _leaves(group)
    for failure in failures[1:]:
        LOGGER.error("%s", failure)
    for failure in failures[:1]:
        if isinstance(failure, OSError):
            where = failure.filename or "the supervisor"
            raise StartError(f"{where}: {failure.strerror}") from failure
        raise failure


async def _serve(config: Config) -> None:
    folder = config.runtime_dir
    async with AsyncExitStack() as stack:
        signals = stack.enter_context(trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT))
        stack.enter_context(_locked_folder(config))
        state = stack.enter_context(open_state(folder / "state.db"))
        buses = {
            spec.name: await stack.enter_async_context(_open_door(spec)) for spec in config.buses
        }
        watches = {name: NameWatch(bus) for name, bus in buses.items()}
        engine = GateEngine(control=folder / "gate.sock", buses=config.buses)
        outside = Outside(
            engine=engine,
            state=state,
            announcer=_Announcer(buses, tell_denials=config.scope == "user"),
            watches=watches,
            folder=folder / CONTAINERS,
        )
        supervisor = Supervisor(outside, config.limits)
        for name, watch in watches.items():
            watch.on_gone = partial(supervisor.name_gone, name)
        stack.enter_context(_address_file(folder / "bus-address", config.buses[0].address))
        await _run(_Parts(config, buses, watches, engine, supervisor), signals)


@dataclass(frozen=True, slots=True)
class _Parts:
    config: Config
    buses: Mapping[str, Bus]
    watches: Mapping[str, NameWatch]
    engine: GateEngine
    supervisor: Supervisor


async def _run(parts: _Parts, signals: AsyncIterator[int]) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(parts.engine.keep_connected, parts.supervisor)
        nursery.start_soon(parts.supervisor.run_jobs)
        for watch in parts.watches.values():
            await watch.check()
        async with trio.open_nursery() as doors:
            for name, bus in parts.buses.items():
                doors.start_soon(_serve_calls, bus, _make_objects(parts, name))
                doors.start_soon(_fall_with, name, bus)
            sys.stdout.write(f"ready {parts.config.buses[0].address}\n")
            sys.stdout.flush()
            number = await anext(signals)
            LOGGER.info("%s: ending", signal.Signals(number).name)
            doors.cancel_scope.cancel()
        # Nobody is answered any more; what ends with the gate is still announced.
        with trio.move_on_after(SHUTDOWN_TIMEOUT):
            await parts.engine.shutdown()
        nursery.cancel_scope.cancel()


def _make_objects(parts: _Parts, name: str) -> Objects:
    bus, watch = parts.buses[name], parts.watches[name]
    bus.on_signal = watch.take
    door = Door(name=name, bus=bus, supervisor=parts.supervisor, buses=tuple(parts.buses))
    return Objects(
        {
            containers1.PATH: [containers1.Containers1(door, watch).interface()],
            management.PATH: [
                management.Management(door, parts.engine, parts.config).interface(),
                policy.PolicyInterface(door).interface(),
            ],
        }
    )


async def _serve_calls(bus: Bus, objects: Objects) -> None:
    slots = trio.Semaphore(MAX_TASKS)

    async def answer(call: Call) -> None:
        try:
            with call:
                await objects.serve(bus, call)
        finally:
            slots.release()

    async with trio.open_nursery() as nursery:
        async for call in bus.calls:
            await slots.acquire()
            nursery.start_soon(answer, call)


async def _fall_with(name: str, bus: Bus) -> None:
    """Without its bus the service is none; the gate goes on, and so may the next supervisor."""
    await bus.lost.wait()
    raise BusLostError(f"bus {name} went away")


class _Announcer:
    """Sends the signals."""

    def __init__(self, buses: Mapping[str, Bus], *, tell_denials: bool) -> None:
        self._buses: Final = buses
        # What an app tried is no business of other users: on their bus only `Show` tells.
        self._tell_denials: Final = tell_denials

    def removed(self, record: Record) -> None:
        for bus in self._buses.values():
            bus.emit(containers1.PATH, containers1.NAME, "InstanceRemoved", "o", [record.path])

    def denied(self, record: Record, event: Denied) -> None:
        bus = self._buses.get(event.bus)
        if bus is None or not self._tell_denials or bus.backlog > MAX_BACKLOG:
            return
        what = management.describe_denial(shorten(event))
        bus.emit(management.PATH, management.NAME, "Denied", "oa{sv}", [record.path, what])


@asynccontextmanager
async def _open_door(spec: BusSpec) -> AsyncIterator[Bus]:
    """Connect to a bus and take our name there. Raises StartError."""
    async with AsyncExitStack() as stack:
        opening = open_bus(spec.address, runtime_dir=os.environ.get("XDG_RUNTIME_DIR"))
        try:
            bus = await stack.enter_async_context(opening)
            is_ours = await bus.request_name(NAME)
        except BrokerError as exc:
            raise StartError(f"bus {spec.name}: {exc}") from exc
        if not is_ours:
            raise StartError(f"bus {spec.name}: another program there is {NAME} already")
        yield bus


@contextmanager
def _locked_folder(config: Config) -> Iterator[None]:
    """Make the runtime folder and have it for ourselves. Raises StartError."""
    mode = 0o700 if config.scope == "user" else 0o711
    folder = config.runtime_dir
    for path in (folder, folder / CONTAINERS):
        path.mkdir(mode=mode, exist_ok=True)
        if path.is_symlink() or path.stat().st_uid != os.geteuid():
            raise StartError(f"{path} is not ours")
        path.chmod(mode)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"another supervisor runs in {folder}") from None
        yield
    finally:
        os.close(lock)


@contextmanager
def _address_file(path: Path, address: str) -> Iterator[None]:
    """Say where the service is, for the command line."""
    new = path.with_suffix(".new")
    new.write_text(f"{address}\n", encoding="utf-8")
    new.chmod(0o644)  # in a system's folder others look here, too
    new.rename(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _leaves(
    group: BaseExceptionGroup[BrokerError | OSError],
) -> Iterator[BrokerError | OSError]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc
