"""The supervisor process: all parts put together, and taken down in order.

Order of the start: folder and lock, state file, buses, gate, then the D-Bus name's calls are answered, `ready`.
Order of the end, after SIGTERM or SIGINT:

    0 s      stop accepting calls; answer those that came before
    1 s      end the gate, at most 3.25 s, and announce the sandboxes that end with the gate
    4.25 s   exit in any case
"""

import fcntl
import logging
import math
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from broker.api import containers1, management, policy
from broker.api.caller import BusContext
from broker.api.dispatch import Objects
from broker.api.subscribers import Subscribers
from broker.bus.connection import BusConnection, open_loop
from broker.bus.message_bus import BusLostError
from broker.bus.watch import NameWatch
from broker.control_protocol.messages import Denied
from broker.engines.containers1_engine import Containers1Engine
from broker.engines.gate_engine import GateEngine
from broker.posix.descriptors import raise_descriptor_limit
from broker.posix.files import check_entries, open_file, open_folder, write_file
from broker.supervisor.bus_connections import ReconnectingBus, StartError, serve_calls
from broker.supervisor.config import CONTAINERS, Config
from broker.supervisor.sandboxes.registry import Record, shorten
from broker.supervisor.storage.recovery import open_state
from broker.supervisor.storage.state_file import StateFile
from broker.supervisor.supervisor import Environment, Supervisor
from broker.supervisor.watches.process_connector import open_connector
from broker.supervisor.watches.processes import Processes
from broker.systemd.fd_store import restore_and_store, stay_alive
from broker.systemd.notify import Notifier, take_descriptors, take_notifier
from broker.wire.errors import BrokerError, ConfigError
from broker.wire.interfaces import BROKER, BROKER_PATH, CONTAINERS1, DRIVER_PATH

LOGGER: Final = logging.getLogger(__name__)
NOBODY: Final = ":0.0"  # a unique name that no bus gives
# Queued messages to a bus that does not read, after which no signals about refusals are queued.
MAX_BACKLOG: Final = 1000
# Seconds after the signal in which pending calls are answered.
ANSWER_TIMEOUT: Final = 1.0
# Seconds after that in which the gate ends.
SHUTDOWN_TIMEOUT: Final = 3.25
# Seconds after the signal until a start in progress is given up.
START_GRACE: Final = 2.0
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


async def serve(config: Config) -> None:
    """Run the service until SIGTERM or SIGINT. Raises StartError, or BusLostError if no bus is left.

    Prints `ready` and the primary bus's address once calls are answered.
    """
    if not config.buses:
        raise ConfigError("no bus configured")
    os.umask(
        0o077
    )  # for files of SQLite and of the service, because other users may enter the folder
    raise_descriptor_limit()  # two descriptors are held for each sandbox
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
    with ExitStack() as stack:
        signals = stack.enter_context(trio.open_signal_receiver(*SIGNALS))
        stack.enter_context(_locked_folder(config))
        state = stack.enter_context(open_state(folder / "state.db"))
        gone_after = config.bus_gone_seconds or math.inf
        lines = {spec.name: ReconnectingBus(spec, BROKER, gone_after) for spec in config.buses}
        async with open_loop(), trio.open_nursery() as nursery:
            listener = _SignalListener()
            nursery.start_soon(listener.listen, signals, nursery.cancel_scope)
            buses = {name: await nursery.start(line.keep_open) for name, line in lines.items()}
            parts = _make_parts(config, state, lines, buses)
            stack.enter_context(_address_file(folder / "bus-address", config.buses[0].address))
            await _run(parts, listener)
            nursery.cancel_scope.cancel()


class _SignalListener:
    """The requests that came as signals: to end, and to reload."""

    def __init__(self) -> None:
        self.to_end: Final = trio.Event()
        self.has_started: Final = trio.Event()
        self._reload, self.reloads = trio.open_memory_channel[None](1)

    async def listen(self, signals: AsyncIterator[int], start: trio.CancelScope) -> None:
        """Take signals from the start on.

        A start that takes too long after the signal to end is cancelled.
        """
        async for number in signals:
            if number != signal.SIGHUP:
                LOGGER.info("%s: ending", signal.Signals(number).name)
                break
            with suppress(trio.WouldBlock):  # a reload is pending already
                self._reload.send_nowait(None)
        self.to_end.set()
        with trio.move_on_after(START_GRACE) as grace:
            await self.has_started.wait()
        if grace.cancelled_caught:
            LOGGER.warning("giving up the start, which takes too long")
            start.cancel()


@dataclass(frozen=True, slots=True)
class _Components:
    config: Config
    lines: Mapping[str, ReconnectingBus]
    watches: dict[str, NameWatch]  # of the present connections
    subscribers: Subscribers
    engine: GateEngine
    supervisor: Supervisor
    all_gone: trio.Event
    notifier: Notifier

    async def check_gate(self) -> None:
        """Ask the gate a question, to see whether an answer comes. Raises if none does."""
        await self.engine.who(self.config.buses[0].name, NOBODY)

    async def bus_back(self, name: str, bus: BusConnection) -> None:
        """Resume the service on a new connection to a bus."""
        self.subscribers.lose_bus(name)
        self.watch(name, bus)
        self.supervisor.bus_back(name, self.lines[name].id)
        await self.watches[name].check()

    def watch(self, name: str, bus: BusConnection) -> None:
        """Watch the names on a connection."""
        watch = self.watches[name] = NameWatch(bus)
        watch.on_gone = partial(self.name_gone, name)
        _attach(watch, bus)

    def name_gone(self, bus: str, unique_name: str) -> None:
        """Drop what depends on a connection that left the bus."""
        self.subscribers.discard(bus, unique_name)
        self.supervisor.name_gone(bus, unique_name)

    def bus_gone(self, name: str) -> None:
        """Continue without a bus, or end the service without the last bus."""
        self.supervisor.bus_gone(name)
        if all(line.is_gone for line in self.lines.values()):
            self.all_gone.set()


def _make_parts(
    config: Config,
    state: StateFile,
    lines: Mapping[str, ReconnectingBus],
    buses: Mapping[str, BusConnection],
) -> _Components:
    folder = config.runtime_dir
    # A bus may have been lost and connected again while the next bus was opened.
    buses = {name: lines[name].bus or bus for name, bus in buses.items()}
    watches = {name: NameWatch(bus) for name, bus in buses.items()}
    engine = _make_engine(config)
    subscribers = Subscribers(time.monotonic)
    notifier = take_notifier()
    restore_and_store(notifier, engine.held, take_descriptors())
    environment = Environment(
        engine=engine,
        state=state,
        announcer=_Announcer(lines, subscribers),
        name_watches=watches,
        folder=folder / CONTAINERS,
        processes=Processes(open_connector),
    )
    supervisor = Supervisor(environment, config.limits)
    parts = _Components(
        config, lines, watches, subscribers, engine, supervisor, trio.Event(), notifier
    )
    for name, line in lines.items():
        watches[name].on_gone = partial(parts.name_gone, name)
        _attach(watches[name], buses[name])
        supervisor.bus_met(name, line.id)
        line.on_back = partial(parts.bus_back, name)
        line.on_gone = partial(parts.bus_gone, name)
    return parts


def _attach(watch: NameWatch, bus: BusConnection) -> None:
    """Connect a watch with a bus, both ways."""
    bus.on_signal = watch.take
    watch.on_caller_gone = bus.calls.gone
    bus.calls.watch(watch)


async def _run(parts: _Components, listener: _SignalListener) -> None:
    closing = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(parts.engine.keep_connected, parts.supervisor)
        nursery.start_soon(parts.supervisor.run_jobs)
        nursery.start_soon(parts.supervisor.watches.run)
        for watch in parts.watches.values():
            with suppress(BusLostError):  # the ReconnectingBus connects again
                await watch.check()
        listener.has_started.set()
        async with trio.open_nursery() as callers:
            for name, line in parts.lines.items():
                make_objects = partial(_make_objects, parts, name)
                callers.start_soon(serve_calls, line, make_objects, closing)
            sys.stdout.write(f"ready {parts.config.buses[0].address}\n")
            sys.stdout.flush()
            parts.notifier.ready()
            nursery.start_soon(stay_alive, parts.notifier, parts.check_gate)
            await _wait_end(parts, listener)
            parts.notifier.stopping()
            closing.set()
            callers.cancel_scope.deadline = trio.current_time() + ANSWER_TIMEOUT
        # No call is answered from here on, but the ends of sandboxes are still announced.
        with trio.move_on_after(SHUTDOWN_TIMEOUT):
            await parts.engine.shutdown()
        nursery.cancel_scope.cancel()
    if parts.all_gone.is_set():
        raise BusLostError(f"no bus is left: all gone for {parts.config.bus_gone_seconds} s")


async def _wait_end(parts: _Components, listener: _SignalListener) -> None:
    async with trio.open_nursery() as nursery:

        async def wait_gone() -> None:
            await parts.all_gone.wait()
            nursery.cancel_scope.cancel()

        async def reload() -> None:
            async for _ in listener.reloads:
                await _reload(parts)

        nursery.start_soon(wait_gone)
        nursery.start_soon(reload)
        await listener.to_end.wait()
        nursery.cancel_scope.cancel()


async def _reload(parts: _Components) -> None:
    """Replace the gate by a new process, which is all that a reload does."""
    parts.notifier.reloading()
    try:
        old, new = await parts.engine.upgrade()
    except BrokerError as exc:
        LOGGER.error("SIGHUP: %s", exc)  # noqa: TRY400 - no defect of ours
    else:
        LOGGER.info("SIGHUP: gate process %d has replaced gate process %d", new, old)
    finally:
        parts.notifier.ready()


def _make_engine(config: Config) -> GateEngine:
    control = config.runtime_dir / "gate.sock"
    if config.engine == "gate":
        return GateEngine(control=control, buses=config.buses)
    is_required = config.engine == "containers1"
    return Containers1Engine(control=control, buses=config.buses, is_required=is_required)


def _make_objects(parts: _Components, name: str, bus: BusConnection) -> Objects:
    watch = parts.watches[name]
    context = BusContext(name=name, bus=bus, supervisor=parts.supervisor, buses=tuple(parts.lines))
    return Objects(
        {
            DRIVER_PATH: [containers1.Containers1(context, watch).interface()],
            BROKER_PATH: [
                management.Management(
                    context, parts.engine, parts.config, parts.subscribers, watch
                ).interface(),
                policy.PolicyInterface(context).interface(),
            ],
        }
    )


class _Announcer:
    """The sender of the service's signals."""

    def __init__(self, lines: Mapping[str, ReconnectingBus], subscribers: Subscribers) -> None:
        self._lines: Final = lines
        self._subscribers: Final = subscribers

    def removed(self, record: Record, reason: str) -> None:
        for bus in [line.bus for line in self._lines.values() if line.bus is not None]:
            bus.emit(DRIVER_PATH, CONTAINERS1, "InstanceRemoved", "o", [record.path])
            ended = [record.path, reason]
            bus.emit(BROKER_PATH, BROKER, "SandboxEnded", "os", ended)

    def denied(self, record: Record, event: Denied) -> None:
        what = None
        for bus_name, unique_name in self._subscribers.hearers(record):
            line = self._lines.get(bus_name)
            bus = line.bus if line is not None else None
            if bus is None or bus.backlog > MAX_BACKLOG:
                continue
            what = what or management.describe_denial(shorten(event))
            bus.emit(
                BROKER_PATH,
                BROKER,
                "Denied",
                "oa{sv}",
                [record.path, what],
                destination=unique_name,
            )


@contextmanager
def _locked_folder(config: Config) -> Iterator[None]:
    """Make the runtime folder, and lock the folder for this process. Raises OSError, StartError."""
    mode = 0o700 if config.scope == "user" else 0o711
    folder = config.runtime_dir
    for path in (folder, folder / CONTAINERS):
        with open_folder(path, make=mode, ours=True) as fd:
            os.chmod(".", mode, dir_fd=fd)
    check_entries(folder)
    lock = open_file(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"another supervisor is running in {folder}") from None
        yield
    finally:
        os.close(lock)


@contextmanager
def _address_file(path: Path, address: str) -> Iterator[None]:
    """Write the address of the primary bus into a file for the command line."""
    write_file(path, f"{address}\n".encode(), 0o644)  # readable by all, for the system scope
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
